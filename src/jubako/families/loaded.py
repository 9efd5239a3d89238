"""What every family gives the runner: a loaded model that prepares samples and finishes pictures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from jubako.engine.samples import Denoiser, Sample
from jubako.errors import InvalidRequest
from jubako.job import Job
from jubako.result import File
from jubako.weights.graphs.proxies import GraphDenoiser

__all__ = ["Finished", "LoadedModel", "checked"]


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


def checked(sample: Sample, denoiser: Any, job: Job) -> Sample:
    """The sample, if the denoiser takes it; InvalidRequest names what a vendor's graph can't do.

    Found out in a forward, it would take the other samples along.
    """
    if not isinstance(denoiser, GraphDenoiser):
        return sample
    if job.skip_layer_guidance is not None:
        raise InvalidRequest(
            f"skip_layer_guidance: {job.model} is served from graphs, which have no layers to leave out",
            param="skip_layer_guidance",
        )
    *before, channels, height, width = sample.latents.shape
    channels += 0 if sample.channels is None else sample.channels.shape[-3]
    shapes = {name: rows.shape for name, rows in sample.conditioning.items()}
    denoiser.check((job.width, job.height), (*before, channels, height, width), **shapes)
    return sample
