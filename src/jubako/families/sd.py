"""Stable Diffusion 1.x and 2.x: one text encoder, a UNet over four-channel latents, one timestep a row."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from jubako.catalog import Model
from jubako.engine.samples import Sample, Schedule, make_scheduler
from jubako.job import Job
from jubako.weights.standard import load_pipeline

__all__ = ["StableDiffusion", "load"]

PROMPTS_KEPT = 256


def load(folder: Path, model: Model, device: torch.device, dtype: torch.dtype) -> StableDiffusion:
    """Read the weights of a model of this family."""
    return StableDiffusion(load_pipeline(folder, model, device, dtype), model.max_rows)


class StableDiffusion:
    """A ``StableDiffusionPipeline`` taken apart into prepare, predict and decode."""

    def __init__(self, pipeline: Any, max_rows: int) -> None:
        self.pipeline = pipeline
        self.max_rows = max_rows
        self.encode = lru_cache(PROMPTS_KEPT)(self._encode)

    def _encode(self, text: str) -> torch.Tensor:
        """The text encoder's states of one prompt, [1, 77, width]."""
        embeds: torch.Tensor = self.pipeline.encode_prompt(text, self.pipeline.device, 1, False)[0]
        return embeds

    @torch.inference_mode()
    def prepare(self, job: Job) -> Sample:
        """Encode the prompts, draw the noise, set the timesteps."""
        guided = job.guidance_scale > 1
        texts = [job.negative_prompt, job.prompt] if guided else [job.prompt]
        embeds = torch.cat([self.encode(text) for text in texts])
        generator = torch.Generator("cpu").manual_seed(job.seed)
        scheduler = make_scheduler(self.pipeline.scheduler.config, job.scheduler)
        schedule = Schedule(scheduler, job.num_inference_steps, generator)
        factor = self.pipeline.vae_scale_factor
        shape = (1, self.pipeline.unet.config.in_channels, job.height // factor, job.width // factor)
        noise = randn_tensor(shape, generator, self.pipeline.device, embeds.dtype)
        return Sample(
            denoiser=self,
            schedule=schedule,
            latents=noise * schedule.init_noise_sigma,
            conditioning={"encoder_hidden_states": embeds},
            guidance_scale=job.guidance_scale,
        )

    def predict(
        self, inputs: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """One forward of the UNet: [rows, 4, h, w] with one timestep a row."""
        predictions: torch.Tensor = self.pipeline.unet(inputs, timesteps, **conditioning, return_dict=False)[
            0
        ]
        return predictions

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [n, 4, h, w] to pictures [n, 3, H, W] with values from 0 to 1."""
        vae = self.pipeline.vae
        pictures = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        decoded: torch.Tensor = self.pipeline.image_processor.denormalize(pictures)
        return decoded

    def to_image(self, picture: torch.Tensor) -> Image.Image:
        """A picture [3, H, W] with values from 0 to 1 as an image, rounded as the stock pipeline does."""
        processor = self.pipeline.image_processor
        image: Image.Image = processor.numpy_to_pil(processor.pt_to_numpy(picture[None]))[0]
        return image
