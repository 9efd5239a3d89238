"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet over four-channel latents, one timestep a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jubako.catalog import Model
from jubako.families.latent import LatentModel, guided
from jubako.job import Job

__all__ = ["StableDiffusion", "wrap"]


def wrap(pipeline: Any, model: Model) -> StableDiffusion:
    """A model of this family around its pipeline in memory."""
    return StableDiffusion(pipeline, model)


class StableDiffusion(LatentModel):
    """A ``StableDiffusionPipeline``, or one made to inpaint."""

    def _encode(self, pipeline: Any, text: str) -> torch.Tensor:
        """The text encoder's states of one prompt, [1, 77, width]."""
        embeds: torch.Tensor = pipeline.encode_prompt(text, self.device, 1, False)[0]
        return embeds

    def conditioning(self, job: Job) -> dict[str, torch.Tensor]:
        """The prompts' states, [rows, 77, width]."""
        texts = [job.negative_prompt, job.prompt] if guided(job) else [job.prompt]
        rows = list(map(self.encoder(job), texts))
        return {"encoder_hidden_states": torch.cat(rows)}

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),  # noqa: ARG002 # a UNet has no layers to leave out
    ) -> torch.Tensor:
        """One forward of the UNet: [rows, 4 or 9, h, w] with one timestep a row."""
        prediction: torch.Tensor = self.denoiser(inputs, timesteps, **conditioning, return_dict=False)[0]
        return prediction
