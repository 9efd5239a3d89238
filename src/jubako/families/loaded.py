"""What every family gives the runner: a loaded model that prepares samples and finishes pictures."""

from __future__ import annotations

from typing import Protocol

import torch
from PIL import Image

from jubako.engine.samples import Denoiser, Sample
from jubako.job import Job

__all__ = ["LoadedModel"]


class LoadedModel(Denoiser, Protocol):
    """A model in memory. ``prepare`` runs on one thread, the Denoiser's methods on another."""

    def prepare(self, job: Job) -> Sample:
        """Encode the prompts, draw the noise, set the timesteps."""
        ...

    def prepare_refinement(self, job: Job) -> Sample:
        """The last part of another model's job, as the successor of its sample."""
        ...

    def to_image(self, picture: torch.Tensor) -> Image.Image:
        """A picture [3, H, W] with values from 0 to 1 as an image, rounded as the stock pipeline does."""
        ...
