"""What the picture families have in common: latents of an autoencoder, denoised under a prompt.

A diffusers pipeline is taken apart into prepare, predict and decode. The order in which random numbers are
drawn is that of the stock pipelines: first the latents of the picture to start from, then the noise, then
those of the masked picture.
"""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch.nn import functional

from jubako.adapters.bank import AdapterBank
from jubako.adapters.deltas import AdapterSet
from jubako.adapters.embedding import Embedding, spoken
from jubako.catalog import Model
from jubako.engine.samples import Kept, Sample
from jubako.engine.schedule import Schedule, make_scheduler
from jubako.errors import InvalidRequest
from jubako.families.decoding import in_float32, in_tiles, marked
from jubako.families.loaded import Finished, checked
from jubako.families.preview import ColourMap, fitted
from jubako.job import Job
from jubako.media import MEDIA_TYPES, encode_image
from jubako.pictures import composited
from jubako.result import File

__all__ = ["LatentModel", "guided"]

PROMPTS_KEPT = 256
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")


def guided(job: Job) -> bool:
    """Whether the job's rows come in pairs, a negative and a positive one."""
    return job.guidance_scale > 1


class LatentModel(ABC):
    """A text-to-image pipeline of diffusers. Nothing of the pipeline is changed by a job."""

    def __init__(self, pipeline: Any, model: Model) -> None:
        self.pipeline = pipeline
        self.model = model
        self.bank: AdapterBank | None = None
        self.max_rows = model.max_rows
        self.device: torch.device = pipeline.device
        self.denoiser: Any = pipeline.components.get("unet") or pipeline.components["transformer"]
        self._kept = lru_cache(PROMPTS_KEPT)(partial(self._encode, pipeline))
        self._mask_processor = VaeImageProcessor(
            vae_scale_factor=pipeline.vae_scale_factor,
            do_normalize=False,
            do_binarize=True,
            do_convert_grayscale=True,
        )

    @abstractmethod
    def _encode(self, pipeline: Any, text: str, *options: Any) -> Any:
        """What a pipeline's text encoders make of one prompt."""

    def encoder(self, job: Job) -> Callable[..., Any]:
        """What encodes the job's prompts; where no adapter has layers of theirs, that of the last is kept."""
        adapters = tuple(
            (lora, weight) for lora, weight in self.take(job) if lora.components.keys() & TEXT_ENCODERS
        )
        embeddings = self._embeddings(job)
        return partial(self._encode_adapted, adapters, embeddings) if adapters or embeddings else self._kept

    def _encode_adapted(
        self, adapters: AdapterSet, embeddings: Mapping[str, Embedding], text: str, *options: Any
    ) -> Any:
        assert self.bank is not None  # noqa: S101 # both come from it
        with ExitStack() as stack:
            for name in TEXT_ENCODERS:
                stack.enter_context(self.bank.rows(name, [adapters]))
            pipeline = self.pipeline
            if embeddings:
                pipeline, text = stack.enter_context(spoken(pipeline, text, embeddings))
            return self._encode(pipeline, text, *options)

    def forget_prompts(self) -> None:
        """Drop the prompts that are kept, for whoever changes a text encoder of its own."""
        self._kept.cache_clear()

    def take(self, job: Job) -> AdapterSet:
        """The job's adapters in memory, read if they are not; InvalidRequest when one does not fit."""
        if not job.loras:
            return ()
        if self.bank is None:
            raise InvalidRequest(f"loras: {job.model} takes no adapters here", param="loras")
        return self.bank.take(job.loras)

    def _embeddings(self, job: Job) -> Mapping[str, Embedding]:
        if not job.embeddings:
            return {}
        if self.bank is None:
            raise InvalidRequest(f"embeddings: {job.model} takes none here", param="embeddings")
        return self.bank.embeddings(job.embeddings)

    def adapted(self, rows: Sequence[AdapterSet]) -> AbstractContextManager[None]:
        """The adapters of each row of the denoiser's forwards within."""
        assert self.bank is not None  # noqa: S101 # without one no sample has adapters
        return self.bank.rows(self.denoiser_name, rows)

    @property
    def denoiser_name(self) -> str:
        """What the pipeline calls its denoiser."""
        return "unet" if self.pipeline.components.get("unet") is not None else "transformer"

    @abstractmethod
    def conditioning(self, job: Job) -> dict[str, torch.Tensor]:
        """What the denoiser is told beside the latents, a row each, the negative one first."""

    @abstractmethod
    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """One forward of the denoiser: [rows, c, h, w] with one timestep a row."""

    def steps_left_out(self, steps: int, strength: float) -> int:
        """How many of the first steps a job of this strength does not take."""
        return steps - int(steps * strength)

    @torch.inference_mode()
    def prepare(self, job: Job) -> Sample:
        """Encode the prompts and the picture, draw the noise, set the timesteps."""
        conditioning = self.conditioning(job)
        generator = torch.Generator("cpu").manual_seed(job.seed)
        schedule = self.schedule(job, generator)
        if job.strength is not None:
            schedule.leave_out(self.steps_left_out(job.num_inference_steps, job.strength))
        if job.refinement is not None:
            schedule.end_after(job.refinement.after)
            _check_share(schedule, job)
        dtype = next(iter(conditioning.values())).dtype
        start = _Start(self, job, schedule, generator, dtype)
        sample = Sample(
            denoiser=self,
            schedule=schedule,
            conditioning=conditioning,
            guidance_scale=job.guidance_scale,
            skip_layer_guidance=job.skip_layer_guidance,
            adapters=(adapters := self.take(job)),
            adapted=self.adapted if adapters else None,
            **start.of_task(),
        )
        return checked(sample, self.denoiser, job)

    @torch.inference_mode()
    def prepare_refinement(self, job: Job) -> Sample:
        """The last part of a job whose latents another model has begun; they come with the handing over.

        The job's LoRAs are the other model's.
        """
        job = job.model_copy(update={"loras": ()})
        generator = torch.Generator("cpu").manual_seed(job.seed)
        schedule = self.schedule(job, generator)
        assert job.refinement is not None  # noqa: S101 # the runner asks for jobs with one only
        schedule.begin_after(job.refinement.after)
        _check_share(schedule, job)
        sample = Sample(
            denoiser=self,
            schedule=schedule,
            latents=torch.empty(self.latent_shape(job), device=self.device),
            conditioning=self.conditioning(job),
            guidance_scale=job.guidance_scale,
        )
        return checked(sample, self.denoiser, job)

    def schedule(self, job: Job, generator: torch.Generator) -> Schedule:
        """All of the job's timesteps, on a scheduler of its own."""
        scheduler = make_scheduler(self.pipeline.scheduler.config, job.scheduler, self.model.flow)
        return Schedule(scheduler, job.num_inference_steps, generator)

    def latent_shape(self, job: Job) -> tuple[int, ...]:
        """[1, c, h, w] of the job's latents."""
        factor = self.pipeline.vae_scale_factor
        channels: int = self.pipeline.vae.config.latent_channels
        return (1, channels, job.height // factor, job.width // factor)

    def encode_picture(self, picture: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Latents [1, c, h, w], drawn from the posterior of a picture [1, 3, H, W] of values -1 to 1."""
        vae = self.pipeline.vae
        posterior = vae.encode(picture.to(self.device, vae.dtype)).latent_dist
        latents: torch.Tensor = (posterior.sample(generator) - self._shift) * vae.config.scaling_factor
        return latents

    def decode(self, latents: torch.Tensor, *, sparing: bool = False, upcast: bool = False) -> torch.Tensor:
        """Latents [n, c, h, w] to pictures [n, 3, H, W] with values from 0 to 1."""
        vae = in_float32(self.pipeline.vae) if upcast else self.pipeline.vae
        latents = latents.to(vae.dtype) / vae.config.scaling_factor + self._shift
        pictures = in_tiles(vae, latents) if sparing else vae.decode(latents, return_dict=False)[0]
        decoded: torch.Tensor = self.pipeline.image_processor.denormalize(marked(pictures))
        return decoded

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        """The picture that clean latents [1, c, h, w] amount to, [3, h, w], by colours alone."""
        return self._colours(latents[0])

    @cached_property
    def _colours(self) -> ColourMap:
        vae = self.pipeline.vae

        def encode(pictures: torch.Tensor) -> torch.Tensor:
            posterior = vae.encode(pictures.to(self.device, vae.dtype)).latent_dist
            latents: torch.Tensor = (posterior.mode() - self._shift) * vae.config.scaling_factor
            return latents

        return fitted(encode, self.pipeline.vae_scale_factor)

    def to_image(self, picture: torch.Tensor) -> Image.Image:
        """A picture [3, H, W] with values from 0 to 1 as an image, rounded as the stock pipeline does."""
        processor = self.pipeline.image_processor
        image: Image.Image = processor.numpy_to_pil(processor.pt_to_numpy(picture[None]))[0]
        return image

    def finish(self, decoded: torch.Tensor, job: Job, facts: Mapping[str, object]) -> Finished:
        """The picture's file, its mask's surroundings taken from the original."""
        image = composited(self.to_image(decoded), job)
        return Finished(
            File(content_type=MEDIA_TYPES[job.output_format], content=encode_image(image, job, facts))
        )

    def picture(self, job: Job) -> torch.Tensor:
        """The picture that a job starts from, [1, 3, H, W] with values from -1 to 1."""
        image = Image.open(io.BytesIO(job.image or b""))
        picture: torch.Tensor = self.pipeline.image_processor.preprocess(image)
        return picture

    def mask(self, job: Job) -> torch.Tensor:
        """The job's mask, [1, 1, H, W], 1 where to paint and 0 elsewhere."""
        mask: torch.Tensor = self._mask_processor.preprocess(Image.open(io.BytesIO(job.mask or b"")))
        return mask

    @property
    def _shift(self) -> float:
        return self.pipeline.vae.config.shift_factor or 0.0


class _Start:
    """What a sample starts from, by its task."""

    def __init__(
        self, model: LatentModel, job: Job, schedule: Schedule, generator: torch.Generator, dtype: torch.dtype
    ) -> None:
        self.model, self.job, self.schedule = model, job, schedule
        self.generator, self.dtype = generator, dtype
        self.shape = model.latent_shape(job)

    def of_task(self) -> dict[str, Any]:
        """The sample's ``latents``, and what inpainting has besides."""
        starts = {"img2img": self._picture, "inpaint": self._inpainting}
        return starts.get(self.job.task, self._noise_alone)()

    def _noise_alone(self) -> dict[str, Any]:
        return {"latents": self._noise() * self.schedule.init_noise_sigma}

    def _picture(self) -> dict[str, Any]:
        latents = self._encoded(self.model.picture(self.job))
        return {"latents": self.schedule.noised(latents, self._noise())}

    def _inpainting(self) -> dict[str, Any]:
        picture, mask = self.model.picture(self.job), self.model.mask(self.job)
        small = functional.interpolate(mask, size=self.shape[2:]).to(self.model.device, self.dtype)
        # A denoiser that was made to inpaint takes the mask and the masked picture as channels.
        by_channels = self.model.denoiser.config.in_channels > self.shape[1]
        # The picture itself is not encoded where nothing is made of it.
        latents = None if by_channels and self.job.strength == 1 else self._encoded(picture)
        noise = self._noise()
        if latents is None or self.job.strength == 1:
            start = noise * self.schedule.init_noise_sigma
        else:
            start = self.schedule.noised(latents, noise)
        if by_channels:
            masked = self._encoded(picture * (mask < 0.5))
            return {"latents": start, "channels": torch.cat([small, masked], dim=1)}
        # The stock pipeline draws latents of the masked picture here and does not look at them; what the
        # scheduler draws comes after.
        self._noise()
        assert latents is not None  # noqa: S101 # it is only without where channels are asked for
        return {"latents": start, "kept": Kept(small, latents, noise)}

    def _encoded(self, picture: torch.Tensor) -> torch.Tensor:
        return self.model.encode_picture(picture, self.generator).to(self.dtype)

    def _noise(self) -> torch.Tensor:
        noise: torch.Tensor = randn_tensor(self.shape, self.generator, self.model.device, self.dtype)
        return noise


def _check_share(schedule: Schedule, job: Job) -> None:
    if len(schedule) < 1 and job.refinement is not None:
        raise InvalidRequest(
            f"refiner: after {job.refinement.after:g} of {job.num_inference_steps} steps leaves one of the "
            "two models without a step; take more steps or another share",
            param="refiner",
        )
