"""Which earlier results of the same owner a new one is very like: their fingerprints, in the jobs' database.

A row lasts as long as its job's files, that of a picture that was answered at once as many days; of an owner
the newest ``KEPT`` count. What was read once is kept in memory and read on from there. It is a hint: of two
results that two gateways make at the same moment, one may miss the other.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from jubako.jobs import tables
from jubako.jobs.record import Similar

__all__ = ["Printed", "Similarity"]

KEPT = 4096
TOLD = 5
OWNERS = 64

_prints = tables.prints.c

Rows = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Printed:
    """A result: the id of its job, its number there, its fingerprint."""

    id: str
    index: int
    fingerprint: str

    @property
    def bytes(self) -> bytes:
        """Sixteen: a picture is like a clip in which nothing moves."""
        found = bytes.fromhex(self.fingerprint)
        return found if len(found) == 16 else 2 * found


@dataclass
class _Shelf:
    """What was read of one owner: the number of each row, whose it is, and the fingerprints [rows, 16]."""

    rows: list[tuple[int, str, int]] = field(default_factory=list)
    prints: Rows = field(default_factory=lambda: np.empty((0, 16), np.uint8))

    @property
    def last(self) -> int:
        return self.rows[-1][0] if self.rows else 0

    def add(self, read: Sequence[tuple[int, Printed]]) -> None:
        """Append rows, and let go of the oldest past the number that counts."""
        self.rows = [*self.rows, *((number, each.id, each.index) for number, each in read)][-KEPT:]
        self.prints = np.concatenate([self.prints, _matrix([each for _, each in read])])[-KEPT:]


class Similarity:
    """The results of all gateways that share a database. Its methods block; call them from threads."""

    def __init__(self, engine: sa.Engine, distance: int) -> None:
        """``distance``: bits of 64, in each frame looked at, by which results may differ and be alike."""
        self._engine = engine
        self._distance = distance
        self._shelves: OrderedDict[str, _Shelf] = OrderedDict()
        self._lock = threading.Lock()

    def near(self, owner: str, results: Sequence[Printed]) -> list[tuple[Similar, ...]]:
        """Of each of these results the nearest earlier ones of the owner, those before it in the list too."""
        with self._lock:
            shelf = self._read(owner)
            rows, prints = shelf.rows, shelf.prints
        own, ids = _matrix(results), {each.id for each in results}
        found = []
        for place in range(len(results)):
            beside = [
                Similar(id=each.id, index=each.index, distance=int(distance))
                for each, distance in zip(results, _distances(own[:place], own[place]), strict=False)
                if distance <= self._distance
            ]
            apart = _distances(prints, own[place])
            # A job that is run again after a crash is not like itself.
            hits = [
                (int(apart[row]), *rows[row])
                for row in np.flatnonzero(apart <= self._distance)
                if rows[row][1] not in ids
            ]
            alike = [*beside, *self._there(sorted(hits, key=lambda hit: (hit[0], -hit[1])))]
            found.append(tuple(sorted(alike, key=lambda each: each.distance)[:TOLD]))
        return found

    def note(self, owner: str, results: Sequence[Printed]) -> None:
        """Remember these results, in place of what was remembered of their jobs."""
        now = time.time()
        rows = [
            {"job_id": each.id, "number": each.index, "print": each.fingerprint, "owner": owner, "at": now}
            for each in results
        ]
        with self._engine.begin() as connection:
            again = _prints.job_id.in_({each.id for each in results})
            connection.execute(sa.delete(tables.prints).where(again))
            connection.execute(sa.insert(tables.prints), rows)

    def sweep(self, before: float) -> None:
        """Forget what is older than that moment, and of each owner what is past the number that counts."""
        newest = sa.func.row_number().over(partition_by=_prints.owner, order_by=_prints.id.desc())
        ranked = sa.select(_prints.id, newest.label("place")).subquery()
        past = sa.select(ranked.c.id).where(ranked.c.place > KEPT)
        with self._engine.begin() as connection:
            connection.execute(sa.delete(tables.prints).where(_prints.at < before))
            connection.execute(sa.delete(tables.prints).where(_prints.id.in_(past)))

    def _read(self, owner: str) -> _Shelf:
        shelf = self._shelves.setdefault(owner, _Shelf())
        self._shelves.move_to_end(owner)
        while len(self._shelves) > OWNERS:
            self._shelves.popitem(last=False)
        query = (
            sa.select(_prints.id, _prints.job_id, _prints.number, _prints.print)
            .where(_prints.owner == owner, _prints.id > shelf.last)
            .order_by(_prints.id.desc())
            .limit(KEPT)
        )
        with self._engine.connect() as connection:
            read = [(number, Printed(*printed)) for number, *printed in connection.execute(query)]
        if read:
            shelf.add(read[::-1])
        return shelf

    def _there(self, hits: Sequence[tuple[int, int, str, int]]) -> list[Similar]:
        """The nearest of them, without those whose rows were removed since they were read."""
        hits = hits[: 4 * TOLD]
        query = sa.select(_prints.id).where(_prints.id.in_([number for _, number, _, _ in hits]))
        with self._engine.connect() as connection:
            there = set(connection.execute(query).scalars()) if hits else set()
        return [
            Similar(id=job_id, index=index, distance=distance)
            for distance, number, job_id, index in hits
            if number in there
        ]


def _matrix(results: Sequence[Printed]) -> Rows:
    return np.frombuffer(b"".join(each.bytes for each in results), np.uint8).reshape(-1, 16)


def _distances(rows: Rows, one: Rows) -> npt.NDArray[np.int64]:
    """Bits in which each row [n, 16] differs from one, in the frame in which they differ most."""
    bits = np.unpackbits(rows ^ one, axis=1).reshape(-1, 2, 64)
    apart: npt.NDArray[np.int64] = bits.sum(axis=2, dtype=np.int64).max(axis=1, initial=0)
    return apart
