"""What the video models have in common: latents decoded some frames at a time, and frames made into files."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from jubako.clips import encode_clip, spritesheet, thumbnail
from jubako.families.decoding import marked
from jubako.families.loaded import Finished
from jubako.families.preview import ColourMap, fitted
from jubako.job import Clip, Job
from jubako.media import MEDIA_TYPES
from jubako.result import File

__all__ = ["clip_of", "colours_of", "decoded_frames", "finished_clip"]


def clip_of(job: Job) -> Clip:
    """What a job of a video model says of its clip."""
    assert job.clip is not None  # noqa: S101 # planning fills it in for every job of a clip
    return job.clip


def decoded_frames(vae: Any, latents: torch.Tensor, chunk_size: int) -> torch.Tensor:
    """The frames [f, 3, H, W] from 0 to 1 of one clip's latents [f, c, h, w], so many of them at a time.

    A temporal decoder sees the frames of one chunk together, so that more of them flicker less and take more
    memory.
    """
    latents = latents.to(vae.dtype) / vae.config.scaling_factor
    temporal = "num_frames" in inspect.signature(vae.decode).parameters
    chunks = [
        vae.decode(chunk, **({"num_frames": len(chunk)} if temporal else {}), return_dict=False)[0]
        for chunk in latents.split(chunk_size)
    ]
    return (marked(torch.cat(chunks)).float() / 2 + 0.5).clamp(0, 1)


def colours_of(vae: Any, factor: int) -> ColourMap:
    """What the latents of an autoencoder's pictures are shown as."""

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        posterior = vae.encode(pictures.to(vae.device, vae.dtype)).latent_dist
        latents: torch.Tensor = posterior.mode() * vae.config.scaling_factor
        return latents

    return fitted(encode, factor)


def finished_clip(decoded: torch.Tensor, job: Job, facts: Mapping[str, object]) -> Finished:
    """The files of frames [f, 3, H, W] from 0 to 1, rounded as the stock pipelines do."""
    frames = (decoded * 255).round().to(torch.uint8).movedim(1, -1).contiguous().cpu().numpy()
    content = encode_clip(frames, clip_of(job).fps, job, facts)
    return Finished(
        File(content_type=MEDIA_TYPES[job.output_format], content=content),
        {
            "thumbnail": File(content_type=MEDIA_TYPES["webp"], content=thumbnail(frames)),
            "spritesheet": File(content_type=MEDIA_TYPES["jpeg"], content=spritesheet(frames)),
        },
    )
