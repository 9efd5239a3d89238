"""The desk with a real queue: what the queue drops begins again, and not for ever."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any, cast

import pytest
from PIL import Image

from jubako.catalog import load_catalog
from jubako.errors import DiskFull, Overloaded
from jubako.job import Job
from jubako.jobs import desk as desks
from jubako.jobs.desk import MOST_AGAIN, JobDesk
from jubako.jobs.record import Record
from jubako.pictures import png
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Progress, Result
from jubako.settings import Settings


class Family:
    """Makes red pictures, and remembers in which order."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def events(self, job: Job, *, durable: bool) -> AsyncGenerator[Progress | Result, None]:
        assert durable
        self.made.append(job.id)
        await self.gate.wait()
        content = png(Image.new("RGB", (8, 8), "red"))
        yield Result(job_id=job.id, seed=job.seed, content_type="image/png", content=content)

    async def cancel(self, job: Job) -> None:
        raise AssertionError(f"nobody cancels {job.id}")


class NoTrainings:
    def remove(self, job_id: str) -> None:
        """There are none."""

    def sweep(self, unfinished: Any) -> None:
        """There are none."""


async def submitted(desk: JobDesk, key: str | None = None, owner: str | None = None) -> Record:
    job = plan(TextToImage(prompt="a red circle", model="tiny-sd", seed=7), load_catalog())
    return await desk.submit([job], b"", key, owner)


async def ended(desk: JobDesk, job_id: str) -> Record:
    """The job when it is over, lost ones being looked for all the time."""
    async with asyncio.timeout(30):
        while not (found := await desk.find(job_id, None)).is_over:
            await desk._call(desk._find_lost)
            await asyncio.sleep(0.2)
    return found


def test_jobs_outlast_a_disk_that_is_full_and_a_queue_that_drops_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("LOST_AFTER_SECONDS", 0.0), ("FULL_SECONDS", 0.1)):
        monkeypatch.setattr(desks, name, seconds)

    async def whole() -> None:
        desk = JobDesk(Settings(home=tmp_path), load_catalog(), Family(), cast("Any", NoTrainings()))
        renew, begin, failures = desk._lease.renew, desk._execution.begin, [1, 1]

        def full() -> bool:
            if failures:
                failures.pop()
                raise DiskFull("full")
            return renew()

        desk._lease.renew = full  # type: ignore[method-assign]
        await desk.open()
        early = await submitted(desk)
        assert early.state == "queued", "recorded, though nothing is run yet"
        while not desk._queue._is_open:
            await asyncio.sleep(0.05)

        async def dropped(job_id: str) -> int:
            if drops.get(job_id, 0):
                drops[job_id] -= 1
                raise RuntimeError("as DBOS when it can't write")
            return await begin(job_id)

        desk._execution.begin = dropped  # type: ignore[method-assign]
        drops: dict[str, int] = {}
        assert (await ended(desk, early.id)).state == "succeeded"
        once, always = await submitted(desk), None
        drops[once.id] = 1
        done = await ended(desk, once.id)
        assert done.state == "succeeded"
        with Image.open(io.BytesIO(await desk.content(done.outputs[0]))) as image:
            assert image.size == (8, 8)
        always = await submitted(desk)
        drops[always.id] = MOST_AGAIN + 1
        given_up = await ended(desk, always.id)
        assert given_up.state == "failed"
        assert "given up" in given_up.error["error"]["message"]  # type: ignore[index]
        await desk.close()

    asyncio.run(whole())


def test_who_has_as_many_jobs_in_the_queue_as_may_be_is_told_to_come_again(tmp_path: Path) -> None:
    async def whole() -> None:
        settings = Settings(home=tmp_path, max_queued_jobs=2)
        desk = JobDesk(settings, load_catalog(), Family(), cast("Any", NoTrainings()))
        first = await submitted(desk, "first", "ada")
        second = await submitted(desk, None, "ada")
        with pytest.raises(Overloaded, match="2 jobs wait for the family sd") as refused:
            await submitted(desk, None, "ada")
        assert (refused.value.retry_after or 0) >= 1
        assert (await submitted(desk, "first", "ada")).id == first.id, "the same job is no more of them"
        for other in ("bob", None):
            assert (await submitted(desk, None, other)).state == "queued"
        desk._ledger.cancel(second.id)
        assert (await submitted(desk, None, "ada")).state == "queued"
        desk._lock.close()

    asyncio.run(whole())


def test_the_queue_lets_owners_take_turns(tmp_path: Path) -> None:
    async def whole() -> None:
        family = Family()
        family.gate.clear()
        desk = JobDesk(Settings(home=tmp_path), load_catalog(), family, cast("Any", NoTrainings()))
        desk._queue._bounds = {"sd": 1}
        await desk.open()
        await submitted(desk)
        while not family.made:
            await asyncio.sleep(0.05)
        sent = [await submitted(desk, None, owner) for owner in ("ada", "ada", "ada", "bob", "bob")]
        family.gate.set()
        for each in sent:
            await ended(desk, each.id)
        ada, bob = [each.id for each in sent[:3]], [each.id for each in sent[3:]]
        assert family.made[1:] == [ada[0], bob[0], ada[1], bob[1], ada[2]]
        await desk.close()

    asyncio.run(whole())
