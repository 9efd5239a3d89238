"""What a gateway does with one job: tries again, stops, times out, hands pictures on, gives way to heirs."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from PIL import Image

from jubako.catalog import load_catalog
from jubako.clip import TextToVideo
from jubako.disk import no_room
from jubako.errors import FamilyUnavailable, GenerationFailed, JubakoError
from jubako.job import Job
from jubako.jobs import execution
from jubako.jobs.execution import Execution
from jubako.jobs.ledger import Ledger
from jubako.jobs.record import TRAINING, Record, Training, Work
from jubako.jobs.store import FileStore
from jubako.jobs.tables import open_database
from jubako.pictures import png
from jubako.planning import plan
from jubako.result import Progress, Result

Made = Callable[..., Record]


class Family:
    """A family that makes grey pictures, when it is there and let."""

    def __init__(self) -> None:
        self.asked: list[Job] = []
        self.cancelled: list[str] = []
        self.failures: dict[str, list[JubakoError]] = {}
        self.gate = asyncio.Event()
        self.gate.set()

    async def events(self, job: Job, *, durable: bool) -> AsyncGenerator[Progress | Result, None]:
        assert durable
        self.asked.append(job)
        if failures := self.failures.get(job.id):
            raise failures.pop(0)
        yield Progress(job_id=job.id, step=1, steps=2)
        await self.gate.wait()
        content = png(Image.new("RGB", (96, 96), (job.seed % 256, 0, 0)))
        yield Result(job_id=job.id, seed=job.seed, content_type="image/png", content=content)

    async def cancel(self, job: Job) -> None:
        self.cancelled.append(job.id)


class Trainer:
    """Makes an adapter of nothing, when it is let."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.removed: list[str] = []

    async def run(
        self, job_id: str, training: Training, told: Callable[[str, Mapping[str, Any]], None]
    ) -> Result:
        told("progress", {"step": 5, "loss": 0.5, "phase": "training"})
        told("checkpoint", {"step": 5, "loss": 0.5})
        await self.gate.wait()
        return Result(job_id=job_id, seed=1, content_type="application/octet-stream", content=b"adapter")

    def remove(self, job_id: str) -> None:
        self.removed.append(job_id)

    def sweep(self, unfinished: Iterable[str]) -> None:
        raise AssertionError("the execution sweeps nothing")


