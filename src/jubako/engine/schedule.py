"""A sample's own walk through its timesteps: the scheduler, where it begins and where it ends.

The arithmetic is that of the stock pipelines' loops, one step of it at a time.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from jubako.schedulers import resolve_scheduler

__all__ = ["Schedule", "make_scheduler"]

# Of pure noise nothing can be told.
_LEAST_CLEAN = 1e-3


def make_scheduler(config: Mapping[str, Any], name: str, flow: bool = False) -> Any:
    """A fresh diffusers scheduler by any of its names: the model's own config under the name's options.

    Schedulers that clip by default were made for pixels; latents are clipped only where the config says so,
    as the stock pipelines see to when they are built. ``flow`` asks for flow matching, where every scheduler
    shifts its sigmas as the model's own does.
    """
    import diffusers

    choice = resolve_scheduler(name, flow)
    scheduler_class = getattr(diffusers, choice.scheduler)
    options = dict(choice.options)
    parameters = inspect.signature(scheduler_class).parameters
    if "clip_sample" in parameters:
        options["clip_sample"] = config.get("clip_sample", False)
    if flow and "flow_shift" in parameters:
        options["flow_shift"] = config.get("shift", 1.0)
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
        self._first = self._index = 0
        accepted = inspect.signature(scheduler.step).parameters
        extra = {"eta": 0.0, "generator": generator}
        self._step_kwargs = {name: value for name, value in extra.items() if name in accepted}

    def __len__(self) -> int:
        return len(self._timesteps) - self._first

    @property
    def step(self) -> int:
        """Forwards done."""
        return self._index - self._first

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
        sigma: float | torch.Tensor = getattr(self._scheduler, "init_noise_sigma", 1.0)
        return sigma

    def leave_out(self, steps: int) -> None:
        """Begin after this many of the steps asked for."""
        self._begin(steps * self._scheduler.order)

    def begin_after(self, share: float) -> None:
        """Begin at the first timestep past this share of the way from noise to picture (SDXL's refiner)."""
        left = int((self._timesteps < self._cutoff(share)).sum())
        # Of a second-order scheduler's pairs of timesteps none is cut in two.
        if self._scheduler.order == 2 and left % 2 == 0:
            left += 1
        self._begin(len(self._timesteps) - left)

    def end_after(self, share: float) -> None:
        """End with the last timestep within this share of the way from noise to picture (SDXL's base)."""
        self._timesteps = self._timesteps[: int((self._timesteps >= self._cutoff(share)).sum())]

    def scaled(self, latents: torch.Tensor) -> torch.Tensor:
        """The latents as the denoiser wants them at this timestep."""
        if not hasattr(self._scheduler, "scale_model_input"):
            return latents
        scaled: torch.Tensor = self._scheduler.scale_model_input(latents, self.timestep)
        return scaled

    def noised(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A picture's latents under as much of this noise as the next step expects.

        The schedulers are asked on the CPU for the two factors: given a GPU's latents, they would move their
        tables there, look the step up there, and wait for it.
        """
        one, zero = torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)
        return self._mixed(one, zero).item() * latents + self._mixed(zero, one).item() * noise

    def _mixed(self, latents: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        timestep = self._timesteps[self._index : self._index + 1]
        mixed: torch.Tensor
        if hasattr(self._scheduler, "scale_noise"):
            mixed = self._scheduler.scale_noise(latents, timestep, noise)
        else:
            mixed = self._scheduler.add_noise(latents, noise, timestep)
        return mixed

    def advance(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The latents after one step with the guided prediction."""
        latents = self._scheduler.step(
            prediction, self.timestep, latents, **self._step_kwargs, return_dict=False
        )[0]
        self._index += 1
        return latents

    def estimate(self, prediction: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """The clean latents that a prediction for these noisy ones amounts to.

        Scaled for the denoiser, the latents of every kind of scheduler are ``a * clean + b * noise`` with
        a² + b² = 1, or a + b = 1 where a flow is predicted; a and b follow from the timestep alone.
        """
        config, scaled = self._scheduler.config, self.scaled(latents)
        kind = config.get("prediction_type", "flow_prediction")
        clean: torch.Tensor
        if kind == "sample":
            clean = prediction
        elif kind == "flow_prediction":
            clean = scaled - float(self.timestep) / config.num_train_timesteps * prediction
        else:
            cleanness = self._cleanness()
            a, b = cleanness**0.5, (1 - cleanness) ** 0.5
            if kind == "v_prediction":
                clean = a * scaled - b * prediction
            else:
                clean = (scaled - b * prediction) / max(a, _LEAST_CLEAN)
        return clean

    def _cleanness(self) -> float:
        """a² at the next forward's timestep; between two whole timesteps, between theirs."""
        timestep = float(self.timestep)
        if self._scheduler.config.get("timestep_type") == "continuous":
            return 1 / (1 + math.exp(8 * timestep))  # the timestep is a quarter of the logarithm of b / a
        known = self._scheduler.alphas_cumprod.numpy()
        return float(np.interp(timestep, np.arange(len(known)), known))

    def _begin(self, index: int) -> None:
        self._first = self._index = index
        # Where the same timestep stands twice, a scheduler can't tell by it where it is.
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(index)

    def _cutoff(self, share: float) -> int:
        trained: int = self._scheduler.config.num_train_timesteps
        return round(trained - share * trained)
