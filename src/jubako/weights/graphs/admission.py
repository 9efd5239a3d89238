"""Whether a graph can be served here, asked before its gigabytes are read; the answer names every reason."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from jubako.errors import UnusableWeights
from jubako.weight_sets import Slot, Vendor
from jubako.weights.graphs.contract import RESIDUAL, Contract, contract
from jubako.weights.graphs.graph import Graph, Port

__all__ = ["Admission", "Remedy", "admit", "lacking"]

Provider = Literal["cpu", "cuda", "tensorrt", "migraphx"]
Remedy = Literal["float32", "opset22"]

_DOMAINS = {"ai.onnx", "ai.onnx.ml", "com.microsoft", "trt"}
# Fused operators of ONNX Runtime's own domain that a provider has no kernel for.
_LACKING: Mapping[Provider, frozenset[str]] = {
    "cpu": frozenset({"GroupNorm", "NhwcConv", "BiasSplitGelu", "BiasAdd"}),
    "migraphx": frozenset({"BiasSplitGelu", "BiasAdd"}),
}


@dataclass(frozen=True)
class Admission:
    """A graph that can be served: what its inputs and outputs are, and what must be done to it before.

    ``inputs`` and ``outputs`` map our names to the graph's ports. ``remedy`` rewrites bfloat16.
    """

    graph: Graph
    slot: Slot
    inputs: Mapping[str, Port]
    outputs: Mapping[str, Port]
    remedy: Remedy | None


def admit(graph: Graph, slot: Slot, layout: Vendor, provider: Provider) -> Admission:
    """The graph's ports under our names; UnusableWeights lists all reasons against it."""
    agreed = contract(layout, slot)
    reasons = [
        *_against_operators(graph, provider),
        *_against_inputs(graph, agreed),
        *_against_outputs(graph, agreed),
        *_against_data(graph),
    ]
    if reasons:
        raise UnusableWeights(f"{graph.file} can't be served: {'; '.join(reasons)}")
    inputs = {agreed.names[port.name]: port for port in graph.inputs}
    outputs = {name: port for port in graph.outputs if (name := agreed.output(port.name, port.rank))}
    return Admission(
        graph, slot, MappingProxyType(inputs), MappingProxyType(outputs), _remedy(graph, provider)
    )


def lacking(admission: Admission, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Which of the outputs that a pipeline reads the graph does not have."""
    had = set(admission.outputs)
    if sum(name.startswith("hidden_states.") for name in had) > 1:
        had.add("penultimate")
    return tuple(name for name in wanted if name not in had)


def _remedy(graph: Graph, provider: Provider) -> Remedy | None:
    if not graph.has_bfloat16:
        return None
    if provider == "cpu":
        return "float32"
    return "opset22" if graph.untyped else None


def _against_operators(graph: Graph, provider: Provider) -> Iterator[str]:
    import onnx

    if unknown := sorted(set(graph.domains) - _DOMAINS):
        yield f"it has operators of {', '.join(unknown)}, which ONNX Runtime does not know"
    if graph.opset > (newest := onnx.defs.onnx_opset_version()):
        yield f"its operator set is {graph.opset}, and {newest} is the newest known here"
    fused = {name for domain, name in graph.operators if domain == "com.microsoft"}
    if without := sorted(fused & _LACKING.get(provider, frozenset())):
        yield f"ONNX Runtime has no {', '.join(without)} for {provider}, which the graph was fused to"


def _against_inputs(graph: Graph, agreed: Contract) -> Iterator[str]:
    for port in graph.inputs:
        ours = agreed.names.get(port.name)
        if ours is None:
            yield f"nothing is known to give to its input {port}"
            continue
        wanted = agreed.inputs[ours]
        if port.dtype not in wanted.dtypes:
            yield f"its input {port} should be {' or '.join(sorted(wanted.dtypes))}"
        if port.rank not in wanted.ranks:
            yield f"its input {port} should have {' or '.join(map(str, wanted.ranks))} dims"
        if (
            ours == RESIDUAL
            and port.rank == 4
            and not (isinstance(port.dims[0], int) and isinstance(port.dims[3], int))
        ):
            yield f"how many layers its input {port} has, and how wide they are, is not told"
    had = {agreed.names.get(port.name) for port in graph.inputs}
    for name, wanted in agreed.inputs.items():
        if name not in had and not wanted.optional:
            yield f"it has no input for {name}"


def _against_outputs(graph: Graph, agreed: Contract) -> Iterator[str]:
    if not any(agreed.output(port.name, port.rank) for port in graph.outputs):
        known = ", ".join(pattern for pattern, _, _ in agreed.outputs)
        yield f"of its outputs {', '.join(map(str, graph.outputs))} none is {known}"


def _against_data(graph: Graph) -> Iterator[str]:
    for each in graph.data:
        try:
            each.path(graph.file.parent)
        except UnusableWeights as error:
            yield str(error)
