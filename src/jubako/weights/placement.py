"""Where models run, and in which precision."""

from __future__ import annotations

import torch

from jubako.catalog import Model

__all__ = ["resolve_device", "resolve_dtype"]


def resolve_device(setting: str) -> torch.device:
    """The torch device of a setting; ``auto`` is the first accelerator, else the CPU."""
    if setting != "auto":
        return torch.device(setting)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def resolve_dtype(setting: str, model: Model, device: torch.device) -> torch.dtype:
    """The precision to run in: the setting, else float32 on a CPU and the catalog's on an accelerator."""
    if setting == "auto":
        setting = "float32" if device.type == "cpu" else model.weights.dtype
    return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[setting]
