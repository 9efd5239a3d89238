"""Stable Diffusion XL: two text encoders, a pooled one, and what the picture's size is said to be.

https://arxiv.org/abs/2307.01952, section 2.2 on micro-conditioning. The refiner has the larger text encoder
only and is told an aesthetic score in place of the target size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from jubako.catalog import Model
from jubako.families.latent import LatentModel, guided
from jubako.job import Job, MicroConditioning

__all__ = ["StableDiffusionXL", "wrap"]

# What the stock pipelines tell the refiner of the prompt's and of the negative prompt's picture.
AESTHETIC_SCORE = 6.0
NEGATIVE_AESTHETIC_SCORE = 2.5


def wrap(pipeline: Any, model: Model) -> StableDiffusionXL:
    """A model of this family around its pipeline in memory."""
    return StableDiffusionXL(pipeline, model)


class StableDiffusionXL(LatentModel):
    """A ``StableDiffusionXLPipeline`` or ``…Img2ImgPipeline`` (the refiner) or ``…InpaintPipeline``."""

    def _encode(self, pipeline: Any, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The text encoders' states of one prompt, [1, 77, width], and the pooled one, [1, width]."""
        embeds, _, pooled, _ = pipeline.encode_prompt(
            text, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return embeds, pooled

    def conditioning(self, job: Job) -> dict[str, torch.Tensor]:
        """Prompts' states, pooled ones and sizes: [rows, 77, width], [rows, width], [rows, 5|6]."""
        encode = self.encoder(job)
        rows = [encode(job.prompt)]
        sizes = [self._time_ids(job.micro_conditioning, job, AESTHETIC_SCORE)]
        if guided(job):
            rows.insert(0, self._negative(job.negative_prompt, rows[0], encode))
            sizes.insert(0, self._negative_time_ids(job))
        embeds, pooled = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        time_ids = torch.tensor(sizes, dtype=embeds.dtype, device=self.device)
        return {"encoder_hidden_states": embeds, "text_embeds": pooled, "time_ids": time_ids}

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),  # noqa: ARG002 # a UNet has no layers to leave out
    ) -> torch.Tensor:
        """One forward of the UNet: [rows, 4 or 9, h, w] with one timestep a row."""
        added = {name: conditioning[name] for name in ("text_embeds", "time_ids")}
        prediction: torch.Tensor = self.denoiser(
            inputs,
            timesteps,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return prediction

    def _negative(
        self, text: str, positive: tuple[torch.Tensor, torch.Tensor], encode: Callable[..., Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not text and self.pipeline.config.force_zeros_for_empty_prompt:
            return torch.zeros_like(positive[0]), torch.zeros_like(positive[1])
        encoded: tuple[torch.Tensor, torch.Tensor] = encode(text)
        return encoded

    @property
    def _scored(self) -> bool:
        return bool(self.pipeline.config.get("requires_aesthetics_score", False))

    def _time_ids(self, sizes: MicroConditioning | None, job: Job, score: float) -> list[float]:
        """Heights before widths, as the paper has them."""
        own = (job.width, job.height)
        sizes = sizes or MicroConditioning(original_size=own, crop=(0, 0), target_size=own)
        last = [score] if self._scored else sizes.target_size[::-1]
        return [*sizes.original_size[::-1], *sizes.crop[::-1], *last]

    def _negative_time_ids(self, job: Job) -> list[float]:
        sizes = job.micro_conditioning
        if self._scored and sizes is not None:
            sizes = sizes.model_copy(update={"crop": (0, 0)})
        return self._time_ids(sizes, job, NEGATIVE_AESTHETIC_SCORE)
