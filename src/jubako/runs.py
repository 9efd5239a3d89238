"""Durable jobs as a family runs them: they outlive whoever asked for them, and are never run twice at a time.

A gateway that dies takes none of its jobs with it. Whoever takes one over asks for it again by its id, and
hears of the rest of its steps, or gets the result if it has ended meanwhile. A job that nobody asks for again
is cancelled after a while.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial

from jubako.errors import Cancelled, GenerationFailed
from jubako.job import Job
from jubako.result import Progress, Result

__all__ = ["Runs"]

logger = logging.getLogger(__name__)

KEPT_BYTES = 64 * 2**20


OnProgress = Callable[[Progress], None]


class _Run:
    """One job at work, and those who listen."""

    def __init__(self, work: Callable[[OnProgress], Awaitable[Result]]) -> None:
        self.task = asyncio.ensure_future(work(self.tell))
        self.listeners: set[asyncio.Queue[Progress | Result]] = set()
        self.giving_up: asyncio.TimerHandle | None = None

    def tell(self, event: Progress | Result) -> None:
        for listener in self.listeners:
            listener.put_nowait(event)


class Runs:
    """The durable jobs of one family process; all on one event loop."""

    def __init__(
        self,
        generate: Callable[[Job, OnProgress], Awaitable[Result]],
        grace: float,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._generate = generate
        self._grace = grace
        self._limit = kept_bytes
        self._runs: dict[str, _Run] = {}
        self._ended: OrderedDict[str, Result] = OrderedDict()
        self._bytes = 0

    async def follow(self, job: Job) -> AsyncGenerator[Progress | Result, None]:
        """The job's steps from now on, then its result; begins it unless it is at work or has just ended."""
        if ended := self._ended.get(job.id):
            yield ended
            return
        run = self._runs.get(job.id) or self._begin(job)
        if run.giving_up is not None:
            run.giving_up.cancel()
        events: asyncio.Queue[Progress | Result] = asyncio.Queue()
        run.listeners.add(events)
        try:
            while not isinstance(event := await events.get(), Result):
                yield event
            yield event
        finally:
            run.listeners.discard(events)
            if not run.listeners and not run.task.done():
                run.giving_up = asyncio.get_running_loop().call_later(self._grace, run.task.cancel)

    def has(self, job_id: str) -> bool:
        """Whether a job is at work, or has just ended with a result."""
        return job_id in self._runs or job_id in self._ended

    def give_up(self, job_id: str) -> bool:
        """Cancel a job, begun or not; False when there is none of that id."""
        run = self._runs.get(job_id)
        return run.task.cancel() if run is not None else False

    def _begin(self, job: Job) -> _Run:
        run = self._runs[job.id] = _Run(partial(self._generate, job))
        run.task.add_done_callback(lambda _: self._end(job.id, run))
        return run

    def _end(self, job_id: str, run: _Run) -> None:
        del self._runs[job_id]
        if run.task.cancelled():
            cancelled = Cancelled("the job was cancelled, or nobody asked for it again")
            run.tell(Result.failed(job_id, 0, cancelled))
            return
        if failure := run.task.exception():
            logger.error("job %s could not be run", job_id, exc_info=failure)
            run.tell(Result.failed(job_id, 0, GenerationFailed("the family can't run jobs; see its log")))
            return
        result = run.task.result()
        if result.error is None:
            self._keep(result)
        run.tell(result)

    def _keep(self, result: Result) -> None:
        """For whoever takes over a job whose gateway died before it had the result; the oldest go first."""
        self._ended[result.job_id] = result
        self._bytes += _size(result)
        while self._bytes > self._limit:
            _, oldest = self._ended.popitem(last=False)
            self._bytes -= _size(oldest)


def _size(result: Result) -> int:
    return len(result.content) + sum(len(file.content) for file in result.variants.values())
