"""Which of its weight sets a model is served from on a machine: a ladder, each refused rung with its reason.

Nothing here reads a file or a device: others tell whether a set's files are here and its graphs admitted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict

from jubako.catalog import Model
from jubako.errors import WeightsUnavailable
from jubako.hardware import CPU_PROVIDER, VENDORS, Gpu, Machine, provider_problem, providers_for
from jubako.weight_sets import GraphSet, Precision, Vendor, WeightsChoice

__all__ = ["Choice", "Rung", "Step", "choose"]

Reasons = Callable[[GraphSet], str | None]

# The steps of the ladder in their order: each costs more to find out than the one before.
Step = Literal["catalog", "provider", "hardware", "shapes", "files", "graphs"]

# What NVIDIA's GPUs have to be for these precisions, and AMD's for float8, whatever a set itself asks.
CAPABILITIES: Mapping[str, float] = {"bfloat16": 8.0, "float8": 8.9}
FLOAT8_ARCHITECTURES = ("gfx942", "gfx950")


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rung(_Value):
    """A weight set that is not served, and why; without a precision it goes for all sets of the vendor."""

    weights: Literal["standard", "nvidia", "amd"]
    precision: Precision | None = None
    step: Step
    reason: str

    def __str__(self) -> str:
        """As in ``nvidia bfloat16: there is no GPU here``."""
        return f"{' '.join(filter(None, (self.weights, self.precision)))}: {self.reason}"


class Choice(_Value):
    """What a model is served from. Standard weights have no graphs and no providers of ONNX Runtime."""

    vendor: Literal["standard", "nvidia", "amd"]
    graphs: GraphSet | None = None
    precision: Precision
    providers: tuple[str, ...] = ()
    rejected: tuple[Rung, ...] = ()


def choose(
    model: Model,
    machine: Machine,
    *,
    weights: WeightsChoice,
    precision: Precision | Literal["auto"],
    provider: str,
    missing: Reasons,
    refused: Reasons,
) -> Choice:
    """The first weight set that passes every step; for ``auto`` the standard weights when none does.

    The machine is as ``Machine.using`` leaves it for the device. ``missing`` tells why a set's files are not
    all on disk, ``refused`` why its graphs are not admitted, each None if they are; both are asked last.
    Raises WeightsUnavailable with all reasons when a vendor or a precision that is set can't be served.
    """
    ladder = _Ladder(model, machine, weights, precision, provider, missing, refused)
    rejected: list[Rung] = []
    for vendor in ladder.vendors():
        if rung := ladder.no_set_of(vendor):
            rejected.append(rung)
            continue
        providers = providers_for(vendor, provider)
        for graphs in model.graph_sets(vendor):
            obstacle = ladder.obstacle(graphs, providers)
            if obstacle is None:
                return Choice(
                    vendor=vendor,
                    graphs=graphs,
                    precision=graphs.precision,
                    providers=providers,
                    rejected=tuple(rejected),
                )
            step, reason = obstacle
            rejected.append(Rung(weights=vendor, precision=graphs.precision, step=step, reason=reason))
    if weights in {"auto", "standard"}:
        served, reason = _standard(model, machine, precision)
        if not reason:
            return Choice(vendor="standard", precision=served, rejected=tuple(rejected))
        rejected.append(Rung(weights="standard", precision=served, step="hardware", reason=reason))
    raise WeightsUnavailable(ladder.told(rejected), param="model")


@dataclass(frozen=True)
class _Ladder:
    """What is asked for, and of what."""

    model: Model
    machine: Machine
    weights: WeightsChoice
    precision: Precision | Literal["auto"]
    provider: str
    missing: Reasons
    refused: Reasons

    def vendors(self) -> tuple[Vendor, ...]:
        if self.weights == "auto":
            return VENDORS
        return () if self.weights == "standard" else (self.weights,)

    def no_set_of(self, vendor: Vendor) -> Rung | None:
        """Why none of a vendor's sets can be served: there is none, or nothing here runs its graphs."""
        sets = self.model.graph_sets(vendor)
        step: Step = "catalog"
        if not sets:
            return Rung(weights=vendor, step=step, reason=self.model.absence(vendor))
        if not any(map(self.is_wanted, sets)):
            reason = f"they are {' and '.join(graphs.precision for graphs in sets)}, not {self.precision}"
            return Rung(weights=vendor, step=step, reason=reason)
        step = "provider"
        if self.weights == "auto" and self.provider == "cpu":
            reason = (
                "JUBAKO_EXECUTION_PROVIDER is cpu, where graphs run only if JUBAKO_WEIGHTS names the vendor"
            )
            return Rung(weights=vendor, step=step, reason=reason)
        if problem := provider_problem(self.machine, vendor, self.provider):
            return Rung(weights=vendor, step=step, reason=problem)
        return None

    def is_wanted(self, graphs: GraphSet) -> bool:
        return self.precision in {"auto", graphs.precision}

    def obstacle(self, graphs: GraphSet, providers: tuple[str, ...]) -> tuple[Step, str] | None:
        """The first step that a set does not pass, and why."""
        if not self.is_wanted(graphs):
            return "catalog", f"{self.precision} is asked for"
        if providers != (CPU_PROVIDER,) and (reason := _beyond(self.machine.gpus[0], graphs)):
            return "hardware", reason
        width, height = self.model.defaults.width, self.model.defaults.height
        if not graphs.profile.allows(width, height):
            return "shapes", f"its engines take no pictures of {width}x{height}, the model's default"
        if reason := self.missing(graphs):
            return "files", reason
        if reason := self.refused(graphs):
            return "graphs", reason
        return None

    def told(self, rejected: Sequence[Rung]) -> str:
        """All reasons, for whoever set what can't be served."""
        wanted = f"{self.weights} weights" if self.weights != "auto" else "any weights"
        precision = f" in {self.precision}" if self.precision != "auto" else ""
        reasons = "; ".join(map(str, rejected))
        return f"model: {self.model.name} can't be served from {wanted}{precision} here: {reasons}"


