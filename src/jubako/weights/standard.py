"""The standard weight set: safetensors of a diffusers repository, run by PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from jubako.catalog import Model

__all__ = ["load_pipeline", "resolve_device", "resolve_dtype"]


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


def load_pipeline(folder: Path, model: Model, device: torch.device, dtype: torch.dtype) -> Any:
    """The model's diffusers pipeline, ready to run: only safetensors, no network, no code of the folder."""
    import diffusers

    pipeline_class = getattr(diffusers, model.pipeline)
    left_out = dict.fromkeys(model.weights.left_out)
    if "safety_checker" in left_out:
        left_out["requires_safety_checker"] = False
    pipeline = pipeline_class.from_pretrained(
        folder,
        dtype=dtype,
        variant=_variant(folder, model),
        use_safetensors=True,
        local_files_only=True,
        **left_out,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _variant(folder: Path, model: Model) -> str | None:
    """The catalog's variant where the folder has it: a repository may have been pulled without."""
    variant = model.weights.variant
    return variant if variant and next(folder.rglob(f"*.{variant}.safetensors"), None) else None
