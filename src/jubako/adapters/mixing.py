"""Adapters of some rows of a forward, beside rows that have others or none: low-rank deltas, row by row.

The base module is never changed. While a forward runs, hooks on its layers add to each row what its own
adapters make of the layer's input, as servers of many adapters do for language models
(https://arxiv.org/abs/2310.18547, https://arxiv.org/abs/2311.03285), here for linear layers and convolutions.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch

from jubako.adapters.deltas import AdapterSet, Deltas, deltas_of
from jubako.adapters.lora import Lora

__all__ = ["Mixer"]

# A turn of the batcher has the rows of the one before, until a sample joins or leaves.
MIXTURES_KEPT = 8

# What a fused projection (families/fused.py) stands for, in its order.
_FUSED = {
    "to_q": ("to_qkv", 0),
    "to_k": ("to_qkv", 1),
    "to_v": ("to_qkv", 2),
    "add_q_proj": ("to_added_qkv", 0),
    "add_k_proj": ("to_added_qkv", 1),
    "add_v_proj": ("to_added_qkv", 2),
}
_FUSED_ACROSS = {"to_k": ("to_kv", 0), "to_v": ("to_kv", 1)}

Rows = tuple[AdapterSet, ...]


class Mixer:
    """One module and its rows' adapters. Belongs to one thread at a time, that of the module's forwards."""

    def __init__(self, module: torch.nn.Module, component: str) -> None:
        self._module = module
        self._component = component
        self._hooks: dict[str, Any] = {}
        self._mixtures: OrderedDict[Rows, dict[str, Deltas]] = OrderedDict()
        self._now: dict[str, Deltas] = {}
        self._dropped: deque[Lora] = deque()

    @contextmanager
    def rows(self, sets: Sequence[AdapterSet]) -> Iterator[None]:
        """The adapters of each row of the forwards within, in the rows' order."""
        while self._dropped:
            self._forget(self._dropped.popleft())
        if not any(sets):
            yield
            return
        self._now = self._mixture(tuple(sets))
        try:
            with self._uncompiled():
                yield
        finally:
            self._now = {}

    def _uncompiled(self) -> AbstractContextManager[Any]:
        """Compiled code does not see hooks; without any there is no compiler to be told."""
        if all(part._compiled_call_impl is None for part in self._module.modules()):  # noqa: SLF001 # no other way
            return nullcontext()
        stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
        return stance

    def forget(self, lora: Lora) -> None:
        """Let what was prepared with an adapter go, before the next forwards. Any thread may ask for it."""
        self._dropped.append(lora)

    def _forget(self, lora: Lora) -> None:
        for rows in [rows for rows in self._mixtures if any(each is lora for row in rows for each, _ in row)]:
            del self._mixtures[rows]
        if not self._mixtures:
            for hook in self._hooks.values():
                hook.remove()
            self._hooks.clear()

    def _mixture(self, rows: Rows) -> dict[str, Deltas]:
        if (found := self._mixtures.get(rows)) is None:
            found = self._mixtures[rows] = deltas_of(rows, self._component)
            if len(self._mixtures) > MIXTURES_KEPT:
                self._mixtures.popitem(last=False)
            for path in found.keys() - self._hooks.keys():
                self._hooks[path] = self._hooked(path)
        self._mixtures.move_to_end(rows)
        return found

    def _hooked(self, path: str) -> Any:
        layer, columns = _layer(self._module, path)
        return layer.register_forward_hook(partial(self._added, path, columns))

    def _added(
        self,
        path: str,
        columns: slice | None,
        layer: torch.nn.Module,
        inputs: tuple[torch.Tensor, ...],
        output: torch.Tensor,
    ) -> torch.Tensor | None:
        deltas = self._now.get(path)
        return None if deltas is None else deltas.added(layer, inputs[0], output, columns)


def _layer(module: torch.nn.Module, path: str) -> tuple[torch.nn.Module, slice | None]:
    """The layer of a path; of a fused one also the columns of its output that the path stands for."""
    parent, _, name = path.rpartition(".")
    holder = module.get_submodule(parent)
    if hasattr(holder, name):
        return module.get_submodule(path), None
    for names in (_FUSED, _FUSED_ACROSS):
        fused, place = names.get(name, ("", 0))
        if layer := getattr(holder, fused, None):
            parts = 2 if names is _FUSED_ACROSS else 3
            width = layer.out_features // parts
            return layer, slice(place * width, (place + 1) * width)
    raise AttributeError(f"{type(module).__name__} has no layer {path}")
