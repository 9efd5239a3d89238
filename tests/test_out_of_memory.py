"""Memory that ends anywhere in a job or a load: a clear error, and nothing of it is left behind."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import allocate_in_vain, live_bytes, no_room
from PIL import Image
from pipelines import sd_pipeline

from jubako.catalog import Catalog, load_catalog
from jubako.memory import out_of_memory, tried_twice
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Result
from jubako.runner import Runner
from jubako.settings import load_settings
from jubako.weights.parts import FolderPart

INJECTIONS = ("denoiser", "autoencoder", "text encoder", "load", "denoiser", "autoencoder") * 4


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("catalog")
    sd_pipeline(seed=1).save_pretrained(folder / "other")
    limits = "limits: {min_side: 64, multiple_of: 8}"
    (folder / "sd.yaml").write_text(
        f"family: sd\nmodels:\n  sd2: {{weights: {{repo: null, folder: other}}, {limits}}}\n"
    )
    return load_catalog(folder)


@pytest.fixture
def runner(catalog: Catalog, tmp_path: Path) -> Iterator[Runner]:
    runner = Runner(
        catalog.families["sd"], load_settings({"JUBAKO_HOME": str(tmp_path), "JUBAKO_DEVICE": "cpu"})
    )
    yield runner
    runner.close()


def drawn(runner: Runner, catalog: Catalog, **fields: Any) -> Result:
    """The result of a small job."""
    given = {"prompt": "a large red circle", "seed": 7, "steps": 2, "width": 64, "height": 64}
    return asyncio.run(runner.generate(plan(TextToImage.model_validate({**given, **fields}), catalog)))


def pixels(result: Result) -> bytes:
    with Image.open(io.BytesIO(result.checked().content)) as image:
        return image.tobytes()


def code(result: Result) -> Any:
    assert result.error is not None, "it succeeded"
    return result.error["error"]["code"]


def pipeline(runner: Runner, model: str = "tiny-sd") -> Any:
    """What the model is made of; nobody may keep it."""
    found: Any = runner.residency._trays[model].model
    return found.pipeline


@contextmanager
def unreadable(monkeypatch: pytest.MonkeyPatch, times: int | None = None) -> Iterator[list[str]]:
    """Components that are read find no memory when most of them is there, so many of them or all."""
    read, failed = FolderPart.read, list[str]()

    def failing(part: FolderPart) -> torch.nn.Module:
        module = read(part)
        if times is None or len(failed) < times:
            failed.append(part.name)
            allocate_in_vain()
        return module

    with monkeypatch.context() as patched:
        patched.setattr(FolderPart, "read", failing)
        yield failed


def test_what_says_that_there_is_no_memory_is_recognized() -> None:
    with pytest.raises(RuntimeError) as caught:
        allocate_in_vain()
    assert out_of_memory(caught.value)
    for error in (MemoryError(), torch.OutOfMemoryError("x"), OSError(12, "Cannot allocate memory")):
        assert out_of_memory(error)
    for other in (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), OSError(28, "No space left")):
        assert not out_of_memory(other)


def test_after_each_of_24_injected_failures_the_next_request_succeeds_and_the_memory_is_free(
    runner: Runner, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = pixels(drawn(runner, catalog))
    baseline = live_bytes()
    after = []
    for number, where in enumerate(INJECTIONS):
        faults: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "denoiser": lambda: no_room(pipeline(runner).unet),
            "autoencoder": lambda: no_room(pipeline(runner).vae.decoder),
            "text encoder": lambda: no_room(pipeline(runner).text_encoder),
            "load": lambda: unreadable(monkeypatch),
        }
        own = {"load": {"model": "sd2"}, "text encoder": {"prompt": f"{number}"}}.get(where, {})
        with faults[where]() as failed:
            assert code(drawn(runner, catalog, **own)) == "out_of_memory", where
        assert failed
        assert pixels(drawn(runner, catalog)) == first
        after.append(live_bytes(at_most=baseline) - baseline)
    print(f"{len(INJECTIONS)} failures, bytes above the baseline after each: {after}")
    assert max(after) <= 0


def test_the_measure_sees_what_a_kept_error_holds(runner: Runner, catalog: Catalog) -> None:
    drawn(runner, catalog).checked()
    baseline = live_bytes()
    with pytest.raises(RuntimeError) as kept:
        allocate_in_vain()
    assert live_bytes() - baseline >= 16_000_000
    del kept


def test_a_prompt_that_finds_no_memory_once_is_encoded_again(runner: Runner, catalog: Catalog) -> None:
    expected = pixels(drawn(runner, catalog, prompt="a small blue star"))
    runner.residency._trays["tiny-sd"].model.forget_prompts()  # type: ignore[attr-defined] # of this family
    with no_room(pipeline(runner).text_encoder, times=1) as failed:
        assert pixels(drawn(runner, catalog, prompt="a small blue star")) == expected
    assert failed == [1]


def test_a_model_that_finds_no_memory_is_loaded_once_the_idle_ones_are_gone(
    runner: Runner, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn(runner, catalog).checked()
    assert runner.loaded == ("tiny-sd",)
    with unreadable(monkeypatch, times=1) as failed:
        assert drawn(runner, catalog, model="sd2").error is None
    assert len(failed) == 1
    assert runner.loaded == ("sd2",)


def test_with_nothing_to_evict_the_load_is_not_tried_again(
    runner: Runner, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    with unreadable(monkeypatch) as failed:
        result = drawn(runner, catalog, model="sd2")
    assert len(failed) == 1
    assert code(result) == "out_of_memory"
    assert result.error is not None
    assert "sd2 does not fit into the memory" in result.error["error"]["message"]
    assert drawn(runner, catalog, model="sd2").error is None


def test_work_for_a_job_is_begun_twice_and_other_failures_once() -> None:
    begun = []

    def work(error: Exception) -> None:
        begun.append(error)
        raise error

    with pytest.raises(Exception, match="does not hold this job"):
        tried_twice(lambda: work(MemoryError()))
    with pytest.raises(ValueError, match="odd"):
        tried_twice(lambda: work(ValueError("odd")))
    assert len(begun) == 3
