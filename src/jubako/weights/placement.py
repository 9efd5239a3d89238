"""In which precision modules are held."""

from __future__ import annotations

import torch

from jubako.catalog import Model
from jubako.weight_sets import Precision

__all__ = ["resolve_dtype"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_dtype(precision: Precision, model: Model, device: torch.device) -> torch.dtype:
    """The precision of the modules that PyTorch runs.

    Beside graphs in float8 or of mixed precision, and where only layers are in float8, it is float32 on a CPU
    and the catalog's on an accelerator.
    """
    if precision in _DTYPES and device.type != "cpu":
        return _DTYPES[precision]
    return torch.float32 if device.type == "cpu" else _DTYPES[model.weights.dtype]
