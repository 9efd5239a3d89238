"""What every family gives the runner: a loaded model that prepares samples and finishes pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch

from jubako.engine.samples import Denoiser, Sample
from jubako.job import Job
from jubako.result import File

__all__ = ["Finished", "LoadedModel"]


@dataclass(frozen=True)
class Finished:
    """What a job is answered with: its file, and further ones by name."""

    file: File
    variants: Mapping[str, File] = field(default_factory=dict)


class LoadedModel(Denoiser, Protocol):
    """A model in memory. ``prepare`` runs on one thread, the Denoiser's methods on another."""

    def prepare(self, job: Job) -> Sample:
        """Encode the prompts, draw the noise, set the timesteps."""
        ...

    def prepare_refinement(self, job: Job) -> Sample:
        """The last part of another model's job, as the successor of its sample."""
        ...

    def finish(self, decoded: torch.Tensor, job: Job, facts: Mapping[str, object]) -> Finished:
        """The job's files from what ``decode`` gave for it; runs on a third thread, for several jobs at once.

        ``facts`` (the weights' commit) are written into the file where it has room for them.
        """
        ...
