"""AnimateDiff: Stable Diffusion 1.5 with motion modules between its layers, which attend over frames.

https://arxiv.org/abs/2307.04725. Latents are [1, 4, frames, h, w]; every frame has the prompt's states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import torch

from jubako.engine.samples import Sample
from jubako.families.decoding import in_float32
from jubako.families.frames import clip_of, decoded_frames, finished_clip
from jubako.families.loaded import Finished
from jubako.families.sd import StableDiffusion
from jubako.job import Job

__all__ = ["AnimateDiff"]


class AnimateDiff(StableDiffusion):
    """An ``AnimateDiffPipeline``."""

    def prepare(self, job: Job) -> Sample:
        """As for a picture, of more dimensions; decoded some frames at a time."""
        size = clip_of(job).decode_chunk_size
        return replace(super().prepare(job), decode=partial(self.decode, chunk_size=size))

    def latent_shape(self, job: Job) -> tuple[int, ...]:
        """[1, c, frames, h, w] of the job's latents."""
        first, channels, *sides = super().latent_shape(job)
        return (first, channels, clip_of(job).num_frames, *sides)

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """One forward of the UNet: [rows, 4, frames, h, w] with one timestep a row."""
        frames = inputs.shape[2]
        repeated = {name: rows.repeat_interleave(frames, dim=0) for name, rows in conditioning.items()}
        return super().predict(inputs, timesteps, repeated, skip_layers)

    def decode(
        self,
        latents: torch.Tensor,
        chunk_size: int | None = None,
        *,
        sparing: bool = False,
        upcast: bool = False,
    ) -> torch.Tensor:
        """Latents [n, c, frames, h, w] to clips [n, frames, 3, H, W] with values from 0 to 1."""
        vae = in_float32(self.pipeline.vae) if upcast else self.pipeline.vae
        size = 1 if sparing else chunk_size or latents.shape[2]
        return torch.stack([decoded_frames(vae, clip.movedim(1, 0), size) for clip in latents])

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        """The middle frame that clean latents [1, c, frames, h, w] amount to, [3, h, w], by colours alone."""
        return super().preview(latents[:, :, latents.shape[2] // 2])

    def finish(self, decoded: torch.Tensor, job: Job, facts: Mapping[str, object]) -> Finished:
        """The clip's file, its thumbnail and its contact sheet."""
        return finished_clip(decoded, job, facts)
