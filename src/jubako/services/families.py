"""The gateway's way to the families: each request in its turn to a replica, every failure a JubakoError."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

from jubako import logs, metrics, tracing
from jubako.catalog import Catalog
from jubako.errors import Cancelled, FamilyUnavailable, JubakoError, ShuttingDown
from jubako.fair_queue import Ask, FairQueue
from jubako.job import Job
from jubako.pictures import started_from
from jubako.result import Progress, Result
from jubako.services.access import owner
from jubako.services.connection import client_gone
from jubako.services.demand import ask_of, window_of
from jubako.services.dispatch import first, generated, heard, no_time
from jubako.services.family import ModelState
from jubako.services.replicas import FAILURES, Replicas
from jubako.services.urgency import urgency
from jubako.settings import Settings

__all__ = ["Families"]

logger = logging.getLogger(__name__)

MEASURE_SECONDS = 1.0


class Families:
    """The families that this gateway reaches, by the replicas of each."""

    def __init__(self, replicas: Mapping[str, Replicas], catalog: Catalog, settings: Settings) -> None:
        self._replicas = replicas
        self._catalog = catalog
        self._settings = settings
        self.queues = {
            name: FairQueue(window_of(catalog.families[name]), settings.max_wait) for name in replicas
        }
        self._chores: list[asyncio.Task[None]] = []
        self._refusing = False

    async def open(self) -> None:
        """See how all replicas are, and from then on see to it; call it on the loop that all goes by."""
        await asyncio.gather(*(self._look(family) for family in self._replicas))
        chores = (self._measure(), *(self._watch(family) for family in self._replicas))
        self._chores = [asyncio.create_task(chore) for chore in chores]

    async def close(self) -> None:
        """Hang up."""
        for chore in self._chores:
            chore.cancel()
        await asyncio.gather(*(replicas.close() for replicas in self._replicas.values()))

    @cached_property
    def _aborted(self) -> asyncio.Future[None]:
        return asyncio.get_running_loop().create_future()

    def refuse(self) -> None:
        """Take nothing new any more; what was taken goes on."""
        self._refusing = True

    def abort(self) -> None:
        """Cancel what somebody waits for; each is answered with ShuttingDown."""
        if not self._aborted.done():
            self._aborted.set_result(None)

    @property
    def busy(self) -> bool:
        """Whether this gateway waits for a family's work."""
        return any(queue.at_work for queue in self.queues.values())

    async def _measure(self) -> None:
        """Tell Prometheus of the queues and the replicas, for ever."""
        while True:
            for family, replicas in self._replicas.items():
                metrics.READY_REPLICAS.set(len(replicas.ready), family=family)
            for family, queue in self.queues.items():
                for priority, depth in queue.depth.items():
                    metrics.QUEUE_DEPTH.set(depth, family=family, priority=priority)
                metrics.QUEUE_AGE.set(queue.age, family=family)
                metrics.AT_WORK.set(queue.at_work, family=family)
                metrics.WORK_RATE.set(queue.rate or 0.0, family=family)
            await asyncio.sleep(MEASURE_SECONDS)

    def require_room(self, jobs: Sequence[Job]) -> float | None:
        """Seconds within which all of them will be done, as a promise; Overloaded when it can't be given.

        None before a family was measured.
        """
        self._require_open()
        asks: dict[str, list[Ask]] = {}
        for job in jobs:
            for stage in (job.source, job) if job.source is not None else (job,):
                asks.setdefault(stage.family, []).append(self._ask(stage))
        promises = [self.queues[family].require_room(_together(own)) for family, own in asks.items()]
        return None if None in promises else sum(filter(None, promises))

    def require_any_room(self, family: str) -> None:
        """Overloaded when not even the smallest job could be taken now, ShuttingDown when none is."""
        self._require_open()
        if family in self.queues:
            now = urgency.get()
            self.queues[family].require_room(Ask(0.0, 1, owner(), now.priority, now.within))

    async def run(self, job: Job) -> Result:
        """One job's finished result, or its error raised. A client that goes away cancels the job."""
        if job.source is not None:
            drawn = await self.run(job.source)
            job = await asyncio.to_thread(started_from, job, drawn.content)
        logs.about(job_id=job.id, model=job.model)
        async with self._reached(job.family):
            return (await self._while_wanted(self._in_turn(job), job)).checked()

    async def run_all(self, jobs: Sequence[Job]) -> list[Result]:
        """The results of jobs that run at once. When one fails, the others are cancelled."""
        tasks = [asyncio.ensure_future(self.run(job)) for job in jobs]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()

    async def events(self, job: Job, *, durable: bool = False) -> AsyncGenerator[Progress | Result, None]:
        """A job's steps as they happen, then its result; the job's source must have been drawn before.

        Closing the generator cancels the job, but not a durable one: that goes on until it is cancelled by
        name, or nobody has asked for it for a while.
        """
        ended = False
        ask = self._ask(job)
        logs.about(job_id=job.id, model=job.model)
        aborted = None if durable else self._aborted
        events = heard(self._replicas[job.family], job, ask, aborted=aborted)
        async with self._reached(job.family), self._turn(job, ask), aclosing(events):
            try:
                async for event in events:
                    ended = isinstance(event, Result)
                    yield event
            finally:
                # A durable job is not cancelled: it goes on with the next start.
                if not ended and not durable:
                    await self.cancel(job)

    async def cancel(self, job: Job) -> None:
        """Stop a job before its next step; a family that can't be reached runs nothing of ours."""
        try:
            await self._replicas[job.family].cancel(job.id)
        except FAILURES:
            logger.warning("could not cancel job %s", job.id)

    async def ready(self) -> dict[str, bool]:
        """Which families take new work now; never takes longer than a probe."""
        answers = await asyncio.gather(*(replicas.answer() for replicas in self._replicas.values()))
        return dict(zip(self._replicas, answers, strict=True))

    async def states(self) -> dict[str, ModelState]:
        """The state of each model whose family answers in time."""
        answers = await asyncio.gather(*(replicas.states() for replicas in self._replicas.values()))
        return {name: state for answer in answers for name, state in answer.items()}

    async def _watch(self, family: str) -> None:
        while True:
            await asyncio.sleep(self._replicas[family].pause)
            try:
                await self._look(family)
            except Exception:
                logger.exception("the replicas of the family %s could not be looked at", family)

    async def _look(self, family: str) -> None:
        """See how the family's replicas are; all that are ready are kept full."""
        replicas = self._replicas[family]
        await replicas.look()
        self.queues[family].resize(window_of(self._catalog.families[family], len(replicas.ready)))

    def _require_open(self) -> None:
        if self._refusing:
            raise ShuttingDown("the server is stopping and takes nothing new; ask again soon")

    def _ask(self, job: Job) -> Ask:
        return ask_of(job, self._catalog.model(job.model), owner(), urgency.get())

    @asynccontextmanager
    async def _turn(self, job: Job, ask: Ask) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as stack:
            with tracing.span("turn", {"family": job.family, "job_id": job.id}):
                await stack.enter_async_context(self.queues[job.family].turn(ask))
            yield

    async def _in_turn(self, job: Job) -> Result:
        ask = self._ask(job)
        async with self._turn(job, ask):
            return await generated(self._replicas[job.family], job, ask, batched=self._batched(job))

    def _batched(self, job: Job) -> bool:
        return (self._settings.batching or self._catalog.families[job.family].batching.mode) == "request"

    async def _while_wanted(self, call: Coroutine[Any, Any, Result], job: Job) -> Result:
        """Await the call, but cancel the job when the client of this request goes away, or the server."""
        work = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(client_gone())
        try:
            await first(work, gone, self._aborted)
            if work.done():
                return work.result()
            if self._aborted.done():
                raise no_time()
            raise Cancelled("the client went away")
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await self.cancel(job)

    @asynccontextmanager
    async def _reached(self, family: str) -> AsyncGenerator[None, None]:
        try:
            yield
        except JubakoError:
            raise
        except FAILURES as error:
            logger.warning("family %s: %s: %s", family, type(error).__name__, error)
            raise FamilyUnavailable(
                f"the service of the family {family} is loading, down or unreachable; try again soon"
            ) from error


def _together(asks: Sequence[Ask]) -> Ask:
    """Several jobs of one request: all of the work, and the rows of the largest."""
    return replace(asks[0], work=sum(ask.work for ask in asks), rows=max(ask.rows for ask in asks))
