"""A LoRA of the denoiser alone, its alpha equal to its rank, read and written as diffusers does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from jubako.families.latent import LatentModel
from jubako.training.encodings import Encodings
from jubako.training.folder import replaced
from jubako.training.plan import TrainingPlan
from jubako.training.request import Targets

__all__ = ["Lora", "modules_for"]

_UNET: Mapping[Targets, tuple[str, ...]] = {
    "attention": ("to_q", "to_k", "to_v", "to_out.0"),
    "transformer": ("ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
    "all": ("conv1", "conv2", "conv_shortcut", "time_emb_proj"),
}
_MMDIT: Mapping[Targets, tuple[str, ...]] = {
    "attention": (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    ),
    "transformer": ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    "all": ("norm1.linear", "norm1_context.linear"),
}


def modules_for(targets: Targets, *, unet: bool) -> list[str]:
    """The names' ends of the layers that are touched; each choice has those of the one before it."""
    table = _UNET if unet else _MMDIT
    kinds = tuple(table)
    return [name for kind in kinds[: kinds.index(targets) + 1] for name in table[kind]]


class Lora:
    """What is learned by ``dreambooth-lora``."""

    def __init__(self, model: LatentModel, plan: TrainingPlan) -> None:
        self._pipeline = model.pipeline
        self._unet = "unet" in model.pipeline.components
        self._denoiser: Any = model.denoiser
        self._denoiser.requires_grad_(False)
        # Gaussian for the one factor, zeros for the other: the first forward is the base's.
        torch.manual_seed(plan.seed % 2**32)
        modules = modules_for(plan.targets, unet=self._unet)
        config = LoraConfig(
            r=plan.rank, lora_alpha=plan.rank, init_lora_weights="gaussian", target_modules=modules
        )
        self._denoiser.add_adapter(config)
        cast_training_params(self._denoiser, dtype=torch.float32)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer steps, in a fixed order."""
        return [each for each in self._denoiser.parameters() if each.requires_grad]

    def told(self, encodings: Encodings, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the denoiser is told of these rows: the prompts' states do not change."""
        return encodings.told(rows)

    def write(self, file: Path) -> None:
        """As ``load_lora_weights`` reads it."""
        # PEFT's names as they are: diffusers' older ones exist for attention alone, and a file with both is
        # read in part.
        layers = get_peft_model_state_dict(self._denoiser)
        part = "unet_lora_layers" if self._unet else "transformer_lora_layers"
        layers = {name: values.float().cpu() for name, values in layers.items()}
        with replaced(file) as partial:
            type(self._pipeline).save_lora_weights(
                partial.parent, weight_name=partial.name, safe_serialization=True, **{part: layers}
            )

    def read(self, file: Path) -> None:
        """Go on from what ``write`` wrote."""
        prefix = "unet." if self._unet else "transformer."
        layers = {name.removeprefix(prefix): values for name, values in load_file(file).items()}
        outcome = set_peft_model_state_dict(self._denoiser, layers)
        if outcome is not None and outcome.unexpected_keys:
            raise ValueError(
                f"{file.name} has layers that are not trained here: {outcome.unexpected_keys[:3]}"
            )

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Without the adapter's layers; nothing is trained meanwhile."""
        self._denoiser.disable_adapters()
        try:
            with torch.no_grad():
                yield
        finally:
            self._denoiser.enable_adapters()
