"""The runner on a small random model: results, cancelling, deadlines and failures as values."""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from pipelines import sd_pipeline

from jubako.catalog import Catalog, load_catalog
from jubako.job import Job
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Progress, Result
from jubako.runner import Runner
from jubako.settings import Settings, load_settings


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("catalog")
    sd_pipeline().save_pretrained(folder / "random")
    (folder / "broken").mkdir()
    (folder / "broken" / "model_index.json").write_text("{}")
    (folder / "sd.yaml").write_text(
        "family: sd\nmodels:\n"
        "  tiny-sd: {weights: {folder: random}}\n"
        "  sd1.4: {weights: {repo: null, folder: broken}}\n"
    )
    return load_catalog(folder)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return load_settings({"JUBAKO_HOME": str(tmp_path_factory.mktemp("home")), "JUBAKO_DEVICE": "cpu"})


@pytest.fixture(scope="module")
def runner(catalog: Catalog, settings: Settings) -> Iterator[Runner]:
    runner = Runner(catalog.families["sd"], settings)
    yield runner
    runner.close()


def job(catalog: Catalog, **fields: object) -> Job:
    return plan(TextToImage.model_validate({"prompt": "a red circle", "seed": 7, **fields}), catalog)


def error_code(result: Result) -> object:
    assert result.error is not None
    return result.error["error"]["code"]


def test_a_job_becomes_a_picture_with_its_seed_and_timings(runner: Runner, catalog: Catalog) -> None:
    result = asyncio.run(runner.generate(job(catalog, steps=3, width=96)))
    assert result.error is None
    assert result.seed == 7
    assert Image.open(io.BytesIO(result.content)).size == (96, 64)
    assert result.timings is not None
    assert min(result.timings.model_dump().values()) >= 0
    assert result.timings.denoised > 0
    assert runner.loaded == ("tiny-sd",)


def test_progress_is_told_on_the_caller_s_loop(runner: Runner, catalog: Catalog) -> None:
    told: list[Progress] = []
    result = asyncio.run(runner.generate(job(catalog, steps=4), told.append))
    assert [(progress.step, progress.steps) for progress in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert {progress.job_id for progress in told} == {result.job_id}


def test_many_jobs_at_once_give_the_pictures_they_give_alone(runner: Runner, catalog: Catalog) -> None:
    jobs = [job(catalog, seed=seed, steps=2 + seed, guidance_scale=seed) for seed in range(8)]

    async def together() -> list[Result]:
        return await asyncio.gather(*(runner.generate(one) for one in jobs))

    for one, result in zip(jobs, asyncio.run(together()), strict=True):
        alone = asyncio.run(runner.generate(one))
        pairs = zip(pixels(result), pixels(alone), strict=True)
        assert max(abs(a - b) for a, b in pairs) <= 1


def pixels(result: Result) -> bytes:
    return Image.open(io.BytesIO(result.content)).tobytes()


def test_cancelling_stops_a_job_within_a_step_and_frees_its_rows(runner: Runner, catalog: Catalog) -> None:
    long = job(catalog, steps=50)
    steps: list[int] = []

    def stop(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step == 5:
            assert runner.cancel(long.id)

    result = asyncio.run(runner.generate(long, stop))
    assert error_code(result) == "cancelled"
    # The event loop hears of the fifth step while the denoiser may already be in its sixth.
    assert max(steps) <= 6
    deadline = time.monotonic() + 5
    while runner.batcher.live_rows and time.monotonic() < deadline:
        time.sleep(0.01)
    assert runner.batcher.live_rows == 0
    assert runner.jobs == 0


def test_a_caller_that_is_cancelled_takes_its_job_along(runner: Runner, catalog: Catalog) -> None:
    async def leave() -> int:
        before = runner.batcher.forwards
        task = asyncio.ensure_future(runner.generate(job(catalog, steps=150)))
        while runner.batcher.forwards < before + 3:
            await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.2)
        return runner.batcher.live_rows

    assert asyncio.run(leave()) == 0


def test_cancelling_a_job_that_is_not_here_says_so(runner: Runner) -> None:
    assert runner.cancel("nobody") is False


def test_a_job_past_its_deadline_is_a_timeout_and_stops(catalog: Catalog, settings: Settings) -> None:
    hasty = Runner(catalog.families["sd"], settings.model_copy(update={"timeout": 0.3}))
    hasty.load(catalog.model("tiny-sd"))
    result = asyncio.run(hasty.generate(job(catalog, steps=150, width=128, height=128)))
    assert error_code(result) == "timeout"
    hasty.close()
    assert hasty.batcher.forwards < 150


def test_weights_that_are_not_on_disk_name_the_command_that_fetches_them(
    runner: Runner, catalog: Catalog
) -> None:
    result = asyncio.run(runner.generate(job(catalog, model="sd1.5")))
    assert error_code(result) == "model_not_on_disk"
    assert result.error is not None
    assert "jubako pull sd1.5" in result.error["error"]["message"]


def test_weights_that_can_not_be_loaded_are_an_error_and_others_go_on(
    runner: Runner, catalog: Catalog
) -> None:
    result = asyncio.run(runner.generate(job(catalog, model="sd1.4")))
    assert error_code(result) == "generation_failed"
    assert asyncio.run(runner.generate(job(catalog, steps=1))).error is None


def test_a_runner_is_preloaded_when_its_models_are_and_never_when_one_fails(
    catalog: Catalog, settings: Settings
) -> None:
    for names, ready in ((("tiny-sd",), True), (("tiny-sd", "sd1.4"), False)):
        starting = Runner(catalog.families["sd"], settings)
        starting.preload(names)
        starting.close()
        assert starting.preloaded is ready
        assert starting.loaded == ("tiny-sd",)


def test_closing_waits_for_the_jobs_that_run(catalog: Catalog, settings: Settings, tmp_path: Path) -> None:
    closing = Runner(catalog.families["sd"], settings.model_copy(update={"home": tmp_path}))
    closing.load(catalog.model("tiny-sd"))

    async def close_while_running() -> Result:
        task = asyncio.ensure_future(closing.generate(job(catalog, steps=20)))
        while not closing.batcher.forwards:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(closing.batcher.close)
        return await task

    assert asyncio.run(close_while_running()).error is None
    closing.close()
