"""LoRA files in the formats of the trainers, for small random pipelines."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file

from jubako.adapters.store import AdapterStore
from jubako.catalog import shipped_folder

__all__ = [
    "ATTENTION",
    "CONVOLUTIONS",
    "NAMES",
    "add_four",
    "lora_file",
    "sent",
    "tensors_of",
    "tiny_sd_lora",
]

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
CONVOLUTIONS = ("conv1", "conv2", "proj_in", "conv_shortcut")
NAMES = ("ash", "birch", "cedar", "dogwood")


def tensors_of(
    module: Any, seed: int, *, rank: int = 4, targets: Sequence[str] = ATTENTION, strength: float = 0.05
) -> Mapping[str, torch.Tensor]:
    """A random LoRA for a module, in peft's names, with matrices that are all in play."""
    module = copy.deepcopy(module)
    module.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian"),
        "made",
    )
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * strength
        for name, tensor in get_peft_model_state_dict(module, adapter_name="made").items()
    }


def lora_file(file: Path, **components: Mapping[str, torch.Tensor]) -> Path:
    """A file as diffusers and peft write it; the prefix of each component is its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(
        {f"{name}.{key}": tensor for name, tensors in components.items() for key, tensor in tensors.items()},
        file,
    )
    return file


def tiny_sd_lora(file: Path, seed: int, strength: float = 0.1) -> Path:
    """A random LoRA for the embedded miniature's denoiser."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(shipped_folder() / "embedded" / "tiny-sd" / "unet")
    return lora_file(file, unet=tensors_of(unet, seed, strength=strength))


@contextmanager
def sent(url: str, file: Path, *names: str) -> Iterator[None]:
    """The adapter on a server, under these names, until the block ends."""
    content = file.read_bytes()
    try:
        for name in names:
            upload = {"file": ("a", content)}
            reply = httpx.post(f"{url}/v1/adapters", data={"name": name}, files=upload, timeout=60)
            reply.raise_for_status()
        yield
    finally:
        for name in names:
            httpx.delete(f"{url}/v1/adapters/{name}", timeout=60)


def add_four(store: AdapterStore, pipeline: Any, folder: Path) -> None:
    """Four adapters of other ranks and layers for a pipeline of SD; the last has the text encoder's too."""
    for seed, name in enumerate(NAMES):
        targets = (*ATTENTION, *CONVOLUTIONS) if seed % 2 else ATTENTION
        parts = {"unet": tensors_of(pipeline.unet, seed, rank=4 + seed, targets=targets, strength=0.08)}
        if name == NAMES[-1]:
            words = tensors_of(pipeline.text_encoder, seed, targets=("q_proj", "v_proj"), strength=0.1)
            parts["text_encoder"] = words
        store.add(name, lora_file(folder / f"{name}.safetensors", **parts))
