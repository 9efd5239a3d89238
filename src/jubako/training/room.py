"""Whether a device has the memory that a training takes now. An estimate, told in words."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from jubako.catalog import Model
from jubako.memory import cgroup_limit

__all__ = ["free_bytes", "lack_of_room"]

# Beside the weights: activations, gradients and moments of the adapter, what the libraries take.
SHARE_BESIDE = 0.5
LEAST_BESIDE = 300_000_000


def lack_of_room(model: Model, device: torch.device, free: int | None = None) -> str | None:
    """What is missing for a training, as a sentence; None where there is room."""
    free = free_bytes(device) if free is None else free
    width = 2 if device.type == "cuda" else 4
    weights = model.parameters * width
    need = weights + max(LEAST_BESIDE, int(SHARE_BESIDE * weights))
    if free >= need:
        return None
    return f"{model.name} takes about {need / 1e9:.1f} GB to train, and {device} has {free / 1e9:.1f} GB free"


def free_bytes(device: torch.device) -> int:
    """Memory of the device that is free now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    fields = dict(
        line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    )
    available = 1024 * int(fields["MemAvailable"].split()[0])
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(available, cgroup_limit() or physical)
