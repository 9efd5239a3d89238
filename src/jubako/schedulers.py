"""Names of schedulers: what people call them, the diffusers class and the options behind each name.

Data only; :mod:`jubako.engine.samples` makes the instances. A name is a sampler's name in AUTOMATIC1111's
spelling, one of its aliases (ComfyUI, k-diffusion) or the diffusers class name, optionally followed by a
schedule: ``DPM++ 2M Karras``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from jubako.errors import InvalidRequest, nearest

__all__ = [
    "SAMPLERS",
    "SCHEDULES",
    "Flow",
    "Sampler",
    "SchedulerChoice",
    "resolve_scheduler",
    "scheduler_names",
]


@dataclass(frozen=True)
class Flow:
    """A sampler's diffusers class, options and schedules for models that predict a flow (SD3)."""

    scheduler: str
    options: Mapping[str, object] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampler:
    """One way to step: its name, the diffusers class, fixed options and the schedules that it takes.

    ``flow`` is the same for flow matching; None where diffusers has no such scheduler.
    """

    name: str
    scheduler: str
    aliases: tuple[str, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    schedules: tuple[str, ...] = ()
    flow: Flow | None = None

    def for_flow(self) -> Sampler | None:
        """This sampler as flow-matching models take it."""
        flow = self.flow
        if flow is None:
            return None
        return replace(
            self, scheduler=flow.scheduler, options=flow.options, schedules=flow.schedules, flow=None
        )


@dataclass(frozen=True)
class SchedulerChoice:
    """What a name stands for: a diffusers class and the options that override the model's own config."""

    name: str
    sampler: str
    schedule: str
    scheduler: str
    options: Mapping[str, object]


SCHEDULES: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "Karras": {"use_karras_sigmas": True},
        "Exponential": {"use_exponential_sigmas": True},
        "Beta": {"use_beta_sigmas": True},
        "SGM Uniform": {"timestep_spacing": "trailing"},
        "Simple": {"timestep_spacing": "trailing"},
        "Automatic": {},
    }
)
_SIGMAS = ("Karras", "Exponential", "Beta")
_SPACED = ("SGM Uniform", "Simple", "Automatic")
_ALL = (*_SIGMAS, *_SPACED)
_FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}

SAMPLERS: tuple[Sampler, ...] = (
    Sampler(
        "Euler",
        "EulerDiscreteScheduler",
        ("k_euler",),
        schedules=_ALL,
        flow=Flow("FlowMatchEulerDiscreteScheduler", schedules=(*_SIGMAS, "Automatic")),
    ),
    Sampler(
        "Euler a",
        "EulerAncestralDiscreteScheduler",
        ("k_euler_a", "k_euler_ancestral", "euler_ancestral"),
        schedules=_SPACED,
    ),
    Sampler(
        "Heun",
        "HeunDiscreteScheduler",
        ("k_heun",),
        schedules=_ALL,
        flow=Flow("FlowMatchHeunDiscreteScheduler", schedules=("Automatic",)),
    ),
    Sampler("LMS", "LMSDiscreteScheduler", ("k_lms",), schedules=_ALL),
    Sampler("DPM2", "KDPM2DiscreteScheduler", ("k_dpm_2", "dpm_2"), schedules=_ALL),
    Sampler(
        "DPM2 a",
        "KDPM2AncestralDiscreteScheduler",
        ("k_dpm_2_a", "dpm_2_ancestral", "k_dpm_2_ancestral"),
        schedules=_ALL,
    ),
    Sampler(
        "DPM++ 2M",
        "DPMSolverMultistepScheduler",
        ("k_dpmpp_2m", "dpmpp_2m"),
        {"algorithm_type": "dpmsolver++"},
        schedules=_ALL,
        flow=Flow("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", **_FLOW}, ("Automatic",)),
    ),
    Sampler(
        "DPM++ 2M SDE",
        "DPMSolverMultistepScheduler",
        ("k_dpmpp_2m_sde", "dpmpp_2m_sde"),
        {"algorithm_type": "sde-dpmsolver++"},
        schedules=_ALL,
    ),
    Sampler(
        "DPM++ SDE",
        "DPMSolverSinglestepScheduler",
        ("k_dpmpp_sde", "dpmpp_sde"),
        {"algorithm_type": "dpmsolver++"},
        schedules=(*_SIGMAS, "Automatic"),
    ),
    Sampler(
        "UniPC",
        "UniPCMultistepScheduler",
        ("uni_pc",),
        schedules=_ALL,
        flow=Flow("UniPCMultistepScheduler", _FLOW, ("Automatic",)),
    ),
    Sampler("DEIS", "DEISMultistepScheduler", (), schedules=_ALL),
    Sampler("DDIM", "DDIMScheduler", (), schedules=_SPACED),
    Sampler("PLMS", "PNDMScheduler", ("pndm",), schedules=_SPACED),
    Sampler("LCM", "LCMScheduler", (), schedules=_SPACED),
)


def _key(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _samplers(flow: bool | None) -> tuple[Sampler, ...]:
    """Those for flow matching, those for other predictions, or, for None, both with the latter first."""
    flowing = tuple(found for sampler in SAMPLERS if (found := sampler.for_flow()))
    return {True: flowing, False: SAMPLERS, None: (*SAMPLERS, *flowing)}[flow]


def scheduler_names(flow: bool = False) -> tuple[str, ...]:
    """The samplers' names, in the order in which they are shown; ``flow`` asks for flow matching."""
    return tuple(sampler.name for sampler in _samplers(flow))


def _find_sampler(key: str, samplers: tuple[Sampler, ...]) -> Sampler | None:
    for sampler in samplers:
        class_name = sampler.scheduler.lower()
        names = (sampler.name, *sampler.aliases, class_name, class_name.removesuffix("scheduler"))
        if key in {_key(name) for name in names}:
            return sampler
    return None


def resolve_scheduler(name: str, flow: bool | None = None) -> SchedulerChoice:
    """The class and options behind a name; an unknown name or pair raises InvalidRequest with the choices.

    ``flow`` says whether the model predicts a flow; None takes names of either kind.
    """
    key, samplers = _key(name), _samplers(flow)
    if sampler := _find_sampler(key, samplers):
        # A class name alone means the model's own options, as `from_config` of that class would give.
        bare = key.removesuffix("scheduler") == sampler.scheduler.lower().removesuffix("scheduler")
        label = sampler.scheduler if bare else sampler.name
        options = {} if bare and not flow else dict(sampler.options)
        return SchedulerChoice(label, sampler.name, "Automatic", sampler.scheduler, options)
    for schedule, extra in SCHEDULES.items():
        sampler = _find_sampler(key.removesuffix(" " + schedule.lower()), samplers)
        if sampler is None:
            continue
        if schedule not in sampler.schedules:
            takes = ", ".join(sampler.schedules)
            raise InvalidRequest(
                f"scheduler: {sampler.name!r} does not take the schedule {schedule!r}; it takes: {takes}",
                param="scheduler",
            )
        return SchedulerChoice(
            f"{sampler.name} {schedule}",
            sampler.name,
            schedule,
            sampler.scheduler,
            {**sampler.options, **extra},
        )
    known = tuple(dict.fromkeys(sampler.name for sampler in samplers))
    kind = " for flow matching" if flow else ""
    raise InvalidRequest(
        f"scheduler: unknown scheduler {name!r}{kind}.{nearest(name, known)} Known: {', '.join(known)}; with "
        f"a schedule behind it: {', '.join(SCHEDULES)}; or the name of the diffusers class",
        param="scheduler",
    )
