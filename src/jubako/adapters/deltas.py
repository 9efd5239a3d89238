"""What adapters add to the output of one layer, for the neighbouring rows of a forward that have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch.nn import functional

from jubako.adapters.lora import Lora, LoraLayer

__all__ = ["AdapterSet", "Stretch", "add_delta", "stretches"]

AdapterSet = tuple[tuple[Lora, float], ...]
"""What one row has: adapters with their weights, in order; none is the base."""


@dataclass(frozen=True)
class Stretch:
    """Neighbouring rows that have an adapter: where they are, its layers, and its weight for them."""

    rows: slice
    layers: Mapping[str, LoraLayer]
    weight: float


def stretches(rows: Sequence[AdapterSet], component: str) -> list[Stretch]:
    """The rows of a forward by their adapters; each stretch costs products of its own."""
    found, start = [], 0
    for own, group in groupby(rows):
        stop = start + len(list(group))
        found += [
            Stretch(slice(start, stop), layers, weight)
            for lora, weight in own
            if (layers := lora.components.get(component))
        ]
        start = stop
    return found


def add_delta(layer: Any, lora: LoraLayer, weight: float, inputs: torch.Tensor, output: torch.Tensor) -> None:
    """Add to a layer's output what an adapter makes of its inputs, in place; both are of the same rows."""
    if lora.down.dim() > 2:
        how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        small = functional.conv2d(inputs, lora.down, **how)
        output.add_(functional.conv2d(small, lora.up[:, :, None, None]), alpha=weight)
    else:
        # A product that is added as it is made, rather than one beside the output: half the time on CPUs.
        small = inputs.reshape(-1, inputs.shape[-1]) @ lora.down.T
        output.view(-1, output.shape[-1]).addmm_(small, lora.up.T, alpha=weight)
