"""Forwards of fixed row counts: padded up to the next one, and on a GPU replayed from a CUDA graph.

A padded forward has the shapes of one that ran before, so nothing is compiled, tuned or captured anew when a
sample joins or leaves.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jubako.families.acceleration import Acceleration
from jubako.memory import out_of_memory

__all__ = ["ROWS", "CapturedForwards", "RowBuckets", "fast_predict", "never", "row_counts"]

logger = logging.getLogger(__name__)

Predict = Callable[..., torch.Tensor]

# At most a third of a forward is padding, past two rows.
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)

# Graphs keep their inputs and outputs; sizes that are asked for once in a while are not worth one.
GRAPHS = 32


def row_counts(most: int) -> tuple[int, ...]:
    """The row counts that forwards are padded to where at most so many rows share one."""
    return (*(rows for rows in ROWS if rows < most), most)


def never() -> bool:
    """Of a denoiser that has no adapters."""
    return False


def fast_predict(
    predict: Predict, acceleration: Acceleration, max_rows: int, adapted: Callable[[], bool] = never
) -> Predict:
    """A denoiser's ``predict`` behind what is on of row buckets and CUDA graphs.

    ``adapted`` tells whether the rows of the forward that runs now have adapters.
    """
    if acceleration.cuda_graphs:
        predict = CapturedForwards(predict, adapted=adapted)
    if acceleration.row_buckets:
        predict = RowBuckets(predict, row_counts(max_rows))
    return predict


class RowBuckets:
    """A denoiser's ``predict`` that only ever sees these row counts, as long as there are no more rows."""

    def __init__(self, predict: Predict, counts: tuple[int, ...]) -> None:
        self._predict = predict
        self._counts = counts

    def __call__(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """As ``predict``; rows that repeat the last one are cut off again."""
        rows = len(inputs)
        missing = next((count for count in self._counts if count >= rows), rows) - rows
        prediction = self._predict(
            _padded(inputs, missing),
            _padded(timesteps, missing),
            {name: _padded(tensor, missing) for name, tensor in conditioning.items()},
            skip_layers,
        )
        return prediction[:rows]


def _padded(tensor: torch.Tensor, missing: int) -> torch.Tensor:
    if not missing:
        return tensor
    return torch.cat([tensor, tensor[-1:].expand(missing, *tensor.shape[1:])])


@dataclass(frozen=True)
class _Captured:
    graph: Any
    inputs: Mapping[str, torch.Tensor]
    prediction: torch.Tensor


class CapturedForwards:
    """A denoiser's ``predict`` that is captured when a shape comes for the second time, and then replayed.

    The first time compiles, and makes this thread's handles and plans, which can't be captured. Where
    capturing fails, the shape runs as without. So does a forward with adapters: a graph has those that it was
    captured with, or none.
    """

    def __init__(self, predict: Predict, most: int = GRAPHS, adapted: Callable[[], bool] = never) -> None:
        self._predict = predict
        self._most = most
        self._adapted = adapted
        self._seen: set[Hashable] = set()
        self._refused: set[Hashable] = set()
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self._pool: Any = None

    def __call__(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        """As ``predict``. What is returned is the caller's own."""
        if self._adapted():
            return self._predict(inputs, timesteps, conditioning, skip_layers)
        given = {"inputs": inputs, "timesteps": timesteps, **conditioning}
        shapes = tuple((name, tensor.shape, tensor.dtype) for name, tensor in given.items())
        key = (threading.get_ident(), skip_layers, shapes)
        captured = self._graphs.get(key)
        ready = key in self._seen and key not in self._refused and inputs.device.type == "cuda"
        if captured is None and ready:
            captured = self._capture(key, given, skip_layers)
        self._seen.add(key)
        if captured is None:
            return self._predict(inputs, timesteps, conditioning, skip_layers)
        self._graphs.move_to_end(key)
        for name, tensor in given.items():
            captured.inputs[name].copy_(tensor)
        captured.graph.replay()
        # The next replay writes over it, and some schedulers keep predictions for later steps.
        return captured.prediction.clone()

    def _capture(
        self, key: Hashable, given: Mapping[str, torch.Tensor], skip_layers: tuple[int, ...]
    ) -> _Captured | None:
        if len(self._graphs) >= self._most:
            self._graphs.popitem(last=False)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        own = {name: tensor.clone() for name, tensor in given.items()}
        conditioning = {name: own[name] for name in own if name not in {"inputs", "timesteps"}}
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads go on to encode prompts on this device.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                prediction = self._predict(own["inputs"], own["timesteps"], conditioning, skip_layers)
        except Exception as error:
            if out_of_memory(error):
                raise
            logger.exception("a forward of %d rows can't be captured", len(own["inputs"]))
            self._refused.add(key)
            return None
        captured = _Captured(graph, own, prediction)
        self._graphs[key] = captured
        return captured
