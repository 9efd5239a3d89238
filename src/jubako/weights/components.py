"""Modules in memory, shared by content: what two models have in common is loaded once, freed with the last.

A shared module is used by several pipelines at the same time. Whoever casts, moves or patches it does so for
all of them, so nobody may: a pipeline that needs another form of a component gets its own from here, under a
key of its own.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from jubako.catalog import Model
from jubako.weights.graphs.proxies import GraphModule
from jubako.weights.graphs.runtime import GraphRuntime
from jubako.weights.parts import Finish, Part, construction
from jubako.weights.recipe import recipe

__all__ = ["Assembly", "ComponentStore"]

OnProgress = Callable[[float], None]


@dataclass(frozen=True, eq=False)
class Assembly:
    """One model's pipeline and what it holds in the store: each component's name with its key there.

    The memory of a component is free when no assembly holds it and nobody has kept the pipelines either.
    """

    pipeline: Any
    parts: Mapping[str, Hashable]


@dataclass
class _Held:
    module: torch.nn.Module
    bytes: int
    users: int


class ComponentStore:
    """The modules of one process. ``load`` and ``release`` belong to one thread, the sizes to any.

    ``models`` are those of the family, from which a single file may borrow its configs.
    """

    def __init__(self, models: Mapping[str, Model] = MappingProxyType({})) -> None:
        self._models = models
        self._held: dict[Hashable, _Held] = {}
        self._assemblies: set[Assembly] = set()
        self._lock = threading.Lock()

    def load(
        self,
        model: Model,
        home: Path,
        device: torch.device,
        dtype: torch.dtype,
        on_progress: OnProgress | None = None,
        *,
        runtime: GraphRuntime | None = None,
        finish: Finish | None = None,
    ) -> Assembly:
        """The model's pipeline on the device, in evaluation mode; what is in memory already is shared.

        ``on_progress`` hears the share of bytes in memory, from 0 to 1. A failure leaves the store as it was:
        ModelNotOnDisk or UnusableWeights where the files are the cause.
        """
        tell = on_progress or (lambda _: None)
        plan = recipe(model, self._models, home, device, dtype, runtime=runtime, finish=finish)
        total, done = sum(part.bytes for part in plan.parts) or 1, 0
        tell(0.0)
        modules: dict[str, torch.nn.Module] = {}
        keys: dict[str, Hashable] = {}
        try:
            for part in plan.parts:
                key = part.key
                modules[part.name] = self._take(key, part)
                keys[part.name] = key
                done += part.bytes
                tell(done / total)
            assembly = Assembly(plan.pipeline(modules), MappingProxyType(keys))
        except BaseException:
            self._drop(keys)
            raise
        with self._lock:
            self._assemblies.add(assembly)
        return assembly

    def release(self, assembly: Assembly) -> None:
        """Drop what the assembly holds; a component without users is forgotten. Twice is as good as once."""
        with self._lock:
            if assembly not in self._assemblies:
                return
            self._assemblies.remove(assembly)
        self._drop(assembly.parts)

    @property
    def bytes(self) -> int:
        """Memory of all components, each counted once."""
        with self._lock:
            return sum(held.bytes for held in self._held.values())

    def bytes_of(self, assembly: Assembly) -> int:
        """Memory of the assembly's components, shared ones included."""
        with self._lock:
            return sum(self._held[key].bytes for key in set(assembly.parts.values()) if key in self._held)

    def bytes_freed_by(self, assembly: Assembly) -> int:
        """Memory that releasing the assembly would free now: that of components which nobody else uses."""
        with self._lock:
            if assembly not in self._assemblies:
                return 0
            own = Counter(assembly.parts.values())
            return sum(self._held[key].bytes for key, uses in own.items() if self._held[key].users == uses)

    def _take(self, key: Hashable, part: Part) -> torch.nn.Module:
        with self._lock:
            if held := self._held.get(key):
                held.users += 1
                return held.module
        with construction:
            module = part.read()
        with self._lock:
            self._held[key] = _Held(module, _memory(module), 1)
        return module

    def _drop(self, parts: Mapping[str, Hashable]) -> None:
        with self._lock:
            for key in parts.values():
                self._held[key].users -= 1
                if self._held[key].users == 0:
                    del self._held[key]


def _memory(module: torch.nn.Module) -> int:
    """Parameters and buffers, of which one with two names counts once, and what graphs take."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*module.parameters(), *module.buffers())}
    graphs = module.graph_bytes if isinstance(module, GraphModule) else 0
    return graphs + sum(tensor.nbytes for tensor in tensors.values())
