"""What clients see of durable jobs. A change of state is one transaction, which only one writer can win."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa

from jubako.jobs import tables
from jubako.jobs.record import ENDED, Event, JobState, Output, Record, Work

__all__ = ["Advance", "Ledger"]

# How many of the last jobs of a family tell how long one takes.
_RECENT = 20

_AT_ONCE = 500

_jobs, _events, _files = tables.jobs.c, tables.events.c, tables.files.c
_prints = tables.prints.c
_NOT_ENDED = _jobs.state.notin_(ENDED)


@dataclass(frozen=True)
class Advance:
    """How far a job has come: its stage from 0, the steps of that stage, the whole from 0 to 1.

    ``preview`` is a small JPEG in base64, or empty; ``facts`` are told with it.
    """

    stage: int
    step: int
    steps: int
    progress: float
    preview: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)


class Ledger:
    """The records of all gateways that share a database. Its methods block; call them from threads."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    def add(self, record: Record) -> bool:
        """Record a job as queued; False when there is one of its id already."""
        values = record.model_dump(include=set(_jobs.keys()) - {"work", "outputs", "error"})
        values |= {"work": record.work.model_dump_json(), "outputs": "[]", "error": None}
        try:
            with self._engine.begin() as connection:
                connection.execute(sa.insert(tables.jobs).values(values))
                self._refer(connection, record.id, dict.fromkeys(record.work.digests, 0))
                self._tell(connection, record.id, "queued", {"state": "queued", "progress": 0.0})
        except sa.exc.IntegrityError:
            return False
        return True

    def get(self, job_id: str) -> Record | None:
        """The job of that id."""
        with self._engine.connect() as connection:
            row = connection.execute(sa.select(tables.jobs).where(_jobs.id == job_id)).mappings().first()
        return _record(row) if row else None

    def page(
        self, filters: Mapping[str, Sequence[str]], after: str | None, limit: int, *, newest_first: bool
    ) -> list[Record]:
        """Jobs that have one of these values each, by their age, from behind the one of that id."""
        query = sa.select(tables.jobs).where(*(_jobs[name].in_(values) for name, values in filters.items()))
        mark = self.get(after) if after is not None else None
        if mark is not None:
            place, here = sa.tuple_(_jobs.created, _jobs.id), _place(mark)
            query = query.where(place < here if newest_first else place > here)
        direction = sa.desc if newest_first else sa.asc
        query = query.order_by(direction(_jobs.created), direction(_jobs.id)).limit(limit)
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def ahead(self, record: Record) -> int:
        """How many queued jobs of the family come before this one."""
        turn = sa.func.coalesce(_jobs.turn, 0), sa.literal(record.turn or 0)
        older = sa.tuple_(_jobs.created, _jobs.id) < _place(record)
        earlier = (turn[0] < turn[1]) | ((turn[0] == turn[1]) & older)
        query = sa.select(sa.func.count()).where(
            _jobs.state == "queued", _jobs.family == record.family, earlier
        )
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def waiting(self, family: str, owner: str | None) -> int:
        """How many jobs of the owner wait for the family."""
        query = sa.select(sa.func.count()).where(
            _jobs.state == "queued", _jobs.family == family, _jobs.owner.is_not_distinct_from(owner)
        )
        with self._engine.connect() as connection:
            return connection.execute(query).scalar_one()

    def next_turn(self, family: str, owner: str | None) -> int:
        """The turn of one more job of the owner: behind the owner's own, and beside the next of all others.

        So owners take turns however many each has sent, as in :mod:`jubako.fair_queue`.
        """
        queued = (_jobs.state == "queued") & (_jobs.family == family)
        mine = queued & _jobs.owner.is_not_distinct_from(owner)
        query = sa.select(
            sa.select(sa.func.min(sa.func.coalesce(_jobs.turn, 0))).where(queued).scalar_subquery(),
            sa.select(sa.func.max(sa.func.coalesce(_jobs.turn, 0))).where(mine).scalar_subquery(),
        )
        with self._engine.connect() as connection:
            next_of_all, last_of_mine = connection.execute(query).one()
        return (next_of_all or 0) if last_of_mine is None else last_of_mine + 1

    def standing(self) -> list[tuple[str, JobState, int, float]]:
        """Of each family and state that is not an end: how many jobs, and when the oldest was created."""
        query = (
            sa.select(_jobs.family, _jobs.state, sa.func.count(), sa.func.min(_jobs.created))
            .where(_NOT_ENDED)
            .group_by(_jobs.family, _jobs.state)
        )
        with self._engine.connect() as connection:
            return [
                (family, state, count, oldest) for family, state, count, oldest in connection.execute(query)
            ]

    def usual_seconds(self, family: str) -> float | None:
        """How long the last jobs of the family ran on average; None before the first has succeeded."""
        recent = (
            sa.select((_jobs.ended - _jobs.started).label("seconds"))
            .where(_jobs.state == "succeeded", _jobs.family == family)
            .order_by(_jobs.ended.desc())
            .limit(_RECENT)
            .subquery()
        )
        with self._engine.connect() as connection:
            mean: float | None = connection.execute(sa.select(sa.func.avg(recent.c.seconds))).scalar_one()
            return mean

    def begin(self, job_id: str) -> Record | None:
        """Mark a job as running, and say so the first time; None when it is over or gone."""
        with self._engine.begin() as connection:
            started = connection.execute(
                sa.update(tables.jobs)
                .where(_jobs.id == job_id, _jobs.state == "queued")
                .values(state="running", started=time.time())
            ).rowcount
            if started:
                self._tell(connection, job_id, "started", {"state": "running", "progress": 0.0})
        record = self.get(job_id)
        return None if record is None or record.is_over else record

    def advance(self, advances: Mapping[str, Advance]) -> None:
        """Record how far running jobs have come; what would be a step back is left out."""
        with self._engine.begin() as connection:
            for job_id, made in advances.items():
                forward = sa.and_(_jobs.progress <= made.progress, _jobs.stage <= made.stage)
                values = {"stage": made.stage, "step": made.step, "steps": made.steps}
                moved = connection.execute(
                    sa.update(tables.jobs)
                    .where(_jobs.id == job_id, _jobs.state == "running", forward)
                    .values(progress=made.progress, **values)
                ).rowcount
                if moved:
                    shown = {"preview": made.preview} if made.preview else {}
                    data = {**made.facts, "state": "running", "progress": made.progress, **values, **shown}
                    self._tell(connection, job_id, "progress", data)

    def tell(self, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
        """Record something that has happened to a job, unless it is over or gone."""
        with self._engine.begin() as connection:
            at_work = sa.select(_jobs.id).where(_jobs.id == job_id, _NOT_ENDED)
            if connection.execute(at_work).first():
                self._tell(connection, job_id, kind, data)

    def hold(self, job_id: str, outputs: Sequence[Output]) -> None:
        """Have the files of a stage kept for as long as the job is, unless it is over or gone."""
        with self._engine.begin() as connection:
            at_work = sa.update(tables.jobs).where(_jobs.id == job_id, _NOT_ENDED)
            if connection.execute(at_work.values(expired=False)).rowcount:
                self._refer(connection, job_id, _sizes(outputs))

    def succeed(self, job_id: str, outputs: Sequence[Output]) -> bool:
        """Record the result; False when the job was over already."""
        fields = {
            "progress": 1.0,
            "outputs": json.dumps([output.model_dump(mode="json") for output in outputs]),
        }
        return self._end(job_id, "succeeded", fields, {"progress": 1.0}, _sizes(outputs))

    def fail(self, job_id: str, error: Mapping[str, Any]) -> bool:
        """Record the error, in the shape that clients see; False when the job was over already."""
        return self._end(job_id, "failed", {"error": json.dumps(error)}, dict(error))

    def cancel(self, job_id: str) -> bool:
        """Record that the job was cancelled; False when it was over already."""
        return self._end(job_id, "cancelled", {}, {})

    def events(self, job_id: str, after: int, limit: int = 500) -> list[Event]:
        """What happened to a job after the event of that number, in order."""
        return self.told(job_id, after, limit, newest_first=False)

    def told(
        self, job_id: str, after: int | None, limit: int, *, kinds: Sequence[str] = (), newest_first: bool
    ) -> list[Event]:
        """What happened to a job, of these kinds or of all, from behind the event of that number."""
        query = sa.select(tables.events).where(_events.job_id == job_id).limit(limit)
        query = query.order_by(_events.id.desc() if newest_first else _events.id)
        if kinds:
            query = query.where(_events.kind.in_(kinds))
        if after is not None:
            query = query.where(_events.id < after if newest_first else _events.id > after)
        with self._engine.connect() as connection:
            rows = connection.execute(query).mappings().all()
        return [Event.model_validate({**row, "data": json.loads(row["data"])}) for row in rows]

    def unfinished(self) -> list[Record]:
        """All jobs that are not over, the oldest first."""
        query = sa.select(tables.jobs).where(_NOT_ENDED).order_by(_jobs.created)
        with self._engine.connect() as connection:
            return [_record(row) for row in connection.execute(query).mappings()]

    def over(self, job_ids: Iterable[str]) -> set[str]:
        """Which of these are over or gone."""
        wanted = set(job_ids)
        query = sa.select(_jobs.id).where(_jobs.id.in_(wanted), _NOT_ENDED)
        with self._engine.connect() as connection:
            return wanted - set(connection.execute(query).scalars())

    def ended_before(self, moment: float) -> list[str]:
        """The jobs that ended before that moment, not all at once."""
        query = sa.select(_jobs.id).where(_jobs.ended < moment).limit(_AT_ONCE)
        with self._engine.connect() as connection:
            return list(connection.execute(query).scalars())

    def forget(self, job_ids: Sequence[str]) -> None:
        """Remove all that is recorded of these jobs."""
        with self._engine.begin() as connection:
            for column in (_files.job_id, _prints.job_id, _events.job_id, _jobs.id):
                connection.execute(sa.delete(column.table).where(column.in_(job_ids)))

    def expire_past(self, limit: int) -> int:
        """Let go of the files of the jobs that ended first, until all are within the limit of bytes."""
        query = (
            sa.select(_jobs.id, sa.func.sum(_files.bytes))
            .join(tables.files, _files.job_id == _jobs.id)
            .where(_jobs.ended.is_not(None))
            .group_by(_jobs.id, _jobs.ended)
            .order_by(_jobs.ended.desc())
        )
        with self._engine.begin() as connection:
            total, expired = 0, []
            for job_id, size in connection.execute(query):
                total += size
                if total > limit:
                    expired.append(job_id)
            for column in (_files.job_id, _prints.job_id):
                connection.execute(sa.delete(column.table).where(column.in_(expired)))
            connection.execute(sa.update(tables.jobs).where(_jobs.id.in_(expired)).values(expired=True))
        return len(expired)

    def referred(self) -> set[str]:
        """The digests of all files that some job has."""
        with self._engine.connect() as connection:
            return set(connection.execute(sa.select(_files.digest).distinct()).scalars())

    def _end(
        self,
        job_id: str,
        state: JobState,
        fields: Mapping[str, Any],
        told: Mapping[str, Any],
        sizes: Mapping[str, int] | None = None,
    ) -> bool:
        with self._engine.begin() as connection:
            ended = connection.execute(
                sa.update(tables.jobs)
                .where(_jobs.id == job_id, _NOT_ENDED)
                .values(state=state, ended=time.time(), **fields)
            ).rowcount
            if ended:
                self._refer(connection, job_id, sizes or {})
                kind = {"succeeded": "completed"}.get(state, state)
                self._tell(connection, job_id, kind, {"state": state, **told})
        return bool(ended)

    @staticmethod
    def _refer(connection: sa.Connection, job_id: str, sizes: Mapping[str, int]) -> None:
        known = set(connection.execute(sa.select(_files.digest).where(_files.job_id == job_id)).scalars())
        rows = [
            {"job_id": job_id, "digest": digest, "bytes": size}
            for digest, size in sizes.items()
            if digest not in known
        ]
        if rows:
            connection.execute(sa.insert(tables.files), rows)

    @staticmethod
    def _tell(connection: sa.Connection, job_id: str, kind: str, data: Mapping[str, Any]) -> None:
        row = {"job_id": job_id, "kind": kind, "at": time.time(), "data": json.dumps(data)}
        connection.execute(sa.insert(tables.events).values(row))


def _sizes(outputs: Sequence[Output]) -> dict[str, int]:
    return {kept.digest: kept.bytes for output in outputs for kept in (output, *output.variants.values())}


def _place(record: Record) -> sa.Tuple:
    """Where a job stands in the order of age; ids tell those of the same moment apart."""
    return sa.tuple_(sa.literal(record.created), sa.literal(record.id))


def _record(row: sa.RowMapping) -> Record:
    decoded = {
        "work": Work.model_validate_json(row["work"]),
        "outputs": json.loads(row["outputs"]),
        "error": json.loads(row["error"]) if row["error"] else None,
    }
    return Record.model_validate({**row, **decoded})
