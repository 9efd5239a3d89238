"""What the denoiser is asked to predict, and how far off it is, by what kind of model it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)

from jubako.catalog import Model

__all__ = ["Diffusion", "Flow", "Noised", "Objective", "objective", "squared_errors"]


@dataclass(frozen=True)
class Noised:
    """Latents under noise, [n, c, h, w], at timesteps [n]; what is to be predicted, and each row's weight."""

    inputs: torch.Tensor
    timesteps: torch.Tensor
    target: torch.Tensor
    weights: torch.Tensor


class Objective(Protocol):
    """Turns clean latents into a question."""

    def noised(self, latents: torch.Tensor, generator: torch.Generator) -> Noised:
        """Draw timesteps and noise, on the CPU, for latents on any device."""
        ...


def objective(model: Model, config: Mapping[str, Any], min_snr_gamma: float) -> Objective:
    """The objective of a model whose scheduler has this config."""
    if model.flow:
        return Flow(config)
    return Diffusion(config, velocity=model.prediction_type == "v_prediction", min_snr_gamma=min_snr_gamma)


class Diffusion:
    """Noise or velocity (https://arxiv.org/abs/2202.00512), with Min-SNR weights
    (https://arxiv.org/abs/2303.09556) unless gamma is 0.
    """

    def __init__(self, config: Mapping[str, Any], *, velocity: bool, min_snr_gamma: float) -> None:
        kind = "v_prediction" if velocity else "epsilon"
        self._scheduler = DDPMScheduler.from_config(config, prediction_type=kind)
        self._velocity = velocity
        self._gamma = min_snr_gamma

    def noised(self, latents: torch.Tensor, generator: torch.Generator) -> Noised:
        """Timesteps are drawn evenly."""
        scheduler = self._scheduler
        timesteps = torch.randint(
            scheduler.config.num_train_timesteps, (len(latents),), generator=generator
        ).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        target = scheduler.get_velocity(latents, noise, timesteps) if self._velocity else noise
        inputs = scheduler.add_noise(latents, noise, timesteps)
        return Noised(inputs, timesteps, target, self._weights(timesteps))

    def _weights(self, timesteps: torch.Tensor) -> torch.Tensor:
        if self._gamma == 0:
            return torch.ones(len(timesteps), device=timesteps.device)
        snr: torch.Tensor = compute_snr(self._scheduler, timesteps)
        return snr.clamp(max=self._gamma) / (snr + 1 if self._velocity else snr)


class Flow:
    """The way from the picture to the noise, at times drawn as SD3's authors do (2403.03206, section 3.1)."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)

    def noised(self, latents: torch.Tensor, generator: torch.Generator) -> Noised:
        """Logit-normal times, shifted as the model's scheduler shifts them."""
        scheduler = self._scheduler
        drawn = compute_density_for_timestep_sampling(
            "logit_normal", len(latents), logit_mean=0.0, logit_std=1.0, generator=generator
        )
        indices = (drawn * scheduler.config.num_train_timesteps).long()
        timesteps = scheduler.timesteps[indices].to(latents.device)
        sigmas = scheduler.sigmas[indices].to(latents).view(-1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        inputs = (1 - sigmas) * latents + sigmas * noise
        weights = compute_loss_weighting_for_sd3("logit_normal", sigmas).flatten()
        return Noised(inputs, timesteps, noise - latents, weights)


def squared_errors(prediction: torch.Tensor, noised: Noised) -> torch.Tensor:
    """The weighted mean squared error of each row, [n], in float32."""
    errors = (prediction.float() - noised.target.float()).square().mean(dim=(1, 2, 3))
    return errors * noised.weights
