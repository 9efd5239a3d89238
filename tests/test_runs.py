"""Durable jobs in a family: they outlive their gateway, and are run once however often they are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import aclosing

from jubako.catalog import load_catalog
from jubako.errors import GenerationFailed
from jubako.job import Job
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Progress, Result
from jubako.runs import Runs

CATALOG = load_catalog()
STEPS = 4


class Work:
    """Steps that wait to be let go, counted."""

    def __init__(self) -> None:
        self.begun = self.done = 0
        self.gate = asyncio.Event()
        self.failure: Exception | None = None

    async def __call__(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
        self.begun += 1
        for step in range(1, STEPS + 1):
            on_progress(Progress(job_id=job.id, step=step, steps=STEPS))
            await asyncio.sleep(0)
        await self.gate.wait()
        if self.failure:
            raise self.failure
        self.done += 1
        return Result(job_id=job.id, seed=job.seed, content=job.id.encode())


def job() -> Job:
    return plan(TextToImage(prompt="a red circle"), CATALOG)


async def last(runs: Runs, one: Job) -> Result:
    """What a gateway gets that follows the job to its end."""
    async for event in runs.follow(one):
        if isinstance(event, Result):
            return event
    raise AssertionError("no result")


async def left(runs: Runs, one: Job) -> None:
    """A gateway that dies after the first step."""
    async with aclosing(runs.follow(one)) as events:
        async for event in events:
            assert isinstance(event, Progress)
            return


def test_a_job_whose_gateway_died_goes_on_and_is_taken_up() -> None:
    async def check() -> None:
        work, one = Work(), job()
        runs = Runs(work, grace=60)
        assert not runs.has(one.id)
        await left(runs, one)
        assert runs.has(one.id)
        taken_over = asyncio.ensure_future(last(runs, one))
        await asyncio.sleep(0.05)
        work.gate.set()
        assert (await taken_over).content == one.id.encode()
        assert (work.begun, work.done) == (1, 1)

    asyncio.run(check())


def test_a_job_that_ended_meanwhile_is_not_run_again() -> None:
    async def check() -> None:
        work, one = Work(), job()
        runs = Runs(work, grace=60)
        await left(runs, one)
        work.gate.set()
        while not work.done:
            await asyncio.sleep(0.01)
        assert runs.has(one.id)
        assert (await last(runs, one)).content == one.id.encode()
        assert work.begun == 1

    asyncio.run(check())


def test_a_job_that_nobody_asks_for_again_is_cancelled() -> None:
    async def check() -> None:
        work, one = Work(), job()
        runs = Runs(work, grace=0.05)
        await left(runs, one)
        await asyncio.sleep(0.2)
        work.gate.set()
        assert (await last(runs, one)).error is None
        assert (work.begun, work.done) == (2, 1)

    asyncio.run(check())


def test_two_who_follow_the_same_job_get_the_same_result() -> None:
    async def check() -> None:
        work, one = Work(), job()
        runs = Runs(work, grace=60)
        both = asyncio.gather(last(runs, one), last(runs, one))
        await asyncio.sleep(0.05)
        work.gate.set()
        first, second = await both
        assert first == second
        assert work.begun == 1

    asyncio.run(check())


def test_giving_up_tells_those_who_follow() -> None:
    async def check() -> None:
        work, one = Work(), job()
        runs = Runs(work, grace=60)
        following = asyncio.ensure_future(last(runs, one))
        await asyncio.sleep(0.05)
        assert runs.give_up(one.id)
        assert not runs.give_up("another")
        result = await following
        assert result.error
        assert result.error["error"]["code"] == "cancelled"

    asyncio.run(check())


def test_a_failure_is_a_result_and_is_not_kept() -> None:
    async def check() -> None:
        work, one = Work(), job()
        work.failure = GenerationFailed("broken")
        work.gate.set()
        runs = Runs(work, grace=60)
        assert (await last(runs, one)).error
        work.failure = None
        assert (await last(runs, one)).error is None
        assert work.begun == 2

    asyncio.run(check())


def test_only_so_many_bytes_of_results_are_kept() -> None:
    async def check() -> None:
        work = Work()
        work.gate.set()
        runs = Runs(work, grace=60, kept_bytes=70)
        jobs = [job() for _ in range(3)]
        for one in jobs:
            await last(runs, one)
        for one in jobs:
            await last(runs, one)
        # Each result has 32 bytes. The first was let go for the third, and takes the second's place now.
        assert work.begun > 3
        assert runs._bytes <= 70

    asyncio.run(check())
