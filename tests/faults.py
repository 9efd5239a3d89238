"""Faults for tests to inject into modules of their own process: memory that ends, numbers that are none."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["allocate_in_vain", "live_bytes", "no_room", "spoiled"]


def allocate_in_vain() -> None:
    """Ask PyTorch for 32 petabytes, with tensors at hand as an interrupted forward has them."""
    held = [torch.ones(1000, 1000) for _ in range(4)]
    held.append(torch.empty(1 << 55, dtype=torch.uint8))


@contextmanager
def no_room(
    module: torch.nn.Module,
    too_large: Callable[[torch.Tensor], bool] = lambda _: True,
    times: int | None = None,
) -> Iterator[list[int]]:
    """Forwards of the module whose first tensor is too large find no memory, so many of them or all.

    The list fills with the lengths of those tensors.
    """
    failed: list[int] = []

    def before(_: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = next(each for each in (*arguments, *options.values()) if isinstance(each, torch.Tensor))
        if too_large(given) and (times is None or len(failed) < times):
            failed.append(len(given))
            allocate_in_vain()

    hook = module.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield failed
    finally:
        hook.remove()


def live_bytes(at_most: int = 0, seconds: float = 5.0) -> int:
    """Bytes of all tensors that Python can reach, each storage once: the least of what is found for a while.

    Threads hold on to their last arguments for a moment. It is found at once when it is at most so much.
    """
    deadline = time.monotonic() + seconds
    least = _reachable()
    while least > at_most and time.monotonic() < deadline:
        time.sleep(0.05)
        least = min(least, _reachable())
    return least


def _reachable() -> int:
    gc.collect()
    storages = {}
    for each in gc.get_objects():
        # Not isinstance: it asks objects for their class, and some of torch's answer with a warning.
        if issubclass(type(each), torch.Tensor) and each.device.type == "cpu":
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def spoiled(
    module: torch.nn.Module,
    spoil: Callable[[torch.Tensor], torch.Tensor],
    when: Callable[[torch.Tensor], bool] = lambda _: True,
    times: int | None = None,
) -> Iterator[list[int]]:
    """What comes out of the module is spoiled where the condition holds, so many times or always.

    The list fills with the lengths of what was spoiled.
    """
    done: list[int] = []

    def after(_: Any, __: Any, output: Any) -> Any:
        first = output[0] if isinstance(output, tuple) else output
        if not isinstance(first, torch.Tensor) or not when(first) or len(done) == times:
            return output
        done.append(len(first))
        return (spoil(first), *output[1:]) if isinstance(output, tuple) else spoil(first)

    hook = module.register_forward_hook(after)
    try:
        yield done
    finally:
        hook.remove()
