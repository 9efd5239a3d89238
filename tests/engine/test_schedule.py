"""What a prediction amounts to: the clean latents, by the timestep alone, for every kind of scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pipelines import SCHEDULERS
from video_pipelines import svd_scheduler

from jubako.engine.schedule import Schedule, make_scheduler
from jubako.schedulers import scheduler_names

STEPS = 10


def noisy(
    config: Any, name: str, *, flow: bool = False, after: int = 3
) -> tuple[Schedule, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A schedule before its fourth step, with latents as noisy as it expects: those, clean ones and noise."""
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule(make_scheduler(config, name, flow), STEPS, generator)
    schedule.leave_out(after)
    clean, noise = torch.randn((2, 1, 4, 8, 8), generator=generator)
    return schedule, schedule.noised(clean, noise), clean, noise


def velocity(schedule: Schedule, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    cleanness = schedule._scheduler.alphas_cumprod[int(schedule.timestep.round())]
    result: torch.Tensor = cleanness**0.5 * noise - (1 - cleanness) ** 0.5 * clean
    return result


@pytest.mark.parametrize("name", [*scheduler_names(), "Euler Karras", "DPM++ 2M Karras", "Heun Exponential"])
def test_the_noise_gives_the_clean_latents(name: str) -> None:
    schedule, latents, clean, noise = noisy(SCHEDULERS["sd1"]().config, name)
    # Between two whole timesteps the schedulers interpolate in ways of their own.
    assert (schedule.estimate(noise, latents) - clean).abs().max() < 0.02
    assert (latents - clean).abs().max() > 0.5


@pytest.mark.parametrize("name", ["DDIM", "Euler", "Euler a", "UniPC", "LMS", "DPM++ 2M", "PLMS"])
def test_the_velocity_gives_the_clean_latents(name: str) -> None:
    schedule, latents, clean, noise = noisy(SCHEDULERS["sd2"]().config, name)
    assert (schedule.estimate(velocity(schedule, clean, noise), latents) - clean).abs().max() < 0.01


def test_a_sample_is_the_clean_latents() -> None:
    schedule, latents, clean, _ = noisy(SCHEDULERS["sdxl-lightning-1step"]().config, "Euler")
    assert torch.equal(schedule.estimate(clean, latents), clean)


@pytest.mark.parametrize("name", scheduler_names(flow=True))
def test_the_flow_gives_the_clean_latents(name: str) -> None:
    schedule, latents, clean, noise = noisy(SCHEDULERS["sd3"]().config, name, flow=True)
    assert (schedule.estimate(noise - clean, latents) - clean).abs().max() < 0.01


@pytest.mark.parametrize("after", [0, 5, STEPS - 1])
def test_continuous_timesteps_give_the_clean_latents(after: int) -> None:
    """Of SVD: from a sigma of 700, of which float32 leaves little, to one of 0.002."""
    generator = torch.Generator().manual_seed(0)
    schedule = Schedule(make_scheduler(svd_scheduler().config, "EulerDiscreteScheduler"), STEPS, generator)
    schedule.leave_out(after)
    clean, noise = torch.randn((2, 1, 5, 4, 8, 8), generator=generator)
    sigma = float(schedule._scheduler.sigmas[after])
    latents = clean + sigma * noise
    predicted = (noise - sigma * clean) / (sigma**2 + 1) ** 0.5
    assert (schedule.estimate(predicted, latents) - clean).abs().max() < 1e-3 * max(sigma, 1)


def test_pure_noise_gives_finite_latents() -> None:
    config = {**SCHEDULERS["sd2"]().config, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for kind in ("v_prediction", "epsilon"):
        schedule, latents, _, noise = noisy({**config, "prediction_type": kind}, "DDIM", after=0)
        assert schedule.estimate(noise, latents).isfinite().all()
