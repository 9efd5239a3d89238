"""The gateway's way to the families: by socket or by URL, with every failure a JubakoError."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeVar

import aiohttp
from bentoml.exceptions import BentoMLException
from pydantic import SecretStr

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
from jubako.services.family import ModelState
from jubako.services.urgency import urgency
from jubako.settings import Settings

__all__ = ["Families", "reached"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# A loading family leaves its port unanswered, so whoever asks about health must not wait for it.
PROBE_SECONDS = 0.7
CANCEL_SECONDS = 5
MEASURE_SECONDS = 1.0


class Families:
    """The families that this gateway reaches, each by a BentoML proxy for work and one for control."""

    def __init__(
        self, work: Mapping[str, Any], control: Mapping[str, Any], catalog: Catalog, settings: Settings
    ) -> None:
        self._work = work
        self._control = control
        self._catalog = catalog
        self._settings = settings
        self.queues = {name: FairQueue(window_of(catalog.families[name]), settings.max_wait) for name in work}

        self._refusing = False

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

    async def measure(self) -> None:
        """Tell Prometheus of the queues, for ever."""
        while True:
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
        client = self._client(job)
        by_request = (
            self._settings.batching or self._catalog.families[job.family].batching.mode
        ) == "request"
        call = self._batched(client, job) if by_request else client.generate(job=job)
        async with self._reached(job.family):
            return (await self._while_wanted(self._in_turn(call, job), job)).checked()

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
        logs.about(job_id=job.id, model=job.model)
        try:
            async with self._reached(job.family), self._turn(job):
                lines = _lines(self._client(job).generate_events(job=job, durable=durable))
                # A durable job is not cancelled: it goes on with the next start.
                async for line in lines if durable else self._until_aborted(lines):
                    event = _event(line)
                    ended = isinstance(event, Result)
                    yield event
            if not ended:
                raise FamilyUnavailable(f"the service of the family {job.family} ended before the job did")
        finally:
            if not ended and not durable:
                await self.cancel(job)

    async def cancel(self, job: Job) -> None:
        """Stop a job before its next step; a family that can't be reached runs nothing of ours."""
        try:
            call = self._control[job.family].to_async.cancel_job(job_id=job.id)
            await asyncio.wait_for(call, CANCEL_SECONDS)
        except (TimeoutError, aiohttp.ClientError, BentoMLException, OSError):
            logger.warning("could not cancel job %s", job.id)

    async def ready(self) -> dict[str, bool]:
        """Which families answer their readiness probe now; never takes longer than a probe."""
        answers = await asyncio.gather(
            *(_probe(proxy.to_async.is_ready(timeout=PROBE_SECONDS)) for proxy in self._control.values())
        )
        return {name: bool(answer) for name, answer in zip(self._control, answers, strict=True)}

    async def states(self) -> dict[str, ModelState]:
        """The state of each model whose family answers in time."""
        answers = await asyncio.gather(
            *(_probe(proxy.to_async.describe()) for proxy in self._control.values())
        )
        return {name: state for answer in answers if answer for name, state in answer.items()}

    def _require_open(self) -> None:
        if self._refusing:
            raise ShuttingDown("the server is stopping and takes nothing new; ask again soon")

    def _client(self, job: Job) -> Any:
        return self._work[job.family].to_async

    def _ask(self, job: Job) -> Ask:
        return ask_of(job, self._catalog.model(job.model), owner(), urgency.get())

    @asynccontextmanager
    async def _turn(self, job: Job) -> AsyncGenerator[None, None]:
        async with AsyncExitStack() as stack:
            with tracing.span("turn", {"family": job.family, "job_id": job.id}):
                await stack.enter_async_context(self.queues[job.family].turn(self._ask(job)))
            yield

    async def _in_turn(self, call: Coroutine[Any, Any, Result], job: Job) -> Result:
        try:
            async with self._turn(job):
                return await call
        finally:
            call.close()

    async def _batched(self, client: Any, job: Job) -> Result:
        results: list[Result] = await client.generate_batch(jobs=[job])
        return results[0]

    async def _while_wanted(self, call: Coroutine[Any, Any, Result], job: Job) -> Result:
        """Await the call, but cancel the job when the client of this request goes away, or the server."""
        work = asyncio.ensure_future(call)
        gone = asyncio.ensure_future(client_gone())
        try:
            await _first(work, gone, self._aborted)
            if work.done():
                return work.result()
            if self._aborted.done():
                raise _no_time()
            raise Cancelled("the client went away")
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                await self.cancel(job)

    async def _until_aborted(self, lines: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
        async with aclosing(lines):
            while True:
                line = asyncio.ensure_future(anext(lines, None))
                try:
                    await _first(line, self._aborted)
                finally:
                    aborted = line.cancel()
                    await asyncio.wait({line})
                if aborted:
                    raise _no_time()
                if (text := line.result()) is None:
                    return
                yield text

    @asynccontextmanager
    async def _reached(self, family: str) -> AsyncGenerator[None, None]:
        try:
            yield
        except JubakoError:
            raise
        except (TimeoutError, aiohttp.ClientError, BentoMLException, OSError) as error:
            logger.warning("family %s: %s: %s", family, type(error).__name__, error)
            raise FamilyUnavailable(
                f"the service of the family {family} is loading, down or unreachable; try again soon"
            ) from error


async def _first(*futures: asyncio.Future[Any]) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def _no_time() -> ShuttingDown:
    return ShuttingDown("the server is stopping, and there was no time left for this; ask again soon")


def _together(asks: Sequence[Ask]) -> Ask:
    """Several jobs of one request: all of the work, and the rows of the largest."""
    return replace(asks[0], work=sum(ask.work for ask in asks), rows=max(ask.rows for ask in asks))


def reached(proxy: Any, key: SecretStr | None) -> Any:
    """A family's proxy, before its first call. What it sends over TCP is JSON and has the family's key.

    By itself BentoML pickles also where it has no Unix sockets (``BENTOML_NO_UDS``, Windows' Linux).
    """
    client = proxy.to_async
    if not client.url.startswith("file:"):
        client.media_type = "application/json"
        if key is not None:
            client.default_headers["Authorization"] = f"Bearer {key.get_secret_value()}"
    return proxy


async def _lines(chunks: AsyncIterable[str]) -> AsyncGenerator[str, None]:
    """Lines that are not empty; the proxy hands on bytes as they come, and cuts a line anywhere."""
    begun: list[str] = []
    async for chunk in chunks:
        first, *others = chunk.split("\n")
        begun.append(first)
        for other in others:
            if line := "".join(begun):
                yield line
            begun = [other]


def _event(line: str) -> Progress | Result:
    fields = json.loads(line)
    return Progress.model_validate(fields) if "step" in fields else Result.model_validate_json(line)


async def _probe(answer: Coroutine[Any, Any, T]) -> T | None:
    try:
        return await asyncio.wait_for(answer, PROBE_SECONDS)
    except (TimeoutError, aiohttp.ClientError, BentoMLException, OSError):
        return None
