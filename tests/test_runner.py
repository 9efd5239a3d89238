"""The runner on a small random model: results, cancelling, deadlines and failures as values."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Iterator
from concurrent.futures import wait
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pipelines import sd_pipeline

from jubako.catalog import Catalog, load_catalog
from jubako.engine.samples import Sample
from jubako.engine.ticket import Ticket
from jubako.job import Job
from jubako.pictures import png
from jubako.planning import plan
from jubako.request import Inpaint, TextToImage
from jubako.result import Progress, Result
from jubako.runner import Runner
from jubako.settings import Settings, load_settings


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("catalog")
    sd_pipeline().save_pretrained(folder / "random")
    (folder / "broken").mkdir()
    (folder / "broken" / "model_index.json").write_text("{}")
    sd_pipeline(seed=1).save_pretrained(folder / "other")
    (folder / "sd.yaml").write_text(
        "family: sd\nmodels:\n"
        "  tiny-sd: {weights: {folder: random}}\n"
        "  sd1.4: {weights: {repo: null, folder: broken}}\n"
        "  sd2: {weights: {repo: null, folder: other}, limits: {min_side: 64, multiple_of: 8}}\n"
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


def test_it_has_a_fingerprint_unless_nothing_is_compared(
    runner: Runner, catalog: Catalog, settings: Settings
) -> None:
    one, other = (asyncio.run(runner.generate(job(catalog, steps=2, seed=seed))) for seed in (7, 8))
    assert len(one.fingerprint) == len(other.fingerprint) == 16
    assert one.fingerprint != other.fingerprint
    careless = Runner(catalog.families["sd"], settings.model_copy(update={"similar_distance": "off"}))
    try:
        assert asyncio.run(careless.generate(job(catalog, steps=2))).fingerprint == ""
    finally:
        careless.close()


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
    wait(hasty.preload(("tiny-sd",)))
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
        begun = starting.preload(names)
        assert starting.preloaded is False
        wait(begun)
        assert starting.preloaded is ready
        assert starting.loaded == ("tiny-sd",)
        starting.close()


def test_closing_waits_for_the_jobs_that_run(catalog: Catalog, settings: Settings, tmp_path: Path) -> None:
    closing = Runner(catalog.families["sd"], settings.model_copy(update={"home": tmp_path}))
    wait(closing.preload(("tiny-sd",)))

    async def close_while_running() -> Result:
        task = asyncio.ensure_future(closing.generate(job(catalog, steps=20)))
        while not closing.batcher.forwards:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(closing.batcher.close)
        return await task

    assert asyncio.run(close_while_running()).error is None
    closing.close()


def test_the_states_tell_where_each_model_is(runner: Runner, catalog: Catalog) -> None:
    asyncio.run(runner.generate(job(catalog, steps=1)))
    states = runner.states()
    assert list(states) == list(catalog.families["sd"].models)
    assert states["tiny-sd"].state == "resident"
    components = sd_pipeline().components.values()
    modules = [component for component in components if isinstance(component, torch.nn.Module)]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    assert states["tiny-sd"].bytes == sum(tensor.nbytes for tensor in tensors)
    assert states["sd1.4"].state == "on_disk"
    assert states["sd1.5"].state == "missing"


@pytest.fixture
def slow_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Loading reads the real files, but only once this is set."""
    from jubako.weights.components import ComponentStore

    read = threading.Event()
    load = ComponentStore.load

    def waiting(self: ComponentStore, *arguments: Any, **options: Any) -> Any:
        read.wait(30)
        return load(self, *arguments, **options)

    monkeypatch.setattr(ComponentStore, "load", waiting)
    return read


def test_a_model_that_loads_holds_up_no_other_and_counts_as_queueing(
    catalog: Catalog, settings: Settings, slow_disk: threading.Event
) -> None:
    slow_disk.set()
    runner = Runner(catalog.families["sd"], settings)
    wait(runner.preload(("tiny-sd",)))
    slow_disk.clear()

    async def work() -> tuple[Result, Result]:
        cold = asyncio.ensure_future(runner.generate(job(catalog, model="sd2", steps=1, width=64, height=64)))
        began = time.monotonic()
        hot = await runner.generate(job(catalog, steps=2))
        await asyncio.sleep(max(0, began + 0.3 - time.monotonic()))
        assert runner.states()["sd2"].state == "loading"
        slow_disk.set()
        return hot, await cold

    hot, cold = asyncio.run(work())
    runner.close()
    assert hot.error is None
    assert cold.timings is not None
    assert cold.timings.queued >= 0.3


def test_a_job_that_waits_for_a_model_is_cancelled_at_once(
    catalog: Catalog, settings: Settings, slow_disk: threading.Event
) -> None:
    runner = Runner(catalog.families["sd"], settings)
    waiting = job(catalog)

    async def work() -> tuple[Result, float]:
        task = asyncio.ensure_future(runner.generate(waiting))
        await asyncio.sleep(0.2)
        began = time.monotonic()
        assert runner.cancel(waiting.id)
        return await task, time.monotonic() - began

    result, seconds = asyncio.run(work())
    slow_disk.set()
    runner.close()
    assert error_code(result) == "cancelled"
    assert seconds < 1


def test_a_model_is_not_evicted_under_a_job_and_no_request_is_lost(
    catalog: Catalog, settings: Settings
) -> None:
    # Room for one: every change of model evicts.
    tight = Runner(catalog.families["sd"], settings.model_copy(update={"memory_budget": 1}))
    submitted: list[tuple[Sample, Ticket]] = []
    evicted_under_samples: list[str] = []
    submit, unload = tight.batcher.submit, tight.residency._loader.unload

    def recorded(sample: Sample, ticket: Ticket) -> None:
        submitted.append((sample, ticket))
        submit(sample, ticket)

    def watched(name: str) -> None:
        live = [sample for sample, ticket in submitted if not ticket.decoded.done()]
        evicted_under_samples.extend(name for sample in live if sample.denoiser.model.name == name)  # type: ignore[attr-defined] # of this family
        submitted.clear()
        unload(name)

    tight.batcher.submit = recorded  # type: ignore[method-assign] # it watches and does what it did
    tight.residency._loader.unload = watched  # type: ignore[method-assign] # so does this
    sizes: dict[str, dict[str, int]] = {"tiny-sd": {}, "sd2": {"width": 64, "height": 64}}
    turns = [*sizes] * 4
    jobs = [job(catalog, model=model, steps=4, seed=seed, **sizes[model]) for seed, model in enumerate(turns)]

    async def work() -> list[Result]:
        return await asyncio.gather(*(tight.generate(one) for one in jobs))

    results = asyncio.run(work())
    tight.close()
    assert [result.error for result in results] == [None] * len(jobs)
    assert evicted_under_samples == []
    assert len(tight.loaded) == 1
    assert tight.residency.states()[tight.loaded[0]].bytes > 1


def test_a_finished_inpainting_keeps_the_picture_outside_of_the_mask(
    runner: Runner, catalog: Catalog
) -> None:
    picture = Image.effect_noise((64, 64), 80).convert("RGB")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (16, 16, 48, 48))
    request = Inpaint.model_validate(
        {"prompt": "a red circle", "image": png(picture), "mask": png(mask), "steps": 2, "seed": 7}
    )
    result = asyncio.run(runner.generate(plan(request, catalog)))
    image = Image.open(io.BytesIO(result.checked().content))
    assert image.crop((0, 0, 64, 14)).tobytes() == picture.crop((0, 0, 64, 14)).tobytes()
    assert image.crop((20, 20, 44, 44)).tobytes() != picture.crop((20, 20, 44, 44)).tobytes()
