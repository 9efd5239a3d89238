"""SV3D_u: Stable Video Diffusion made to circle an object, https://arxiv.org/abs/2403.12008.

The picture shows one object in its middle on white; the clip looks at it from all around, a little of the way
each frame, and ends with the picture itself. The denoiser is told nothing but the noise on the picture, and
guidance rises to the far side and falls again.
"""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from PIL import Image

from jubako.families.frames import clip_of, finished_clip
from jubako.families.loaded import Finished
from jubako.families.svd import StableVideoDiffusion
from jubako.job import Clip, Job

__all__ = ["StableVideo3D"]

# As in training: hardly any, so that the views keep to the picture.
NOISE_ON_PICTURE = 1e-5


class StableVideo3D(StableVideoDiffusion):
    """A ``StableVideo3DPipeline``."""

    def noise_on_picture(self, clip: Clip) -> float:
        """The strength of the noise on the picture."""
        return NOISE_ON_PICTURE if clip.noise_aug_strength is None else clip.noise_aug_strength

    def told(self, clip: Clip) -> list[float]:
        """The one number that the denoiser is told."""
        return [self.noise_on_picture(clip)]

    def guidance(self, job: Job) -> torch.Tensor:
        """The guidance scale of each frame, [frames]: least for those that look from the front."""
        clip = clip_of(job)
        least = 1.0 if clip.min_guidance_scale is None else clip.min_guidance_scale
        way = torch.linspace(0, 1, clip.num_frames)
        return least + (1 - (2 * way - 1).abs()) * (job.guidance_scale - least)

    def finish(self, decoded: torch.Tensor, job: Job, facts: Mapping[str, object]) -> Finished:
        """The orbit's file; once around, the last view is the picture itself."""
        picture = self.pipeline.video_processor.preprocess(Image.open(io.BytesIO(job.image or b"")))
        last = (picture / 2 + 0.5).to(decoded)
        return finished_clip(torch.cat([decoded[:-1], last]), job, facts)
