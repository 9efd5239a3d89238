"""Adapters of some rows of a forward, beside rows that have others or none: low-rank deltas, row by row.

The base module is never changed. While a forward runs, hooks on its layers add to each row what its own
adapters make of the layer's input, as servers of many adapters do for language models
(https://arxiv.org/abs/2310.18547, https://arxiv.org/abs/2311.03285), here for linear layers and convolutions.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial

import torch
from torch.utils.hooks import RemovableHandle

from jubako.adapters.deltas import AdapterSet, Stretch, add_delta, stretches

__all__ = ["Mixer"]

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


class Mixer:
    """One module and its rows' adapters. Belongs to one thread at a time, that of the module's forwards.

    It keeps nothing of an adapter beyond the forwards that have it. Its hooks stay on the layers that some
    adapter had, and go with it.
    """

    def __init__(self, module: torch.nn.Module, component: str) -> None:
        self._module = module
        self._component = component
        self._hooks: dict[str, RemovableHandle] = {}
        # Shared with the hooks, which must not keep the mixer: its module may be another model's too.
        self._now: list[Stretch] = []
        weakref.finalize(self, _remove, self._hooks)

    @contextmanager
    def rows(self, sets: Sequence[AdapterSet]) -> Iterator[None]:
        """The adapters of each row of the forwards within, in the rows' order."""
        try:
            self._now += stretches(sets, self._component)
            self._hook_up()
            eager = self._now and self._compiled
            with torch.compiler.set_stance("force_eager") if eager else nullcontext():
                yield
        finally:
            self._now.clear()

    @property
    def at_work(self) -> bool:
        """Whether a forward runs some of whose rows have adapters."""
        return bool(self._now)

    @cached_property
    def _compiled(self) -> bool:
        """Whether there is compiled code, which does not see hooks; it is there before the first adapter."""
        return any(part._compiled_call_impl is not None for part in self._module.modules())  # noqa: SLF001 # no other way

    def _hook_up(self) -> None:
        """Hooks for the layers that have none yet."""
        for stretch in self._now:
            for path in stretch.layers.keys() - self._hooks.keys():
                layer, columns = _layer(self._module, path)
                hook = partial(_add, now=self._now, path=path, columns=columns)
                self._hooks[path] = layer.register_forward_hook(hook)


def _add(
    layer: torch.nn.Module,
    inputs: tuple[torch.Tensor, ...],
    output: torch.Tensor,
    *,
    now: Sequence[Stretch],
    path: str,
    columns: slice | None,
) -> None:
    """A hook: each stretch of rows gets what its adapter has for this layer."""
    for stretch in now:
        if (lora := stretch.layers.get(path)) is not None:
            part = output[stretch.rows] if columns is None else output[stretch.rows, ..., columns]
            add_delta(layer, lora, stretch.weight, inputs[0][stretch.rows], part)


def _remove(hooks: Mapping[str, RemovableHandle]) -> None:
    for hook in hooks.values():
        hook.remove()


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
