"""One family's queue: which requests may wait, which goes next, and when each will be done.

Owners share the family fairly by start-time fair queueing (https://doi.org/10.1109/90.649569), whatever each
of them sends; among an owner's requests those that came first go first. Interactive requests go before batch
ones, which get every eighth turn. What is at work is bounded, so that it ends soon: a step batcher that was
given everything at once would have all of it done late.

Nothing here waits for a clock or a thread: times come from ``clock``, and a simulation may bring its own.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from math import ceil
from time import monotonic
from typing import Literal

from jubako.errors import Overloaded

__all__ = ["Ask", "FairQueue", "Priority"]

Priority = Literal["interactive", "batch"]

EVERY = 8
# Before anything was measured, what waits is bounded by its rows.
WINDOWS_UNMEASURED = 16
# Of busy seconds, after which a measurement counts half.
HALF_LIFE = 20.0
MEASURED = 4
# What a promise has beside the prediction: forwards differ, and other processes want the machine.
MARGIN, MARGIN_SECONDS = 1.25, 0.5


@dataclass(frozen=True)
class Ask:
    """What a request asks of its family: work in row-steps of its model's own size, rows at a time."""

    work: float
    rows: int
    owner: str = ""
    priority: Priority = "interactive"
    within: float | None = None


@dataclass(eq=False)
class _Turn:
    ask: Ask
    number: int
    start: float
    since: float
    begun: asyncio.Event = field(default_factory=asyncio.Event)


class _Pace:
    """Work done a second while there was some; older measurements count less."""

    def __init__(self) -> None:
        self._work = self._busy = 0.0
        self._ended = 0

    def passed(self, seconds: float) -> None:
        kept = 0.5 ** (seconds / HALF_LIFE)
        self._work, self._busy = self._work * kept, self._busy * kept + seconds

    def ended(self, work: float) -> None:
        self._work += work
        self._ended += 1

    @property
    def rate(self) -> float | None:
        """None until enough was measured."""
        return self._work / self._busy if self._ended >= MEASURED and self._work and self._busy else None


class FairQueue:
    """Belongs to one event loop. ``window``: rows at work at a time; ``longest``: seconds of any request."""

    def __init__(self, window: int, longest: float, clock: Callable[[], float] = monotonic) -> None:
        self.window, self._longest, self._clock = window, longest, clock
        self._numbers = itertools.count()
        self._waiting: dict[Priority, list[_Turn]] = {"interactive": [], "batch": []}
        self._at_work: dict[int, Ask] = {}
        self._virtual = 0.0
        self._finish: dict[str, float] = {}
        self._pace = _Pace()
        self._looked = clock()
        self._since_batch = 0

    @property
    def depth(self) -> dict[Priority, int]:
        """How many wait."""
        return {priority: len(turns) for priority, turns in self._waiting.items()}

    @property
    def age(self) -> float:
        """Seconds that the oldest of them has waited."""
        since = [turn.since for turns in self._waiting.values() for turn in turns]
        return self._clock() - min(since, default=self._clock())

    @property
    def at_work(self) -> int:
        """How many have their turn."""
        return len(self._at_work)

    @property
    def rate(self) -> float | None:
        """Work a second, as measured lately."""
        return self._pace.rate

    def resize(self, window: int) -> None:
        """Have so many rows at work at a time from now on; what is at work stays so."""
        self.window = window
        self._begin()

    def require_room(self, ask: Ask) -> float | None:
        """Seconds within which it will be done if it comes now, as a promise; Overloaded when it is expected
        to take too long.

        Who is at work shares the family with all who come meanwhile, so that what is promised is more than
        what is expected: as long as it takes with the window full all the time. None before anything was
        measured.
        """
        rate = self._pace.rate
        ahead = self._work_before(ask)
        if rate is None:
            rows = ask.rows + sum(turn.ask.rows for turns in self._waiting.values() for turn in turns)
            if rows > WINDOWS_UNMEASURED * self.window:
                raise Overloaded("the queue is full; try again soon", retry_after=1)
            return None
        expected = MARGIN * (ahead + ask.work) / rate + MARGIN_SECONDS
        limit = self._longest if ask.within is None else min(self._longest, ask.within)
        if expected > limit and (ahead or ask.within is not None):
            raise Overloaded(
                f"it would take about {expected:.1f} s, and {limit:g} s are the limit",
                retry_after=max(1, ceil((expected - limit) / MARGIN)),
            )
        before = ahead if self._must_wait(ask) else 0.0
        in_company = ask.work * max(1.0, self.window / ask.rows)
        return MARGIN * (before + in_company) / rate + MARGIN_SECONDS

    @asynccontextmanager
    async def turn(self, ask: Ask) -> AsyncIterator[None]:
        """Wait for a turn and have it; leave it by an exception when nothing was done."""
        turn = self._entered(ask)
        done = False
        try:
            self._begin()
            await turn.begun.wait()
            yield
            done = True
        finally:
            self._leave(turn, done)

    def _entered(self, ask: Ask) -> _Turn:
        start = max(self._virtual, self._finish.get(ask.owner, 0.0))
        self._finish[ask.owner] = start + ask.work
        turn = _Turn(ask, next(self._numbers), start, self._clock())
        self._waiting[ask.priority].append(turn)
        return turn

    def _begin(self) -> None:
        """Give turns while there is room; one that is larger than the window has it alone."""
        while turn := self._next():
            rows = sum(ask.rows for ask in self._at_work.values())
            if self._at_work and rows + turn.ask.rows > self.window:
                return
            self._look()
            self._waiting[turn.ask.priority].remove(turn)
            self._since_batch = 0 if turn.ask.priority == "batch" else self._since_batch + 1
            self._virtual = max(self._virtual, turn.start)
            self._at_work[turn.number] = turn.ask
            turn.begun.set()

    def _next(self) -> _Turn | None:
        interactive, batch = self._waiting["interactive"], self._waiting["batch"]
        turns = batch if batch and (not interactive or self._since_batch >= EVERY) else interactive
        return min(turns, key=lambda turn: (turn.start, turn.number), default=None)

    def _leave(self, turn: _Turn, done: bool) -> None:
        self._look()
        if self._at_work.pop(turn.number, None) is None:
            self._waiting[turn.ask.priority].remove(turn)
        elif done:
            self._pace.ended(turn.ask.work)
        self._begin()
        if not self._at_work:
            # Nobody waits: what was had before is not held against anybody.
            self._virtual = 0.0
            self._finish.clear()

    def _look(self) -> None:
        now = self._clock()
        if self._at_work:
            self._pace.passed(now - self._looked)
        self._looked = now

    def _must_wait(self, ask: Ask) -> bool:
        rows = sum(each.rows for each in self._at_work.values())
        return any(self._waiting.values()) or (rows > 0 and rows + ask.rows > self.window)

    def _work_before(self, ask: Ask) -> float:
        """What will be done before it, were it to come now."""
        start = max(self._virtual, self._finish.get(ask.owner, 0.0))
        before = sum(each.work for each in self._at_work.values())
        for priority, turns in self._waiting.items():
            for turn in turns:
                if priority == ask.priority:
                    before += turn.ask.work if turn.start <= start else 0.0
                elif priority == "interactive":
                    before += turn.ask.work
        return before
