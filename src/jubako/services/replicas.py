"""The processes that run a family's jobs, and which of them runs the next; here the one beside a gateway."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import aiohttp
from bentoml.exceptions import BentoMLException
from pydantic import SecretStr

from jubako.balance import Balance
from jubako.errors import FamilyUnavailable
from jubako.fair_queue import Ask
from jubako.job import Job
from jubako.result import Result
from jubako.services.family import ModelState

__all__ = ["FAILURES", "PROBE_SECONDS", "Replica", "Replicas", "beside"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

FAILURES = (TimeoutError, aiohttp.ClientError, BentoMLException, OSError)
"""What a call to a replica ends in when there is no answer, or none that was meant for it."""

# A loading family leaves its port unanswered, so whoever asks about health must not wait for it.
PROBE_SECONDS = 0.7
CANCEL_SECONDS = 5
LOOK_SECONDS = 1.0
# With many replicas each is looked at less often: so many are in a second.
LOOKS = 200
# So many are asked at once whether the family takes new work.
ASKED = 4


class Replica:
    """One process of a family, its work and its control by clients of their own.

    A client holds 100 connections. When that many pictures are waited for, cancels and probes must not wait
    as well. This one is started with the gateway: its supervisor looks after it, and there is no other.
    """

    def __init__(self, name: str, work: Any, control: Any) -> None:
        self.name = name
        self._work, self._control = work, control

    @property
    def ready(self) -> bool:
        """Whether it may be given new work."""
        return True

    @property
    def may_live(self) -> bool:
        """Whether durable jobs may be at work there, also when it does not answer."""
        return True

    async def generate(self, job: Job, *, batched: bool) -> Result:
        """One job's result, collected with others by BentoML's dispatcher or not."""
        if not batched:
            result: Result = await self._work.call("generate", job=job)
            return result
        results: list[Result] = await self._work.call("generate_batch", jobs=[job])
        return results[0]

    def events(self, job: Job, *, durable: bool) -> AsyncIterable[str]:
        """A job's events as chunks of lines."""
        chunks: AsyncIterable[str] = self._work.call("generate_events", job=job, durable=durable)
        return chunks

    async def cancel(self, job_id: str) -> None:
        """Stop a job before its next step, if it is there."""
        await asyncio.wait_for(self._control.call("cancel_job", job_id=job_id), CANCEL_SECONDS)

    async def states(self) -> dict[str, ModelState]:
        """The state of each model there, when it answers in time."""
        return await _in_time(self._control.call("describe")) or {}

    async def look(self) -> bool:
        """Whether it answers its readiness probe now."""
        return bool(await _in_time(self._control.is_ready(timeout=PROBE_SECONDS)))

    async def failed(self, error: BaseException) -> bool:  # noqa: ARG002 # it is for those that look
        """Hear that work was not answered; whether another may be given it."""
        return False

    async def lost(self) -> None:
        """Return when what was given to it is to be given to another."""
        await asyncio.Event().wait()

    async def has(self, job_id: str) -> bool | None:  # noqa: ARG002 # where else could it be
        """Whether a durable job is at work or has just ended there; None when that can't be known now."""
        return True

    async def close(self) -> None:
        """Hang up."""


class Replicas:
    """All replicas of one family, and what they have at work."""

    def __init__(self, family: str, replicas: Sequence[Replica] = ()) -> None:
        self.family = family
        self._all: Sequence[Replica] = replicas
        self._balance: Balance[Replica] = Balance()
        # Where the jobs are that this gateway waits for.
        self._placed: dict[str, Replica] = {}

    @property
    def ready(self) -> list[Replica]:
        """Those that may be given new work."""
        return [replica for replica in self._all if replica.ready]

    def choose(self, tried: Collection[Replica] = ()) -> Replica:
        """The one for new work, rather none of these; FamilyUnavailable when there is none."""
        chosen = self._balance.choose(self.ready, tried)
        if chosen is None:
            raise FamilyUnavailable(
                f"no replica of the family {self.family} is ready: they load, stop or can't be reached"
            )
        return chosen

    async def keeper(self, job: Job) -> Replica:
        """The one for a durable job: that which has it already, else one for new work.

        FamilyUnavailable while one that may have it does not say so: nothing is to run twice at a time.
        """
        replicas = list(self._all)
        answers = await asyncio.gather(*(replica.has(job.id) for replica in replicas))
        if True in answers:
            return replicas[answers.index(True)]
        if None in answers:
            silent = replicas[answers.index(None)].name
            logger.info("job %s waits: %s may have it, and does not answer", job.id, silent)
            raise FamilyUnavailable(f"a replica of the family {self.family} that may have the job is silent")
        return self.choose()

    @contextmanager
    def at_work(self, replica: Replica, ask: Ask, job_id: str) -> Iterator[None]:
        """Count a job as at work there for as long as the block lasts."""
        self._balance.begin(replica, ask)
        self._placed[job_id] = replica
        try:
            yield
        finally:
            self._placed.pop(job_id, None)
            self._balance.end(replica, ask)

    async def cancel(self, job_id: str) -> None:
        """Stop a job where it is, or wherever it may be; raises the first of ``FAILURES``."""
        placed = self._placed.get(job_id)
        asked = [placed] if placed else [replica for replica in self._all if replica.may_live]
        told = await asyncio.gather(*(each.cancel(job_id) for each in asked), return_exceptions=True)
        if failures := [each for each in told if isinstance(each, BaseException)]:
            raise failures[0]

    async def states(self) -> dict[str, ModelState]:
        """Of each model the state of the replica that is nearest to serving it."""
        merged: dict[str, ModelState] = {}
        for states in await asyncio.gather(*(replica.states() for replica in self._all)):
            for name, state in states.items():
                if name not in merged or _nearness(state) > _nearness(merged[name]):
                    merged[name] = state
        return merged

    async def look(self) -> None:
        """See how they are."""

    async def answer(self) -> bool:
        """Whether one takes new work now; never takes longer than a probe."""
        return any(await asyncio.gather(*(replica.look() for replica in self.ready[:ASKED])))

    @property
    def pause(self) -> float:
        """Seconds until they are to be looked at again."""
        return max(LOOK_SECONDS, len(self._all) / LOOKS)

    async def close(self) -> None:
        """Hang up on all of them."""
        await asyncio.gather(*(replica.close() for replica in self._all))


def beside(family: str, work: Any, control: Any, key: SecretStr | None) -> Replicas:
    """The one replica that is started with the gateway, by BentoML's proxies, before their first call."""
    return Replicas(family, [Replica(family, _client(work, key), _client(control, key))])


def _client(proxy: Any, key: SecretStr | None) -> Any:
    """A proxy's client. What it sends over TCP is JSON and has the family's key.

    By itself BentoML pickles also where it has no Unix sockets (``BENTOML_NO_UDS``, Windows' Linux).
    """
    client = proxy.to_async
    if not client.url.startswith("file:"):
        client.media_type = "application/json"
        if key is not None:
            client.default_headers["Authorization"] = f"Bearer {key.get_secret_value()}"
    return client


def _nearness(state: ModelState) -> tuple[int, float]:
    return ("missing", "on_disk", "loading", "resident").index(state.state), state.loading_fraction or 0.0


async def _in_time(answer: Coroutine[Any, Any, T]) -> T | None:
    try:
        return await asyncio.wait_for(answer, PROBE_SECONDS)
    except FAILURES:
        return None
