"""The ways to run one pipeline that `scripts/benchmark engine` compares: stock, stock compiled, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from jubako.families.acceleration import OPTIONS, Acceleration, accelerate, acceleration_for

__all__ = ["ABLATED", "COMPILED", "OURS", "STOCK", "Recipe", "recipes"]

STOCK, COMPILED, OURS = "stock", "stock compiled", "step batcher"

# What a steady state does not show is left out.
ABLATED = tuple(option.word for option in OPTIONS if option.word != "warm-up")


@dataclass(frozen=True)
class Recipe:
    """One way, by name; ours has an acceleration, stock ones have none. ``mode`` is that of the compiler."""

    name: str
    acceleration: Acceleration | None = None
    mode: str | None = None

    def apply(self, pipeline: Any) -> None:
        """Make a fresh pipeline fast in this way."""
        if self.acceleration is not None:
            for name, module in pipeline.components.items():
                if isinstance(module, torch.nn.Module):
                    accelerate(module, name, self.acceleration)
        elif self.mode is not None:
            _compile_as_documented(pipeline, self.mode)


def recipes(
    device_type: Literal["cpu", "cuda"], words: Sequence[str], *, mode: str | None, ablate: Sequence[str] = ()
) -> list[Recipe]:
    """Stock, stock compiled where there is a mode to compile in, ours with these words.

    Also ours with each of the options to ablate alone turned over: what is on off, what is off on.
    """
    ours = acceleration_for(device_type, tuple(words))
    found = [Recipe(STOCK), *([Recipe(COMPILED, mode=mode)] if mode else []), Recipe(OURS, ours)]
    if unknown := sorted(set(ablate) - set(ABLATED)):
        raise ValueError(f"{unknown[0]} can't be turned over; there are: {', '.join(ABLATED)}")
    for option in OPTIONS:
        if option.word not in ablate or (option.gpu_only and device_type == "cpu"):
            continue
        turned = [f"no-{option.word}"] if ours.on(option) else [option.word]
        if option.word == "compile" and ours.compile == "blocks":
            turned.append("compile=whole")
        found += [Recipe(f"{OURS}, {word}", acceleration_for(device_type, (*words, word))) for word in turned]
    return found


def _compile_as_documented(pipeline: Any, mode: str) -> None:
    """What the documentation of diffusers advises, with a compilation of its own for each batch size.

    https://huggingface.co/docs/diffusers/optimization/fp16. Its fused projections are left out where queries
    and keys have norms (SD 3.5): diffusers 0.42 forgets these there.
    """
    denoiser = pipeline.components.get("unet") or pipeline.components["transformer"]
    for module in (denoiser, pipeline.vae):
        module.to(memory_format=torch.channels_last)
        if module.config.get("qk_norm") is None:
            module.fuse_qkv_projections()
    denoiser.compile(mode=mode, fullgraph=True, dynamic=False)
    pipeline.vae.decode = torch.compile(pipeline.vae.decode, mode=mode, fullgraph=True, dynamic=False)
