"""What a device could do and what a picture takes: matrix rate, floating point operations, memory."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

__all__ = ["flops_of", "matrix_rate", "peak_bytes"]

_SIDES = {"cpu": 1024, "cuda": 8192}
_TRIES, _SECONDS = 3, 0.3


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a large matrix product in this precision: the best of three times 0.3 s."""
    side = _SIDES[device.type]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    _seconds(device, lambda: left @ right)
    once = max(_seconds(device, lambda: left @ right), 1e-6)
    count = max(1, int(_SECONDS / once))

    def products() -> None:
        for _ in range(count):
            torch.mm(left, right)

    return 2 * side**3 * count / min(_seconds(device, products) for _ in range(_TRIES))


def flops_of(call: Callable[[], object], denoiser: torch.nn.Module) -> dict[str, float]:
    """Operations of matrix products and convolutions in a call, in all and of the denoiser."""
    # The counter knows the kernels of GPUs only.
    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # noqa: SLF001 # it has no other name
    counter = FlopCounterMode(display=False, custom_mapping={on_cpu: _attention})
    with counter:
        call()
    counts = counter.get_flop_counts()
    inside = counts.get(type(denoiser).__name__, {})
    return {"picture": float(counter.get_total_flops()), "denoiser": float(sum(inside.values()))}


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that PyTorch had allocated since it was last asked; None on a CPU."""
    if device.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return most


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    count: int = sdpa_flop_count(query, key, value)
    return count


def _seconds(device: torch.device, work: Callable[[], object]) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return perf_counter() - began
