"""The student's jumps: an Euler step with the velocity asked of it ends where it should."""

from __future__ import annotations

import pytest
import torch
from diffusers import EulerDiscreteScheduler

from jubako.miniatures.distillation import STEPS, Jumps
from jubako.miniatures.sdxl import new_scheduler


@pytest.mark.parametrize("number", range(STEPS))
def test_velocity_leads_from_each_point_to_the_next(number: int) -> None:
    scheduler = new_scheduler()
    jumps = Jumps.of(scheduler)
    here, there = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    euler = EulerDiscreteScheduler.from_config(scheduler.config)
    euler.set_timesteps(STEPS)
    euler.set_begin_index(number)
    sample = here * (1 + jumps.sigmas[number] ** 2).sqrt()
    time = euler.timesteps[number]
    assert torch.allclose(euler.scale_model_input(sample, time), here, atol=1e-5)
    velocity = jumps.velocity(here, there, torch.tensor([number]))
    reached = euler.step(velocity, time, sample).prev_sample
    assert torch.allclose(reached / (1 + jumps.sigmas[number + 1] ** 2).sqrt(), there, atol=1e-4)


def test_student_is_asked_at_the_times_of_four_trailing_steps() -> None:
    assert Jumps.of(new_scheduler()).timesteps.tolist() == [999, 749, 499, 249]
