"""From a pipeline's tensors to a graph's and back: names, types, ranks, fixed numbers of rows.

All of it follows from the graph's own ports. A graph that takes one timestep a call is called once for each
timestep among the rows; one that takes a fixed number of rows is called as often as that needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch

from jubako.errors import InvalidRequest
from jubako.weight_sets import Profile
from jubako.weights.graphs.admission import Admission
from jubako.weights.graphs.contract import FLOATS, RESIDUAL
from jubako.weights.graphs.graph import Port
from jubako.weights.graphs.session import TORCH_DTYPES, RunningGraph

__all__ = ["Adapter"]


class Adapter:
    """A running graph under our names.

    ``profile`` has the numbers of rows that engines were built for, to which calls are padded; without one,
    a graph takes any number that its inputs do.
    """

    def __init__(self, graph: RunningGraph, admission: Admission, profile: Profile | None = None) -> None:
        self._graph = graph
        self._inputs, self._outputs = admission.inputs, admission.outputs
        self._profile = profile
        main = next(port for port in self._inputs.values() if port.rank > 1)
        self._fixed_rows = main.dims[0] if isinstance(main.dims[0], int) else None
        timestep = self._inputs.get("timestep")
        # Of rank 0, or a list that always has one entry while there may be more rows.
        self._one_timestep = timestep is not None and (
            timestep.rank == 0 or (timestep.dims[0] == 1 and self._fixed_rows != 1)
        )
        self._zeros = torch.empty(0)

    @property
    def dtype(self) -> torch.dtype:
        """The type of what the graph takes, or gives where it takes whole numbers only."""
        ports = (*self._inputs.values(), *self._outputs.values())
        return TORCH_DTYPES[next(port.dtype for port in ports if port.rank > 1 and port.dtype in FLOATS)]

    def takes(self, name: str) -> bool:
        """Whether it has an input of this name."""
        return name in self._inputs

    def check(self, size: tuple[int, int], shapes: Mapping[str, Sequence[int]]) -> None:
        """InvalidRequest for pictures of a size (width, height), or inputs of shapes, that it does not take.

        A forward of several requests would fail for all of them.
        """
        if self._profile is not None and not self._profile.allows(*size):
            raise InvalidRequest(f"width: {_sizes(self._profile)}, not {size[0]}x{size[1]}", param="width")
        for name, shape in shapes.items():
            if name in self._inputs:
                _check(self._inputs[name], shape)

    def __call__(self, **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Outputs [rows, …] for inputs [rows, …]; ``timestep`` may be a scalar for all rows.

        InvalidRequest where the graph takes fixed sizes and these are others.
        """
        given = {name: tensor for name, tensor in tensors.items() if name in self._inputs}
        rows = max(len(tensor) for tensor in given.values() if tensor.dim() > 1)
        if "timestep" in given:
            given["timestep"] = given["timestep"].expand(rows)
        parts, order = [], []
        for chosen in self._calls(rows, given.get("timestep")):
            count = self._rows_for(len(chosen))
            index = torch.tensor(chosen + chosen[-1:] * (count - len(chosen)), device=_device(given))
            one = {
                name: tensor if len(chosen) == count == rows else tensor[index]
                for name, tensor in given.items()
            }
            outputs = self._graph(self._fitted(one))
            parts.append({ours: outputs[port.name][: len(chosen)] for ours, port in self._outputs.items()})
            order += chosen
        if len(parts) == 1 and order == sorted(order):
            return parts[0]
        back = torch.tensor(order, device=_device(given)).argsort()
        return {name: torch.cat([part[name] for part in parts])[back] for name in parts[0]}

    def _calls(self, rows: int, timesteps: torch.Tensor | None) -> Iterator[list[int]]:
        """The rows of each call."""
        together = [list(range(rows))]
        if self._one_timestep and timesteps is not None:
            by_time: dict[float, list[int]] = {}
            for row, timestep in enumerate(timesteps.tolist()):
                by_time.setdefault(timestep, []).append(row)
            together = list(by_time.values())
        most = self._fixed_rows or (self._profile.rows[-1] if self._profile else rows)
        for group in together:
            for first in range(0, len(group), most):
                yield group[first : first + most]

    def _rows_for(self, rows: int) -> int:
        if self._fixed_rows is not None:
            return self._fixed_rows
        return self._profile.padded(rows) if self._profile else rows

    def _fitted(self, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The graph's inputs, in the types and ranks that it declares."""
        feeds = {}
        for name, port in self._inputs.items():
            if name == RESIDUAL:
                feeds[port.name] = self._residual(port, given["hidden_states"])
                continue
            # Only the mask of a text encoder may be missing, and then nothing is masked.
            tensor = given[name] if name in given else torch.ones_like(given["input_ids"])
            if name == "timestep" and self._one_timestep:
                tensor = tensor[:1] if port.rank else tensor[0]
            tensor = tensor.to(TORCH_DTYPES[port.dtype]).contiguous()
            _check(port, tensor.shape)
            feeds[port.name] = tensor
        return feeds

    def _residual(self, port: Port, latents: torch.Tensor) -> torch.Tensor:
        """Zeros [layers, rows, patches, width]: there is no ControlNet."""
        rows, _, height, width = latents.shape
        shape = (int(port.dims[0]), rows, height * width // 4, int(port.dims[-1]))
        if self._zeros.shape != shape:
            self._zeros = torch.zeros(shape, dtype=TORCH_DTYPES[port.dtype], device=latents.device)
        return self._zeros


def _check(port: Port, shape: Sequence[int]) -> None:
    """Refuse sizes that the graph does not take; of fixed rows the calls are made to measure."""
    for axis, (wanted, had) in enumerate(zip(port.dims, shape, strict=True)):
        if axis and isinstance(wanted, int) and wanted != had:
            field = "max_sequence_length" if port.rank in {2, 3} else "width"
            field = "num_frames" if port.rank == 5 and axis == 1 else field
            raise InvalidRequest(
                f"{field}: these weights were made for one size; their input {port} does not take "
                f"{list(shape)}; ask for the model's own, or serve it with standard weights",
                param=field,
            )


def _sizes(profile: Profile) -> str:
    if profile.sizes:
        known = ", ".join(f"{width}x{height}" for width, height in profile.sizes)
        return f"the engines of these weights take {known}"
    return f"the engines of these weights take sides from {profile.min_side} to {profile.max_side}"


def _device(tensors: Mapping[str, torch.Tensor]) -> torch.device:
    return next(iter(tensors.values())).device
