"""Stable Diffusion 3 and 3.5: three text encoders, a transformer over sixteen-channel latents, flow matching.

https://arxiv.org/abs/2403.03206. The T5 encoder can be left out; its states are then zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from jubako.catalog import Model
from jubako.families.latent import LatentModel, guided
from jubako.job import Job

__all__ = ["StableDiffusion3", "wrap"]

MAX_SEQUENCE_LENGTH = 256


def wrap(pipeline: Any, model: Model) -> StableDiffusion3:
    """A model of this family around its pipeline in memory."""
    return StableDiffusion3(pipeline, model)


class StableDiffusion3(LatentModel):
    """A ``StableDiffusion3Pipeline``."""

    def steps_left_out(self, steps: int, strength: float) -> int:
        """How many of the first steps are left out; this family's pipelines round the other way."""
        return int(max(steps - min(steps * strength, steps), 0))

    def _encode(
        self, pipeline: Any, text: str, max_sequence_length: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The encoders' states of one prompt, [1, 77 + length, width], and the pooled one, [1, width]."""
        embeds, _, pooled, _ = pipeline.encode_prompt(
            text,
            None,
            None,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=max_sequence_length,
        )
        return embeds, pooled

    def conditioning(self, job: Job) -> dict[str, torch.Tensor]:
        """The prompts' states and their pooled ones: [rows, tokens, width], [rows, width]."""
        texts = [job.negative_prompt, job.prompt] if guided(job) else [job.prompt]
        length = job.max_sequence_length or MAX_SEQUENCE_LENGTH
        encode = self.encoder(job)
        rows = [encode(text, length) for text in texts]
        embeds, pooled = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        return {"encoder_hidden_states": embeds, "pooled_projections": pooled}

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """One forward of the transformer: [rows, 16, h, w] with one timestep a row."""
        prediction: torch.Tensor = self.denoiser(
            hidden_states=inputs,
            timestep=timesteps,
            **conditioning,
            skip_layers=list(skip_layers) or None,
            return_dict=False,
        )[0]
        return prediction