class Setting:
    """A ledger, a store, a family, a trainer and the execution between them."""

    def __init__(self, folder: Path, timeout: float = 30) -> None:
        self.database: sa.Engine = open_database(f"sqlite:///{folder / 'jobs.sqlite'}")
        self.ledger, self.store, self.family = Ledger(self.database), FileStore(folder), Family()
        self.trainer = Trainer()
        self.execution = Execution(
            self.ledger,
            self.store,
            self.family,
            self.trainer,
            timeout=timeout,
            call=asyncio.to_thread,
            ring=lambda _: None,
        )

    async def begun(self, record: Record) -> Record:
        self.ledger.add(record)
        assert await self.execution.begin(record.id)
        return record

    def stage(self, record: Record, stage: int = 0, *earlier: Any) -> asyncio.Task[dict[str, Any]]:
        return asyncio.ensure_future(self.execution.run_stage(record.id, stage, list(earlier)))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Run a check on a setting of its own."""

    def checked(check: Callable[[Setting], Coroutine[Any, Any, None]], **options: Any) -> None:
        async def whole() -> None:
            setting = Setting(tmp_path, **options)
            try:
                await check(setting)
            finally:
                setting.database.dispose()

        asyncio.run(whole())

    return checked


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_stage_gives_files_that_are_held(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        one = await s.begun(record())
        outcome = await s.stage(one)
        (file,) = outcome["files"]
        assert s.store.get(file["digest"])
        assert s.ledger.referred() == {file["digest"]}
        await s.execution.end(one.id, outcome)
        done = s.ledger.get(one.id)
        assert done
        assert (done.state, done.outputs[0].digest) == ("succeeded", file["digest"])

    run(check)


def test_a_result_waits_for_room_and_is_made_once(
    run: Callable[..., None], record: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "LONGEST_PAUSE", 0.05)

    async def check(s: Setting) -> None:
        one = await s.begun(record())
        put, tries = s.store.put, 0

        def full(content: bytes) -> str:
            nonlocal tries
            tries += 1
            if tries < 4:
                raise no_room("JUBAKO_HOME")
            return put(content)

        monkeypatch.setattr(s.store, "put", full)
        (file,) = (await s.stage(one))["files"]
        assert s.store.get(file["digest"])
        assert (tries, len(s.family.asked)) == (4, 1)

    run(check)


def test_a_job_whose_picture_was_torn_fails_and_says_so(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        digest = s.store.put(b"picture")
        work = record().work.model_copy(update={"pictures": {"image": digest}})
        one = await s.begun(record(work=work))
        s.store.path(digest).write_bytes(b"pict")
        error = (await s.stage(one))["error"]["error"]
        assert (error["code"], s.family.asked) == ("result_expired", [])
        assert "damaged" in error["message"]

    run(check)


def test_a_family_that_is_away_is_asked_again(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        one = await s.begun(record())
        job = one.work.jobs[0]
        s.family.failures[job.id] = [FamilyUnavailable("away"), FamilyUnavailable("still away")]
        assert "files" in await s.stage(one)
        assert [asked.id for asked in s.family.asked] == [job.id] * 3

    run(check)


def test_stopping_cancels_in_the_family(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        one = await s.begun(record())
        s.family.gate.clear()
        task = s.stage(one)
        await until(lambda: bool(s.family.asked))
        assert s.execution.stop(one.id)
        assert (await task)["error"]["error"]["code"] == "cancelled"
        assert s.family.cancelled == [one.work.jobs[0].id]
        assert not s.execution.stop(one.id)

    run(check)


def test_past_the_deadline_the_family_is_told_to_stop(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        one = await s.begun(record())
        s.family.gate.clear()
        assert (await s.stage(one))["error"]["error"]["code"] == "timeout"
        assert s.family.cancelled == [one.work.jobs[0].id]

    run(check, timeout=0.2)


def test_when_one_of_several_pictures_fails_the_others_are_cancelled(
    run: Callable[..., None], record: Made
) -> None:
    async def check(s: Setting) -> None:
        one = record()
        jobs = tuple(one.work.jobs[0].siblings(3))
        one = await s.begun(one.model_copy(update={"work": Work(jobs=jobs)}))
        s.family.gate.clear()
        s.family.failures[jobs[1].id] = [GenerationFailed("no")]
        outcome = await s.stage(one)
        assert outcome["error"]["error"] == GenerationFailed("no").body()["error"]
        assert set(s.family.cancelled) == {job.id for job in jobs}

    run(check)


def test_the_second_stage_starts_from_the_first_one_s_picture(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        job = plan(TextToVideo(prompt="a red circle", seed=200), load_catalog())
        one = await s.begun(record(task="txt2vid", work=Work(jobs=(job,))))
        first = await s.stage(one)
        await s.stage(one, 1, *first["files"])
        drawn, filmed = s.family.asked
        assert (drawn.task, filmed.task, filmed.source) == ("txt2img", "img2vid", None)
        with Image.open(io.BytesIO(filmed.image or b"")) as image:
            assert image.size == (job.width, job.height)
            assert image.convert("RGB").getpixel((5, 5)) == (200, 0, 0)

    run(check)


def test_a_gateway_that_was_taken_for_dead_gives_no_job_an_end(
    run: Callable[..., None], record: Made
) -> None:
    async def check(s: Setting) -> None:
        one = await s.begun(record())
        s.family.gate.clear()
        task = s.stage(one)
        await until(lambda: bool(s.family.asked))
        s.execution.abandon()
        await asyncio.sleep(0.2)
        assert not task.done()
        assert s.family.cancelled == [], "the job goes on for the heir"
        assert not s.execution.running
        # The heir, here the same process, runs it to its end.
        s.family.gate.set()
        assert "files" in await s.stage(one)
        task.cancel()

    run(check)


def test_what_was_cancelled_while_nobody_ran_it_is_not_begun(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        one = await s.begun(record())
        s.ledger.cancel(one.id)
        assert "error" in await s.stage(one)
        assert not s.family.asked
        assert await s.execution.begin(one.id) == 0

    run(check)


def test_progress_counts_all_stages(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        job = plan(TextToVideo(prompt="x", num_inference_steps=75), load_catalog())
        one = await s.begun(record(task="txt2vid", work=Work(jobs=(job,))))
        s.family.gate.clear()
        flushing = asyncio.ensure_future(s.execution.flush_for_ever())
        task = s.stage(one)
        await until(lambda: bool((found := s.ledger.get(one.id)) and found.progress))
        halfway = s.ledger.get(one.id)
        assert halfway
        # Of 25 and 75 steps, half of the first stage's.
        assert halfway.progress == pytest.approx(0.125)
        assert (halfway.stage, halfway.step, halfway.steps) == (0, 1, 2)
        s.family.gate.set()
        await task
        flushing.cancel()

    run(check)


def training(record: Made) -> Record:
    work = Work(training=Training(name="zog", plan={"model": "tiny-sd", "steps": 10, "seed": 1}))
    return record(task=TRAINING, family=TRAINING, work=work)


def test_a_training_tells_of_its_steps_and_gives_its_adapter(run: Callable[..., None], record: Made) -> None:
    async def check(s: Setting) -> None:
        one = await s.begun(training(record))
        flushing = asyncio.ensure_future(s.execution.flush_for_ever())
        task = s.stage(one)
        await until(lambda: any(event.kind == "checkpoint" for event in s.ledger.events(one.id, 0)))
        progress = next(event for event in s.ledger.events(one.id, 0) if event.kind == "progress")
        assert (progress.data["step"], progress.data["steps"], progress.data["loss"]) == (5, 10, 0.5)
        assert progress.data["progress"] == pytest.approx(0.495)
        s.trainer.gate.set()
        outcome = await task
        assert s.store.get(outcome["files"][0]["digest"]) == b"adapter"
        assert not s.trainer.removed, "it is needed until its end is recorded"
        await s.execution.end(one.id, outcome)
        assert s.trainer.removed == [one.id]
        flushing.cancel()

    run(check)


def test_a_cancelled_training_is_removed_and_one_that_others_took_over_is_not(
    run: Callable[..., None], record: Made
) -> None:
    async def check(s: Setting) -> None:
        one, other = await s.begun(training(record)), await s.begun(training(record))
        task, abandoned = s.stage(one), s.stage(other)
        await until(lambda: set(s.execution.running) == {one.id, other.id})
        await asyncio.sleep(0.05)
        assert s.execution.stop(one.id)
        assert (await task)["error"]["error"]["code"] == "cancelled"
        s.execution.abandon()
        await asyncio.sleep(0.05)
        assert s.trainer.removed == [one.id]
        abandoned.cancel()

    run(check)
