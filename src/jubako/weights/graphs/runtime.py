"""How a chosen weight set is run: its files, its providers, and what opens its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from jubako.catalog import Model
from jubako.errors import UnusableWeights
from jubako.weight_sets import GraphSet, Slot, Vendor
from jubako.weights.engines import EngineStore
from jubako.weights.graphs.adapter import Adapter
from jubako.weights.graphs.admission import Admission, Provider, admit
from jubako.weights.graphs.compiled import CompiledGraph, EnginePlan
from jubako.weights.graphs.graph import read_graph
from jubako.weights.graphs.rewrite import rewritten
from jubako.weights.graphs.session import OrtGraph, RunningGraph
from jubako.weights.parts import config_of

__all__ = ["GraphRuntime"]

PROVIDERS: Mapping[str, Provider] = {
    "CPUExecutionProvider": "cpu",
    "CUDAExecutionProvider": "cuda",
    "TensorrtExecutionProvider": "tensorrt",
    "MIGraphXExecutionProvider": "migraphx",
}


@dataclass(frozen=True)
class GraphRuntime:
    """A weight set of a vendor's on this machine.

    ``folder`` has its files, ``base`` configs, tokenizers and the modules that it leaves to PyTorch; below
    ``home`` lies what is made of its graphs, of which engines take ``engine_bytes`` at most.
    """

    model: Model
    vendor: Vendor
    graphs: GraphSet
    folder: Path
    base: Path
    providers: tuple[str, ...]
    device: torch.device
    home: Path
    engine_bytes: int

    @property
    def provider(self) -> Provider:
        """The provider that is meant to run them, in a word."""
        return PROVIDERS[self.providers[0]]

    def file(self, slot: Slot) -> Path:
        """Where a graph lies; UnusableWeights when it is nowhere that it may be."""
        files = [self.folder / name for name in self.graphs.files(slot)]
        if found := next((file for file in files if file.is_file()), None):
            return found
        raise UnusableWeights(f"the graph of the {slot} is missing: {' or '.join(map(str, files))}")

    def admitted(self, slot: Slot) -> Admission:
        """A graph's ports and remedy; UnusableWeights says why it can't be served."""
        return admit(read_graph(self.file(slot)), slot, self.graphs.layout, self.provider)

    def opened(self, admission: Admission) -> Adapter:
        """The graph in memory, rewritten before where it must be."""
        if admission.remedy is not None:
            graph = rewritten(admission.graph, admission.remedy, self.home / "graphs")
            admission = admit(graph, admission.slot, self.graphs.layout, self.provider)
        return Adapter(self._run(admission), admission, self.graphs.profile if self._compiles else None)

    @property
    def _compiles(self) -> bool:
        """Whether graphs are compiled for certain shapes, to which the batcher's rows are padded."""
        return self.provider in {"tensorrt", "migraphx"}

    def _run(self, admission: Admission) -> RunningGraph:
        if not self._compiles:
            return OrtGraph(admission.graph.file, self.providers, self.device)
        defaults = self.model.defaults
        plan = EnginePlan(
            model=self.model.name,
            profile=self.graphs.profile,
            precision=self.graphs.precision,
            size=(defaults.width, defaults.height),
            latent_factor=_latent_factor(self.base),
            frames=defaults.clip.num_frames if defaults.clip else 1,
        )
        return CompiledGraph(
            admission,
            plan,
            self.providers,
            self.device,
            EngineStore(self.home / "engines", self.engine_bytes),
        )


def _latent_factor(base: Path) -> int:
    """Pixels that a latent has along a side, of the autoencoder's config."""
    levels: int = len(config_of(base / "vae").get("block_out_channels", (1, 1, 1, 1)))
    return 1 << (levels - 1)
