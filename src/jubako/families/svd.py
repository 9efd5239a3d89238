"""Stable Video Diffusion: a picture's latents beside those of every frame, and numbers for rate and motion.

https://arxiv.org/abs/2311.15127. Frames are denoised together, by a UNet that attends over space and time and
takes one timestep a clip, so that rows of several clips can share a forward.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from functools import cached_property, partial
from typing import Any

import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from jubako.catalog import Model
from jubako.engine.samples import Sample
from jubako.engine.schedule import Schedule, make_scheduler
from jubako.errors import InvalidRequest
from jubako.families.decoding import in_float32
from jubako.families.frames import clip_of, colours_of, decoded_frames, finished_clip
from jubako.families.latent import guided
from jubako.families.loaded import Finished, checked
from jubako.families.preview import ColourMap
from jubako.job import Clip, Job

__all__ = ["StableVideoDiffusion"]


class StableVideoDiffusion:
    """A ``StableVideoDiffusionPipeline``. Nothing of the pipeline is changed by a job."""

    def __init__(self, pipeline: Any, model: Model) -> None:
        self.pipeline = pipeline
        self.model = model
        self.max_rows = model.max_rows
        self.device: torch.device = pipeline.device

    @torch.inference_mode()
    def prepare(self, job: Job) -> Sample:
        """Encode the picture under noise, draw that of the frames, set the timesteps.

        The autoencoder is never cast: where float16 is not enough for it, it was loaded in float32.
        """
        clip, image = clip_of(job), Image.open(io.BytesIO(job.image or b""))
        generator = torch.Generator("cpu").manual_seed(job.seed)
        embedding = self._embedding(image)
        beside = self._beside(image, self.noise_on_picture(clip), generator).to(embedding.dtype)
        schedule = self.schedule(job, generator)
        factor: int = self.pipeline.vae_scale_factor
        shape = (1, clip.num_frames, beside.shape[1], job.height // factor, job.width // factor)
        noise = randn_tensor(shape, generator, self.device, embedding.dtype)
        beside = beside[:, None].expand(-1, clip.num_frames, -1, -1, -1)
        told = torch.tensor([self.told(clip)], dtype=embedding.dtype, device=self.device)
        if guided(job):
            # The negative row is told of rate and motion, not of the picture.
            embedding = torch.cat([torch.zeros_like(embedding), embedding])
            beside = torch.cat([torch.zeros_like(beside), beside])
            told = told.expand(2, -1)
        scales = self.guidance(job).to(self.device, noise.dtype)
        sample = Sample(
            denoiser=self,
            schedule=schedule,
            latents=noise * schedule.init_noise_sigma,
            conditioning={"encoder_hidden_states": embedding, "added_time_ids": told},
            guidance_scale=job.guidance_scale,
            guidance=scales[None, :, None, None, None],
            channels=beside,
            decode=partial(self.decode, chunk_size=clip.decode_chunk_size),
        )
        return checked(sample, self.pipeline.unet, job)

    def prepare_refinement(self, job: Job) -> Sample:
        """No clip has a refiner."""
        raise InvalidRequest(f"refiner: {job.model} has no refiner", param="refiner")

    def noise_on_picture(self, clip: Clip) -> float:
        """How strong the noise on the picture is."""
        return clip.noise_aug_strength or 0.0

    def told(self, clip: Clip) -> list[float]:
        """The numbers that the denoiser is told; in training the rate was one less than the true one."""
        return [clip.fps - 1, clip.motion_bucket_id or 0, self.noise_on_picture(clip)]

    def guidance(self, job: Job) -> torch.Tensor:
        """The guidance scale of each frame, [frames], rising evenly: the picture itself needs the least."""
        clip = clip_of(job)
        least = 1.0 if clip.min_guidance_scale is None else clip.min_guidance_scale
        return torch.linspace(least, job.guidance_scale, clip.num_frames)

    def schedule(self, job: Job, generator: torch.Generator) -> Schedule:
        """All of the job's timesteps, on a scheduler of its own."""
        scheduler = make_scheduler(self.pipeline.scheduler.config, job.scheduler)
        return Schedule(scheduler, job.num_inference_steps, generator)

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),  # noqa: ARG002 # a UNet has no layers to leave out
    ) -> torch.Tensor:
        """One forward of the UNet: [rows, frames, 8, h, w] with one timestep a row."""
        prediction: torch.Tensor = self.pipeline.unet(inputs, timesteps, **conditioning, return_dict=False)[0]
        return prediction

    def decode(
        self,
        latents: torch.Tensor,
        chunk_size: int | None = None,
        *,
        sparing: bool = False,
        upcast: bool = False,
    ) -> torch.Tensor:
        """Latents [n, frames, c, h, w] to clips [n, frames, 3, H, W] with values from 0 to 1."""
        vae = in_float32(self.pipeline.vae) if upcast else self.pipeline.vae
        size = 1 if sparing else chunk_size or latents.shape[1]
        return torch.stack([decoded_frames(vae, clip, size) for clip in latents])

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        """The middle frame that clean latents [1, frames, c, h, w] amount to, [3, h, w], by colours alone."""
        return self._colours(latents[0, latents.shape[1] // 2])

    def finish(self, decoded: torch.Tensor, job: Job, facts: Mapping[str, object]) -> Finished:
        """The clip's file, its thumbnail and its contact sheet."""
        return finished_clip(decoded, job, facts)

    @cached_property
    def _colours(self) -> ColourMap:
        return colours_of(self.pipeline.vae, self.pipeline.vae_scale_factor)

    def _embedding(self, image: Image.Image) -> torch.Tensor:
        """What the image encoder makes of the picture, [1, 1, width]."""
        encode = self.pipeline._encode_image  # noqa: SLF001 # a part of the stock pipeline, which is the oracle
        embedding: torch.Tensor = encode(image, self.device, 1, False)
        return embedding

    def _beside(self, image: Image.Image, strength: float, generator: torch.Generator) -> torch.Tensor:
        """The latents [1, c, h, w] of the picture under some noise; they are not scaled."""
        picture = self.pipeline.video_processor.preprocess(image).to(self.device)
        picture = picture + strength * randn_tensor(picture.shape, generator, self.device, picture.dtype)
        encode = self.pipeline._encode_vae_image  # noqa: SLF001 # as above
        latents: torch.Tensor = encode(picture, self.device, 1, False)
        return latents
