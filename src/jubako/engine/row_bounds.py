"""How many rows a forward may hold where the memory has turned out to be smaller than the catalog says."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from time import monotonic

__all__ = ["RowBounds"]

# What took the memory may be gone by then; if not, one forward in so much time is tried in vain.
SECONDS = 60.0


class RowBounds:
    """The rows of each bucket that are known to be too many, for a while."""

    def __init__(self, seconds: float = SECONDS, clock: Callable[[], float] = monotonic) -> None:
        self._seconds = seconds
        self._clock = clock
        self._lowered: dict[Hashable, tuple[int, float]] = {}

    def lower(self, bucket: Hashable, rows: int) -> None:
        """From now on and for a while, no more rows than these."""
        self._lowered[bucket] = rows, self._clock() + self._seconds

    def rows(self, bucket: Hashable, most: int) -> int:
        """How many rows to take, of ``most`` by the catalog."""
        rows, until = self._lowered.get(bucket, (most, 0.0))
        if until < self._clock():
            self._lowered.pop(bucket, None)
            return most
        return min(rows, most)