def _beyond(gpu: Gpu, graphs: GraphSet) -> str | None:
    """What of a set the GPU is not up to."""
    needs = graphs.hardware
    if reason := _too_old(gpu, graphs.precision, needs.compute_capability):
        return reason
    if needs.architectures and gpu.architecture not in needs.architectures:
        return f"made for {', '.join(needs.architectures)}; {gpu.name} is {gpu.architecture}"
    if needs.memory_gb is not None and gpu.free < needs.memory_gb * 1e9:
        return f"needs {needs.memory_gb:g} GB of memory; {gpu.name} has {gpu.free / 1e9:.1f} GB free"
    return None


def _too_old(gpu: Gpu, precision: Precision, stated: float | None = None) -> str | None:
    """Why a GPU does not compute in a precision."""
    if gpu.vendor == "amd":
        if precision == "float8" and gpu.architecture not in FLOAT8_ARCHITECTURES:
            return f"float8 is for {', '.join(FLOAT8_ARCHITECTURES)}; {gpu.name} is {gpu.architecture}"
        return None
    least = max(stated or 0.0, CAPABILITIES.get(precision, 0.0))
    has = gpu.compute_capability or 0.0
    return f"needs compute capability {least}; {gpu.name} has {has}" if has < least else None


def _standard(
    model: Model, machine: Machine, precision: Precision | Literal["auto"]
) -> tuple[Precision, str]:
    """In which precision PyTorch runs the standard weights, and why it can't if it can't.

    Those of half precision run on every GPU, be it slowly.
    """
    if precision == "auto":
        return (model.weights.dtype if machine.vendor else "float32"), ""
    if precision == "mixed":
        return precision, "mixed is a precision of graphs: take float16"
    if precision == "float8":
        if not machine.gpus:
            return precision, f"float8 wants a GPU: {machine.unused}"
        return precision, _too_old(machine.gpus[0], precision) or ""
    return precision, ""
