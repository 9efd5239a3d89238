"""A graph that TensorRT or MIGraphX compiles: its engine is built once for this GPU and read ever after.

Never run on a GPU. Engines are built for the shapes of the set's profile, so that no request can make a
provider compile in traffic.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch

from jubako.hardware import MIGRAPHX, TENSORRT
from jubako.probe import drivers
from jubako.weight_sets import Precision, Profile
from jubako.weights.engines import (
    EngineKey,
    EngineStore,
    migraphx_environment,
    migraphx_options,
    profile_shapes,
    tensorrt_options,
)
from jubako.weights.graphs.admission import Admission
from jubako.weights.graphs.session import TORCH_DTYPES, OrtGraph

__all__ = ["CompiledGraph", "EnginePlan"]

_RUNTIMES = {TENSORRT: ("tensorrt-cu13-libs", "tensorrt-cu13", "tensorrt"), MIGRAPHX: ("migraphx",)}
_ONNXRUNTIMES = ("onnxruntime-gpu", "onnxruntime-migraphx", "onnxruntime")
# A request with guidance, which most are.
_ROWS = 2


@dataclass(frozen=True)
class EnginePlan:
    """What engines of a model are built for: its set's profile, and the size and frames of its defaults."""

    model: str
    profile: Profile
    precision: Precision
    size: tuple[int, int]
    latent_factor: int
    frames: int


class CompiledGraph:
    """A :class:`RunningGraph` over an engine in the store."""

    def __init__(
        self,
        admission: Admission,
        plan: EnginePlan,
        providers: tuple[str, ...],
        device: torch.device,
        store: EngineStore,
    ) -> None:
        self._admission, self._plan = admission, plan
        self._providers, self._device = providers, device
        self._shapes = profile_shapes(
            {port.name: port.dims for port in admission.graph.inputs},
            plan.profile,
            size=plan.size,
            rows=_ROWS,
            latent_factor=1 if admission.slot == "vae_encoder" else plan.latent_factor,
            fixed={"frames": plan.frames, "tokens": 77},
        )
        # Kept whole: without it the store may take the engine away.
        self._engine = store.session(self._key(), self._made, model=plan.model, slot=admission.slot)

    def __call__(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The graph's outputs for inputs of the engine's shapes."""
        return self._engine.session(inputs)

    def _made(self, directory: Path) -> OrtGraph:
        """The session over a directory, run once for each shape, after which all its engines are written."""
        options = {
            TENSORRT: tensorrt_options(directory, self._shapes, self._plan.precision),
            MIGRAPHX: migraphx_options(directory),
        }
        os.environ.update(migraphx_environment(directory))
        graph = OrtGraph(self._admission.graph.file, self._providers, self._device, options)
        with torch.inference_mode():
            for shapes in self._to_warm():
                graph(self._examples(shapes))
        return graph

    def _to_warm(self) -> Iterator[Mapping[str, tuple[int, ...]]]:
        """TensorRT's engines span a range; MIGraphX has one for each number of rows."""
        if self._providers[0] == TENSORRT:
            yield {name: each.best for name, each in self._shapes.items()}
            return
        for rows in self._plan.profile.rows:
            yield {name: (rows, *each.best[1:]) for name, each in self._shapes.items()}

    def _examples(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        return {
            port.name: torch.zeros(
                shapes.get(port.name, tuple(dim for dim in port.dims if isinstance(dim, int))),
                dtype=TORCH_DTYPES[port.dtype],
                device=self._device,
            )
            for port in self._admission.graph.inputs
        }

    def _key(self) -> EngineKey:
        graph, *data = self._admission.graph.key
        properties = torch.cuda.get_device_properties(self._device)
        on_amd = torch.version.hip is not None
        toolkit = (torch.version.hip or torch.version.cuda or "").partition(".")[0]
        return EngineKey(
            graph=graph,
            data=tuple(data),
            onnxruntime=_version(*_ONNXRUNTIMES),
            provider=self._providers[0],
            provider_version=_version(*_RUNTIMES.get(self._providers[0], ())),
            gpu=properties.name,
            architecture=properties.gcnArchName if on_amd else f"sm_{properties.major}{properties.minor}",
            driver=drivers().get("amd" if on_amd else "nvidia", ""),
            toolkit=toolkit,
            shapes=self._shapes,
            options={"precision": self._plan.precision, "rows": ",".join(map(str, self._plan.profile.rows))},
            system=platform.platform(terse=True) + f" {platform.machine()}",
        )


def _version(*distributions: str) -> str:
    """The version of the first of these packages that is installed."""
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return "of the system"
