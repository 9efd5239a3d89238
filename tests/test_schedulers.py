"""The names of schedulers and what stands behind them."""

from __future__ import annotations

import inspect

import diffusers
import pytest

from jubako.errors import InvalidRequest
from jubako.schedulers import SAMPLERS, SCHEDULES, Sampler, resolve_scheduler


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_every_option_is_a_parameter_of_its_diffusers_class(sampler: Sampler) -> None:
    parameters = inspect.signature(getattr(diffusers, sampler.scheduler)).parameters
    options = set(sampler.options).union(*(SCHEDULES[schedule] for schedule in sampler.schedules))
    assert options <= set(parameters)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda sampler: sampler.name)
def test_every_alias_and_class_name_means_its_sampler(sampler: Sampler) -> None:
    class_names = (sampler.scheduler, sampler.scheduler.removesuffix("Scheduler"))
    for name in (sampler.name, sampler.name.upper(), *sampler.aliases):
        assert resolve_scheduler(name).sampler == sampler.name
    for name in class_names:
        assert resolve_scheduler(name).scheduler == sampler.scheduler


@pytest.mark.parametrize(
    ("name", "scheduler", "options"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("k_euler_a", "EulerAncestralDiscreteScheduler", {}),
        (
            "DPM++ 2M Karras",
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True},
        ),
        ("dpmpp_2m_sde karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("Euler SGM Uniform", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("DPMSolverMultistepScheduler", "DPMSolverMultistepScheduler", {}),
    ],
)
def test_names_that_people_use_resolve(name: str, scheduler: str, options: dict[str, object]) -> None:
    choice = resolve_scheduler(name)
    assert choice.scheduler == scheduler
    assert options.items() <= choice.options.items()


def test_a_resolved_name_resolves_to_itself() -> None:
    for sampler in SAMPLERS:
        for name in (sampler.name, *(f"{sampler.name} {schedule}" for schedule in sampler.schedules)):
            choice = resolve_scheduler(name)
            assert resolve_scheduler(choice.name) == choice


def test_an_unknown_scheduler_is_refused_with_the_nearest_and_all_names() -> None:
    with pytest.raises(InvalidRequest, match=r"'Euler b'.*Did you mean 'Euler.*DPM\+\+ 2M") as caught:
        resolve_scheduler("Euler b")
    assert caught.value.param == "scheduler"


def test_a_schedule_that_a_sampler_can_not_take_is_refused_with_those_it_takes() -> None:
    with pytest.raises(InvalidRequest, match="'Euler a' does not take the schedule 'Karras'; it takes: SGM"):
        resolve_scheduler("Euler a Karras")
