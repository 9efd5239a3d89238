"""One job on the replicas of its family: on the one with the least at work, and on another where it dies.

The seed is fixed before, so that a job that is begun again gives the same picture.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from jubako import metrics
from jubako.errors import ShuttingDown
from jubako.fair_queue import Ask
from jubako.job import Job
from jubako.result import Progress, Result
from jubako.services.replicas import FAILURES, Replica, Replicas

__all__ = ["first", "generated", "heard", "no_time"]

logger = logging.getLogger(__name__)

# So often a job is begun that gets no answer: one that kills processes kills no more than these.
TRIES = 3


async def generated(replicas: Replicas, job: Job, ask: Ask, *, batched: bool) -> Result:
    """A job's result. Raises one of ``FAILURES`` when there is no answer, or FamilyUnavailable."""
    tried: list[Replica] = []
    while True:
        tried.append(replica := replicas.choose(tried))
        try:
            with replicas.at_work(replica, ask, job.id):
                return await _unless_lost(replica, replica.generate(job, batched=batched))
        except FAILURES as error:
            if not await _goes_on(job, tried, error):
                raise


async def heard(
    replicas: Replicas, job: Job, ask: Ask, *, aborted: asyncio.Future[None] | None
) -> AsyncGenerator[Progress | Result, None]:
    """A job's events, until it ends or is aborted; begun again it tells of no step twice.

    With nothing that aborts it, it is durable: whoever keeps its record asks for it again.
    """
    durable = aborted is None
    tried: list[Replica] = []
    step = 0
    while True:
        replica = await replicas.keeper(job) if durable else replicas.choose(tried)
        tried.append(replica)
        try:
            with replicas.at_work(replica, ask, job.id):
                async with aclosing(_told(replica, job, aborted)) as events:
                    async for event in events:
                        if isinstance(event, Result):
                            yield event
                            return
                        if event.step > step or event.preview:
                            step = max(step, event.step)
                            yield event
            raise ConnectionError("the stream ended before the job did")
        except FAILURES as error:
            if durable:
                await replica.failed(error)
                raise
            if not await _goes_on(job, tried, error):
                raise


async def first(*futures: asyncio.Future[Any]) -> None:
    """Wait until one of them is done."""
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)


def no_time() -> ShuttingDown:
    """What is raised where the server stops."""
    return ShuttingDown("the server is stopping, and there was no time left for this; ask again soon")


async def _goes_on(job: Job, tried: Sequence[Replica], error: BaseException) -> bool:
    """Whether a job that the last of these has not answered is to be begun once more."""
    if not await tried[-1].failed(error) or len(tried) >= TRIES:
        return False
    logger.warning("job %s is begun again: %s: %s", job.id, type(error).__name__, error)
    metrics.RETRIES.add(family=job.family)
    return True


async def _told(
    replica: Replica, job: Job, aborted: asyncio.Future[None] | None
) -> AsyncGenerator[Progress | Result, None]:
    """A job's events by one replica, until that is lost, or the job is aborted."""
    lost = asyncio.ensure_future(replica.lost())
    ends = [end for end in (lost, aborted) if end is not None]
    try:
        async with aclosing(_lines(replica.events(job, durable=aborted is None))) as lines:
            while True:
                line = asyncio.ensure_future(anext(lines, None))
                try:
                    await first(line, *ends)
                finally:
                    unheard = line.cancel()
                    await asyncio.wait({line})
                if unheard:
                    raise _silent() if lost.done() else no_time()
                if (text := line.result()) is None:
                    return
                yield _event(text)
    finally:
        lost.cancel()


async def _unless_lost(replica: Replica, call: Coroutine[Any, Any, Result]) -> Result:
    """The call's result; a failure when its replica is so long silent that there will be none."""
    work = asyncio.ensure_future(call)
    lost = asyncio.ensure_future(replica.lost())
    try:
        await first(work, lost)
        if not work.done():
            raise _silent()
        return work.result()
    finally:
        lost.cancel()
        work.cancel()


def _silent() -> ConnectionError:
    return ConnectionError("it is silent")


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
