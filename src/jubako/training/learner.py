"""The seam between the loop and what is learned: a LoRA of the denoiser, or the embeddings of a word."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch

from jubako.families.latent import LatentModel
from jubako.training.encodings import Encodings
from jubako.training.plan import TrainingPlan

__all__ = ["Learner", "learner"]


class Learner(Protocol):
    """Attached to a model in memory, which draws with it from then on."""

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """What the optimizer steps, in a fixed order, in float32."""
        ...

    def told(self, encodings: Encodings, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the denoiser is told of these rows of the encodings."""
        ...

    def write(self, file: Path) -> None:
        """The adapter's file as diffusers reads it, whole or not at all."""
        ...

    def read(self, file: Path) -> None:
        """Go on from what ``write`` wrote; ValueError or KeyError when it is another adapter's."""
        ...

    def resting(self) -> AbstractContextManager[None]:
        """While it lasts, the model is the base."""
        ...


def learner(model: LatentModel, plan: TrainingPlan) -> Learner:
    """What learns by the plan's method."""
    from jubako.training.inversion import Inversion
    from jubako.training.lora import Lora

    return Inversion(model, plan) if plan.method == "textual-inversion" else Lora(model, plan)
