"""Which replica of a family has the next work: of those that take any, the one with the least at work.

Rows count first, by which a forward of a step batcher takes its time, then work. Of equals the one goes first
that was given something the longest ago. A faster replica has fewer rows left, and so is given more.

Nothing here waits or looks at a clock: who takes new work is for others to find out.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Hashable, Iterable
from typing import Generic, TypeVar

from jubako.fair_queue import Ask

__all__ = ["Balance"]

Replica = TypeVar("Replica", bound=Hashable)

IDLE = (0, 0.0, 0)


class Balance(Generic[Replica]):
    """What the replicas of one family have at work, as far as it was handed out here."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        # Rows, work, and the number of what was given last.
        self._loads: defaultdict[Replica, tuple[int, float, int]] = defaultdict(lambda: IDLE)

    def choose(self, among: Iterable[Replica], tried: Collection[Replica] = ()) -> Replica | None:
        """The one with the least at work; one that was tried before only where there is no other."""
        open_ = list(among)
        fresh = [replica for replica in open_ if replica not in tried] if tried else open_
        return min(fresh or open_, key=self._loads.__getitem__, default=None)

    def begin(self, replica: Replica, ask: Ask) -> None:
        """Count this as at work there."""
        rows, work, _ = self._loads[replica]
        self._loads[replica] = (rows + ask.rows, work + ask.work, next(self._numbers))

    def end(self, replica: Replica, ask: Ask) -> None:
        """Count it no more."""
        rows, work, given = self._loads[replica]
        # Without rows there is no work: what sums of fractions leave must not decide for ever.
        left = rows - ask.rows
        self._loads[replica] = (left, work - ask.work if left else 0.0, given)

    def rows(self, replica: Replica) -> int:
        """Rows at work there."""
        return self._loads[replica][0]

    def forget(self, replica: Replica) -> None:
        """It is there no more, and has nothing at work."""
        self._loads.pop(replica, None)
