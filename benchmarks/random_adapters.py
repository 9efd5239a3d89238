"""LoRA files with random numbers, in peft's names and for the layers that trainers choose: right for time."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from jubako.adapters.lora import blank

__all__ = ["LAYERS", "quiet", "random_adapter"]

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LAYERS: Mapping[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "all": (
        *_ATTENTION,
        *("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
        *("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv"),
    ),
}
"""What an adapter has: the attentions' projections, or all that is in a UNet's blocks, as a LoCon has."""


def random_adapter(
    file: Path, unet: Any, *, layers: str, rank: int, seed: int, dtype: torch.dtype = torch.float32
) -> Path:
    """A file for a UNet, whose own weights are not looked at. Each layer adds something, none much."""
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    empty: Any = blank(unet)
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(LAYERS[layers]), init_lora_weights=False)
    empty.add_adapter(config, "made")
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in get_peft_model_state_dict(empty, adapter_name="made").items():
        # Of a matrix pair, a tenth of what a layer's own matrix makes of its input.
        size = 0.1 * rank**-0.5 if "lora_B" in name else tensor[0].numel() ** -0.5
        tensors[f"unet.{name}"] = (torch.randn(tensor.shape, generator=generator) * size).to(dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, file)
    return file


@contextmanager
def quiet() -> Iterator[None]:
    """Without what the libraries warn of: patterns that fit more layers than a file has, and the reverse."""
    from diffusers.utils import logging

    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
