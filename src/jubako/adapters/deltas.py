"""What adapters add to the output of one layer, for the rows of a forward that have any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from jubako.adapters.lora import Lora, LoraLayer

__all__ = ["AdapterSet", "Deltas", "deltas_of"]

AdapterSet = tuple[tuple[Lora, float], ...]
"""What one row has: adapters with their weights, in order; none is the base."""


@dataclass(frozen=True)
class Deltas:
    """Low-rank matrices for some rows: ``down`` [n, rank, in(, h, w)], ``up`` [n, out, rank].

    ``rows`` [n] are the rows' places. Where all of them have the same adapters there is one matrix for all,
    with n = 1.
    """

    rows: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor

    def added(
        self, layer: Any, inputs: torch.Tensor, output: torch.Tensor, columns: slice | None
    ) -> torch.Tensor:
        """The layer's output [rows, …] and the rows' deltas; ``columns`` are those of a fused layer."""
        whole = len(self.rows) == len(inputs)
        chosen = inputs if whole else inputs.index_select(0, self.rows)
        delta = self._convolved(layer, chosen) if self.down.dim() > 3 else self._projected(chosen)
        delta = delta.to(output.dtype)
        if columns is None:
            return output + delta if whole else output.index_add(0, self.rows, delta)
        result = output.clone()
        part = result[..., columns]
        part.index_add_(0, self.rows, delta)
        return result

    def _projected(self, inputs: torch.Tensor) -> torch.Tensor:
        """Of a linear layer: [n, …, in] to [n, …, out]."""
        if len(self.down) == 1:
            return functional.linear(functional.linear(inputs, self.down[0]), self.up[0])
        flat = inputs.flatten(1, -2) if inputs.dim() > 2 else inputs[:, None]
        delta = torch.bmm(torch.bmm(flat, self.down.mT), self.up.mT)
        return delta.reshape(*inputs.shape[:-1], delta.shape[-1])

    def _convolved(self, layer: Any, inputs: torch.Tensor) -> torch.Tensor:
        """Of a convolution: [n, in, h, w] to [n, out, h', w'], each row by kernels of its own."""
        n, _, height, width = inputs.shape
        how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
        if len(self.down) == 1:
            small = functional.conv2d(inputs, self.down[0], **how)
        else:
            kernels = self.down.flatten(0, 1)
            together = functional.conv2d(inputs.reshape(1, -1, height, width), kernels, groups=n, **how)
            small = together.reshape(n, -1, *together.shape[-2:])
        delta = torch.matmul(self.up, small.flatten(2))
        return delta.reshape(n, -1, *small.shape[-2:])


def deltas_of(rows: Sequence[AdapterSet], component: str) -> dict[str, Deltas]:
    """The deltas of every layer that some row's adapters have."""
    paths = {path for row in rows for lora, _ in row for path in lora.components.get(component, {})}
    return {path: _deltas(rows, component, path) for path in paths}


def _deltas(rows: Sequence[AdapterSet], component: str, path: str) -> Deltas:
    layers = [_layers(row, component, path) for row in rows]
    places = [place for place, own in enumerate(layers) if own]
    same = all(rows[place] == rows[places[0]] for place in places)
    stacked = [_stacked(layers[place]) for place in (places[:1] if same else places)]
    rank = max(len(down) for down, _ in stacked)
    device = stacked[0][0].device
    return Deltas(
        torch.tensor(places, device=device),
        torch.stack([_padded(down, rank, dim=0) for down, _ in stacked]),
        torch.stack([_padded(up, rank, dim=1) for _, up in stacked]),
    )


def _layers(row: AdapterSet, component: str, path: str) -> list[tuple[LoraLayer, float]]:
    own = [(lora.components.get(component, {}).get(path), weight) for lora, weight in row]
    return [(layer, weight) for layer, weight in own if layer is not None]


def _stacked(layers: Sequence[tuple[LoraLayer, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Several adapters as one of the sum of their ranks."""
    down = torch.cat([layer.down for layer, _ in layers])
    return down, torch.cat([layer.up * weight for layer, weight in layers], dim=1)


def _padded(matrix: torch.Tensor, rank: int, *, dim: int) -> torch.Tensor:
    """As many ranks as the others; those that are added do nothing."""
    missing = list(matrix.shape)
    missing[dim] = rank - matrix.shape[dim]
    return torch.cat([matrix, matrix.new_zeros(missing)], dim=dim) if missing[dim] else matrix
