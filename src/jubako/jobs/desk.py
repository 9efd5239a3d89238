"""The desk: takes jobs in, tells of them, hands out results, cancels. What routes speak to."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

from jubako import logs, metrics, tracing
from jubako.catalog import Catalog
from jubako.errors import DiskFull, GenerationFailed, JobEnded, KeyReused, Overloaded, UnknownJob
from jubako.job import Job, new_id
from jubako.jobs.durable import DurableQueue
from jubako.jobs.execution import Engine, Execution, Trainings
from jubako.jobs.lease import Lease, take_name
from jubako.jobs.ledger import Ledger
from jubako.jobs.record import ENDED, TRAINING, Event, Kept, Record, Similar, Training, Work
from jubako.jobs.similarity import Printed, Similarity
from jubako.jobs.store import FileStore
from jubako.jobs.tables import database_url, open_database
from jubako.result import Result
from jubako.settings import Settings

__all__ = ["JobDesk"]

logger = logging.getLogger(__name__)

THREADS = 4
WATCH_SECONDS = 0.25
CLEAN_SECONDS = 60.0
FULL_SECONDS = 2.0
COUNT_SECONDS = 5.0
# Jobs that are recorded but not known to the queue: their gateway died between the two.
LOST_AFTER_SECONDS = 10.0
# Whatever has a job dropped will do so again.
MOST_AGAIN = 3

_KEYS = uuid.UUID("6f0c7c6e-54a5-4d0b-9f0e-2b5a3a0f8d41")


class JobDesk:
    """Durable jobs of one gateway, beside those of others that share its database and its files."""

    def __init__(self, settings: Settings, catalog: Catalog, engine: Engine, trainings: Trainings) -> None:
        url = database_url(settings.database_url, settings.home)
        settings.home.mkdir(parents=True, exist_ok=True)
        self._settings = settings
        self._name, self._lock = take_name(settings.gateway, settings.home)
        database = open_database(url)
        self._ledger = Ledger(database)
        self._lease = Lease(database, self._name, settings.job_lease)
        self.store = FileStore(settings.home / "files")
        self._bells: dict[str, set[asyncio.Event]] = {}
        # Of its own, so that a poll never waits for a picture that is being decoded.
        self._threads = ThreadPoolExecutor(THREADS, "jobs")
        distance = settings.similar_distance
        self._similarity = None if distance == "off" else Similarity(database, distance)
        self._execution = Execution(
            self._ledger,
            self.store,
            engine,
            trainings,
            self._similarity,
            timeout=settings.job_timeout,
            call=self._call,
            ring=self._ring,
        )
        self._trainings = trainings
        bounds = {family.name: family.job_concurrency for family in catalog.families.values()}
        if settings.training:
            bounds[TRAINING] = 1
        self._bounds = bounds
        self._queue = DurableQueue(url, self._name, bounds, self._execution)
        self._tasks: list[asyncio.Task[None]] = []
        self._streaming = True
        self._dropped: set[str] = set()
        self._again: Counter[str] = Counter()

    async def open(self) -> None:
        """Begin to run what waits, and to look after other gateways' jobs; when the disk is full, later."""
        try:
            await self._open()
        except DiskFull as error:
            logger.warning("no jobs are run yet: %s", error)
            self._tasks = [asyncio.create_task(self._open_when_there_is_room())]

    async def _open_when_there_is_room(self) -> None:
        while True:
            await asyncio.sleep(FULL_SECONDS)
            with suppress(DiskFull):
                await self._open()
                return

    async def _open(self) -> None:
        await self._call(self._lease.renew)
        await self._call(self._queue.open, asyncio.get_running_loop())
        chores: list[Coroutine[Any, Any, None]] = [
            self._execution.flush_for_ever(),
            self._repeat(self._watch, WATCH_SECONDS),
            self._repeat(self._live, self._settings.job_lease / 5),
            self._repeat(self._clean, CLEAN_SECONDS),
            self._repeat(self._count, COUNT_SECONDS),
        ]
        self._tasks += [asyncio.create_task(chore) for chore in chores]
        logger.info("jobs are run as gateway %s", self._name)

    async def close(self) -> None:
        """Stop; what runs goes on with this gateway's next start, or at once with another gateway."""
        for task in self._tasks:
            task.cancel()
        await self._call(self._queue.close)
        with suppress(DiskFull):
            await self._call(self._lease.release)
        self._lock.close()

    def pause(self) -> None:
        """Begin no job, and no further stage of one; what was begun goes on."""
        self._execution.pause()

    def end_streams(self) -> None:
        """End every stream of events; whoever follows one connects again."""
        self._streaming = False
        for job_id in self._bells:
            self._ring(job_id)

    async def submit(self, jobs: Sequence[Job], request: bytes, key: str | None, owner: str | None) -> Record:
        """Record jobs of one request and have them run; an owner's same key gives the same job again.

        ``request`` is what was asked for, by which another request of the same key is told apart.
        """
        job_id = _id(key, owner)
        await self._call(self._require_room, job_id, jobs[0].family, owner)
        names = [job_id] if len(jobs) == 1 else [f"{job_id}-{i}" for i in range(len(jobs))]
        jobs = [job.model_copy(update={"id": name}) for job, name in zip(jobs, names, strict=True)]
        first = jobs[0]
        record = Record(
            id=job_id,
            state="queued",
            task=first.task if first.source is None else first.task.replace("img2", "txt2"),
            family=first.family,
            model=first.model,
            request_hash=hashlib.sha256(request).hexdigest(),
            owner=owner,
            request_id=logs.facts().get("request_id"),
            traceparent=tracing.traceparent(),
            turn=await self._call(self._ledger.next_turn, first.family, owner),
            work=await self._call(self._work, jobs),
            created=time.time(),
        )
        return await self._recorded(record)

    async def submit_training(
        self,
        training: Training,
        request: bytes,
        prepare: Callable[[str], None],
        key: str | None,
        owner: str | None,
    ) -> Record:
        """Record a training and have it run; ``prepare`` lays its pictures down under the job's id."""
        job_id = _id(key, owner)
        await self._call(self._require_room, job_id, TRAINING, owner)
        if await self._call(self._ledger.get, job_id) is None:
            await self._call(prepare, job_id)
        record = Record(
            id=job_id,
            state="queued",
            task=TRAINING,
            family=TRAINING,
            model=training.plan["model"],
            request_hash=hashlib.sha256(request).hexdigest(),
            owner=owner,
            request_id=logs.facts().get("request_id"),
            traceparent=tracing.traceparent(),
            turn=await self._call(self._ledger.next_turn, TRAINING, owner),
            work=Work(training=training),
            created=time.time(),
        )
        return await self._recorded(record)

    async def _recorded(self, record: Record) -> Record:
        """The job in the ledger and in its queue; of two with one key the first."""
        job_id = record.id
        if not await self._call(self._ledger.add, record):
            known = await self._known(job_id)
            if known.request_hash != record.request_hash:
                raise KeyReused("Idempotency-Key: it came with another request before; use a new one")
            record = known
        # Twice is as good as once; the gateway that recorded it may have died before it came to this. Where
        # there is no room for it, it is queued later, with those that were lost.
        with suppress(DiskFull):
            await self._call(self._queue.enqueue, job_id, record.family, record.turn)
        self._ring(job_id)
        return record

    async def find(self, job_id: str, owner: str | None) -> Record:
        """The owner's job of that id, or with None whoever's it is; UnknownJob when there is none (any more).

        What else is done with a job goes by its id alone: it is found first, by who may see it.
        """
        record = await self._known(job_id)
        if owner is not None and record.owner != owner:
            raise _unknown(job_id)
        return record

    async def _known(self, job_id: str) -> Record:
        record: Record | None = await self._call(self._ledger.get, job_id)
        if record is None:
            raise _unknown(job_id)
        return record

    async def page(
        self,
        filters: Mapping[str, Sequence[str]],
        after: str | None,
        limit: int,
        owner: str | None,
        *,
        newest_first: bool = True,
    ) -> list[Record]:
        """The owner's jobs, or with None all, that have these values, from behind the one of that id."""
        if after is not None:
            try:
                await self.find(after, owner)
            except UnknownJob as error:
                raise UnknownJob(f"after: {error.message}", param="after") from error
        if owner is not None:
            filters = {**filters, "owner": (owner,)}
        page = self._ledger.page
        records: list[Record] = await self._call(
            partial(page, newest_first=newest_first), filters, after, limit
        )
        return records

    async def forecast(self, record: Record) -> tuple[int | None, float | None]:
        """The job's place in its queue, the first being 1, and about how many seconds it still takes."""
        forecast: tuple[int | None, float | None] = await self._call(self._forecast, record)
        return forecast

    async def cancel(self, job_id: str) -> Record:
        """Cancel a job that waits or runs; JobEnded for one that has succeeded or failed."""
        record = await self._known(job_id)
        if await self._call(self._ledger.cancel, job_id):
            # Recorded first: from here on no stage can give it another end.
            if not self._execution.stop(job_id) and record.state == "queued":
                await self._call(self._trainings.remove, job_id)
            self._ring(job_id)
            with suppress(DiskFull):  # it ends at once when it is begun
                await self._call(self._queue.cancel, job_id)
        record = await self._known(job_id)
        if record.state != "cancelled":
            raise JobEnded(f"the job has {record.state} already; there is nothing to cancel")
        return record

    async def content(self, kept: Kept) -> bytes:
        """A file of a result; ResultGone when it was removed or is damaged."""
        content: bytes = await self._call(self.store.get, kept.digest)
        return content

    async def file(self, kept: Kept) -> Path:
        """Where a file of a result is; ResultGone when it was removed or is damaged."""
        path: Path = await self._call(self.store.find, kept.digest)
        return path

    async def alike(self, results: Sequence[Result], owner: str) -> list[tuple[Similar, ...]]:
        """What of the owner's earlier results those are very like that are answered at once.

        They are remembered as well, without a wait for it.
        """
        if self._similarity is None or not all(result.fingerprint for result in results):
            return [()] * len(results)
        prints = [Printed(result.job_id, 0, result.fingerprint) for result in results]
        try:
            found: list[tuple[Similar, ...]] = await self._call(self._similarity.near, owner, prints)
        except Exception:
            # Nobody is refused a picture for it.
            logger.exception("results could not be compared with earlier ones")
            return [()] * len(results)
        self._threads.submit(self._similarity.note, owner, prints)
        return found

    async def missed(self, job_id: str, after: int) -> bool:
        """Whether anything has happened to the job behind the event of that number."""
        return bool(await self._call(self._ledger.events, job_id, after, 1))

    async def forget(self, job_id: str) -> None:
        """Cancel the job if it is not over, and remove all that is known of it."""
        record = await self._known(job_id)
        if not record.is_over:
            await self.cancel(job_id)
        await self._call(self._forget, [job_id])

    async def history(
        self,
        job_id: str,
        after: int | None,
        limit: int,
        kinds: Sequence[str] = (),
        *,
        newest_first: bool = True,
    ) -> list[Event]:
        """What has happened to a job, of these kinds or of all, from behind the event of that number."""
        await self._known(job_id)
        told = partial(self._ledger.told, kinds=kinds, newest_first=newest_first)
        history: list[Event] = await self._call(told, job_id, after, limit)
        return history

    async def events(self, job_id: str, after: int = 0) -> AsyncGenerator[Event | None, None]:
        """What happens to a job behind the event of that number, until it is over; None as sign of life."""
        await self._known(job_id)
        bell = asyncio.Event()
        self._bells.setdefault(job_id, set()).add(bell)
        try:
            over = False
            while True:
                bell.clear()
                for event in await self._call(self._ledger.events, job_id, after):
                    after = event.id
                    yield event
                    over = event.data.get("state") in ENDED
                if over or not self._streaming:
                    return
                yield None
                try:
                    # Another gateway's job rings no bell here.
                    await asyncio.wait_for(bell.wait(), 2 * WATCH_SECONDS)
                except TimeoutError:
                    over = job_id in await self._call(self._ledger.over, [job_id])
        finally:
            self._bells[job_id].discard(bell)
            if not self._bells[job_id]:
                del self._bells[job_id]

    def _require_room(self, job_id: str, family: str, owner: str | None) -> None:
        """Refuse one more job of somebody who has as many in the queue as may be."""
        limit = self._settings.max_queued_jobs
        if self._ledger.waiting(family, owner) < limit or self._ledger.get(job_id) is not None:
            return
        usual = self._ledger.usual_seconds(family) or 1.0
        raise Overloaded(
            f"{limit} jobs wait for the family {family} already",
            retry_after=max(1, ceil(usual / self._bounds.get(family, 1))),
        )

    def _work(self, jobs: Sequence[Job]) -> Work:
        """The jobs with their pictures put into the store."""
        bare = [job.model_copy(update={"image": None, "mask": None}) for job in jobs]
        pictures = {"image": jobs[0].image, "mask": jobs[0].mask}
        kept = {name: self.store.put(content) for name, content in pictures.items() if content}
        return Work(jobs=tuple(bare), pictures=kept)

    def _forecast(self, record: Record) -> tuple[int | None, float | None]:
        if record.is_over:
            return None, None
        if record.state == "running":
            spent = time.time() - (record.started or record.created)
            return None, spent * (1 - record.progress) / record.progress if record.progress else None
        position = self._ledger.ahead(record) + 1
        usual = self._ledger.usual_seconds(record.family)
        rounds = -(-position // self._bounds[record.family]) if record.family in self._bounds else 1
        return position, usual * rounds if usual is not None else None

    async def _call(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, work, *arguments)

    def _ring(self, job_id: str) -> None:
        for bell in self._bells.get(job_id, ()):
            bell.set()

    async def _repeat(self, chore: Any, seconds: float) -> None:
        while True:
            try:
                await chore()
            except DiskFull as error:
                logger.warning("%s", error)
            except Exception:
                logger.exception("a chore of the jobs failed")
            await asyncio.sleep(seconds)

    async def _watch(self) -> None:
        """Stop here what another gateway was told to cancel."""
        if running := self._execution.running:
            for job_id in await self._call(self._ledger.over, running):
                self._execution.stop(job_id)

    async def _live(self) -> None:
        """Show that this gateway lives, and take over from those that don't."""
        if not await self._call(self._lease.renew):
            logger.warning("this gateway was taken for dead; others run its jobs")
            self._execution.abandon()
        for name in await self._call(self._lease.claim_dead):
            adopted = await self._call(self._queue.adopt, name)
            await self._call(self._lease.bury, name)
            logger.warning("gateway %s is dead; %d of its jobs were taken over", name, adopted)

    def _find_lost(self) -> None:
        """Queue what was recorded only or was dropped; fail what was given up."""
        oldest, running = time.time() - LOST_AFTER_SECONDS, self._execution.running
        waiting = [
            each for each in self._ledger.unfinished() if each.created < oldest and each.id not in running
        ]
        standing = self._queue.standing([record.id for record in waiting])
        before, self._dropped = self._dropped, {each for each, how in standing.items() if how == "dropped"}
        for record in waiting:
            if record.id not in standing:
                logger.warning("job %s was not in its queue", record.id)
                self._queue.enqueue(record.id, record.family, record.turn)
            elif record.id in self._dropped & before and self._again[record.id] < MOST_AGAIN:
                logger.warning("job %s was dropped, and begins again", record.id)
                self._again[record.id] += 1
                self._queue.begin_again(record.id, record.family, record.turn)
            elif standing[record.id] == "given up" or self._again[record.id] == MOST_AGAIN:
                error = GenerationFailed(
                    "the job was given up after many attempts; the server's log says why"
                )
                self._ledger.fail(record.id, error.body())

    async def _count(self) -> None:
        """Tell Prometheus how many jobs stand where."""
        now, standing = time.time(), await self._call(self._ledger.standing)
        counts = {(family, state): (count, now - oldest) for family, state, count, oldest in standing}
        for family in self._bounds:
            for state in ("queued", "running"):
                metrics.JOBS.set(counts.get((family, state), (0, 0.0))[0], family=family, state=state)
            metrics.JOB_AGE.set(counts.get((family, "queued"), (0, 0.0))[1], family=family)

    async def _clean(self) -> None:
        await self._call(self._find_lost)
        await self._call(self._sweep)

    def _sweep(self) -> None:
        """Remove jobs past their age, files past their number of bytes, and files that nobody has."""
        while old := self._ledger.ended_before(time.time() - 86400 * self._settings.keep_days):
            self._forget(old)
        self._ledger.expire_past(self._settings.keep_bytes)
        if self._similarity is not None:
            self._similarity.sweep(time.time() - 86400 * self._settings.keep_days)
        self._trainings.sweep([record.id for record in self._ledger.unfinished()])
        self.store.sweep(self._ledger.referred())

    def _forget(self, job_ids: list[str]) -> None:
        self._queue.forget(job_ids)
        self._ledger.forget(job_ids)


def _id(key: str | None, owner: str | None) -> str:
    """The id that goes with an idempotency key, of each owner another."""
    if not key:
        return new_id()
    return uuid.uuid5(uuid.uuid5(_KEYS, owner) if owner else _KEYS, key).hex


def _unknown(job_id: str) -> UnknownJob:
    return UnknownJob(f"there is no job {job_id[:64]!r}")
