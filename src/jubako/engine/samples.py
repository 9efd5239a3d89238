"""One picture under denoising: its latents, its own scheduler, its own generator, its own step index.

The arithmetic is that of the stock pipelines' loops, one step of it at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from jubako.schedulers import resolve_scheduler

__all__ = ["Denoiser", "Sample", "Schedule", "make_scheduler", "predict_together"]


class Denoiser(Protocol):
    """A loaded model as the batcher sees it."""

    max_rows: int

    def predict(
        self, inputs: torch.Tensor, timesteps: torch.Tensor, conditioning: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """One forward: inputs [rows, c, h, w], timesteps [rows], conditioning [rows, …]; as many out."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Latents [n, c, h, w] to pictures [n, 3, H, W] with values from 0 to 1."""
        ...


def make_scheduler(config: Mapping[str, Any], name: str) -> Any:
    """A fresh diffusers scheduler by any of its names: the model's own config under the name's options.

    Schedulers that clip by default were made for pixels; latents are clipped only where the config says so,
    as the stock pipelines see to when they are built.
    """
    import diffusers

    choice = resolve_scheduler(name)
    scheduler_class = getattr(diffusers, choice.scheduler)
    options = dict(choice.options)
    if "clip_sample" in inspect.signature(scheduler_class).parameters:
        options["clip_sample"] = config.get("clip_sample", False)
    return scheduler_class.from_config(config, **options)


class Schedule:
    """A scheduler with its timesteps set, walked once from the first to the last.

    ``len(schedule)`` counts forwards, which is more than the steps asked for where a scheduler says so:
    PNDM repeats one, Heun and KDPM2 take two a step.
    """

    def __init__(self, scheduler: Any, num_inference_steps: int, generator: torch.Generator) -> None:
        # On the CPU even for a GPU's latents: reading a timestep must not wait for the device.
        scheduler.set_timesteps(num_inference_steps, device="cpu")
        self._scheduler = scheduler
        self._timesteps: torch.Tensor = scheduler.timesteps
        self._index = 0
        accepted = inspect.signature(scheduler.step).parameters
        extra = {"eta": 0.0, "generator": generator}
        self._step_kwargs = {name: value for name, value in extra.items() if name in accepted}

    def __len__(self) -> int:
        return len(self._timesteps)

    @property
    def step(self) -> int:
        """Forwards done."""
        return self._index

    @property
    def done(self) -> bool:
        """Whether the last step was taken."""
        return self._index >= len(self._timesteps)

    @property
    def timestep(self) -> torch.Tensor:
        """The timestep of the next forward, a scalar."""
        return self._timesteps[self._index]

    @property
    def init_noise_sigma(self) -> float | torch.Tensor:
        """What standard normal noise is multiplied by to start with."""
        sigma: float | torch.Tensor = self._scheduler.init_noise_sigma
        return sigma

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents as the denoiser wants them at this timestep."""
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self.timestep)
        return scaled

    def advance(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after one step with the guided prediction."""
        latents = self._scheduler.step(
            prediction, self.timestep, latents, **self._step_kwargs, return_dict=False
        )[0]
        self._index += 1
        return latents


@dataclass
class Sample:
    """A picture in the making. ``conditioning`` holds one row, or two with the negative one first."""

    denoiser: Denoiser
    schedule: Schedule
    latents: torch.Tensor
    conditioning: Mapping[str, torch.Tensor]
    guidance_scale: float

    @property
    def rows(self) -> int:
        """Rows of a forward that this sample takes: two with guidance, one without."""
        return 2 if self.guidance_scale > 1 else 1

    @property
    def bucket(self) -> tuple[int, tuple[int, ...]]:
        """Samples with the same bucket can share a forward: one model, one latent shape."""
        return id(self.denoiser), tuple(self.latents.shape)

    def inputs(self) -> torch.Tensor:
        """The denoiser's input, [rows, c, h, w]."""
        return self.schedule.scaled(self.latents).expand(self.rows, -1, -1, -1)

    def advance(self, prediction: torch.Tensor) -> None:
        """Take one step with the denoiser's output of this sample's rows."""
        if self.rows == 2:
            negative, positive = prediction.chunk(2)
            prediction = negative + self.guidance_scale * (positive - negative)
        self.latents = self.schedule.advance(prediction, self.latents)


def predict_together(samples: Sequence[Sample], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One forward for samples of one bucket and their inputs; their predictions apart again, in order."""
    denoiser = samples[0].denoiser
    counts = [sample.rows for sample in samples]
    together = torch.cat(list(inputs))
    timesteps = torch.stack([sample.schedule.timestep for sample in samples for _ in range(sample.rows)]).to(
        together.device
    )
    conditioning = {
        name: torch.cat([sample.conditioning[name] for sample in samples]) for name in samples[0].conditioning
    }
    return list(denoiser.predict(together, timesteps, conditioning).split(counts))
