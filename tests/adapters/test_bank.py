"""Adapters through the runner: beside each other and the base in one batcher, read, forgotten, refused."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lora_files import NAMES, add_four, lora_file, tensors_of
from PIL import Image

from jubako.adapters.lora import read_lora
from jubako.adapters.store import AdapterStore
from jubako.catalog import load_catalog
from jubako.errors import InvalidRequest
from jubako.job import Job
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Result
from jubako.runner import Runner
from jubako.settings import Settings, load_settings
from jubako.weights.components import ComponentStore

CATALOG = load_catalog()
FAMILY = CATALOG.families["sd"]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with four adapters of tiny-sd, one of which has layers of the text encoder too."""
    import torch

    home = tmp_path_factory.mktemp("home")
    pipeline = (
        ComponentStore(FAMILY.models)
        .load(CATALOG.model("tiny-sd"), home, torch.device("cpu"), torch.float32)
        .pipeline
    )
    add_four(AdapterStore(home), pipeline, home / "files")
    return home


@pytest.fixture
def settings(home: Path) -> Settings:
    return load_settings({"JUBAKO_HOME": str(home), "JUBAKO_DEVICE": "cpu"})


@pytest.fixture
def runner(settings: Settings) -> Iterator[Runner]:
    runner = Runner(FAMILY, settings)
    yield runner
    runner.close()


def job(home: Path, *loras: tuple[str, float], **fields: Any) -> Job:
    given = {
        "model": "tiny-sd",
        "prompt": "a large red circle on the left of a blue background",
        "seed": 3,
        "steps": 4,
    }
    listed = [{"name": name, "weight": weight} for name, weight in loras]
    request = TextToImage.model_validate(given | {"loras": listed} | fields)
    return AdapterStore(home).resolved(plan(request, CATALOG))


def together(runner: Runner, jobs: list[Job]) -> list[Result]:
    async def run() -> list[Result]:
        return list(await asyncio.gather(*(runner.generate(each) for each in jobs)))

    return asyncio.run(run())


def pixels(result: Result) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(result.checked().content))).astype(int)


def test_eight_requests_over_four_adapters_and_the_base_are_what_they_are_alone(
    runner: Runner, home: Path
) -> None:
    sets: list[tuple[tuple[str, float], ...]] = [
        (),
        (("ash", 1.0),),
        (("birch", 0.7),),
        (("cedar", -0.5), ("ash", 0.4)),
        (("dogwood", 1.0),),
        (),
        (("birch", 0.7),),
        (("dogwood", 0.2), ("birch", 0.2), ("cedar", 0.2)),
    ]
    jobs = [job(home, *loras, seed=seed, steps=12 + seed % 3) for seed, loras in enumerate(sets)]
    before = pixels(together(runner, [job(home)])[0])
    mixed = [pixels(result) for result in together(runner, jobs)]
    assert runner.batcher.rows / runner.batcher.forwards > 4  # they did share forwards
    for each, found in zip(jobs, mixed, strict=True):
        alone = pixels(together(runner, [each.model_copy(update={"id": each.id + "-again"})])[0])
        assert abs(found - alone).max() <= 2
        plain = pixels(together(runner, [job(home, seed=each.seed, steps=each.num_inference_steps)])[0])
        assert (abs(found - plain).max() > 2) == bool(each.loras)
    assert np.array_equal(pixels(together(runner, [job(home)])[0]), before)


def test_an_adapter_can_be_read_while_a_model_is_loaded(home: Path) -> None:
    import torch

    def loaded() -> Any:
        store = ComponentStore(FAMILY.models)
        return store.load(CATALOG.model("tiny-sd"), home, torch.device("cpu"), torch.float32).pipeline

    pipeline, file, done = loaded(), AdapterStore(home).find("ash").file, threading.Event()

    def read() -> int:
        count = 0
        while not done.is_set():
            count += read_lora("ash", file, pipeline, "tiny-sd").bytes > 0
        return count

    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read)
        try:
            modules = [loaded().unet for _ in range(3)]
        finally:
            done.set()
        assert reading.result() > 0
    wanted = pipeline.unet.state_dict()
    for module in (*modules, torch.nn.Linear(2, 2)):
        assert not any(tensor.is_meta for tensor in module.parameters())
    assert all(torch.equal(module.state_dict()[name], wanted[name]) for module in modules for name in wanted)


def test_who_has_an_adapter_does_not_wait_for_one_that_is_read(runner: Runner, home: Path) -> None:
    together(runner, [job(home, ("ash", 1.0))])
    model: Any = runner.residency._trays["tiny-sd"].model
    with model.bank._reading, ThreadPoolExecutor(1) as thread:  # as while one is read
        assert thread.submit(model.bank.take, job(home, ("ash", 0.5)).loras).result(10)


def test_a_tag_in_the_prompt_does_what_the_list_does(runner: Runner, home: Path) -> None:
    caption = "a large red circle on the left of a blue background"
    tagged = job(home, prompt=f"{caption} <lora:birch:0.7>")
    assert (tagged.prompt, [use.name for use in tagged.loras]) == (caption, ["birch"])
    listed = job(home, ("birch", 0.7))
    assert tagged.loras == listed.loras
    one, other = (pixels(result) for result in together(runner, [tagged, listed]))
    assert abs(one - other).max() <= 1


def test_memory_is_bounded_and_what_runs_is_not_taken_away(home: Path, settings: Settings) -> None:
    runner = Runner(FAMILY, settings.model_copy(update={"adapter_bytes": 300_000}))
    wanted = [pixels(result) for result in together(runner, [job(home, (name, 1.0)) for name in NAMES])]
    model: Any = runner.residency._trays["tiny-sd"].model
    for _ in range(3):
        for name, picture in zip(NAMES, wanted, strict=True):
            again = pixels(together(runner, [job(home, (name, 1.0))])[0])
            assert abs(again - picture).max() <= 2
            assert len(model.bank._resident) < len(NAMES)
    runner.close()


def test_prompts_are_kept_beside_adapters_that_leave_the_text_encoder_alone(
    runner: Runner, home: Path
) -> None:
    together(runner, [job(home)])
    model: Any = runner.residency._trays["tiny-sd"].model
    misses = model._kept.cache_info().misses
    together(runner, [job(home, ("ash", 1.0)), job(home, ("dogwood", 1.0))])
    assert model._kept.cache_info().misses == misses
    ash, dogwood = (model.conditioning(job(home, (name, 1.0))) for name in ("ash", "dogwood"))
    base = model.conditioning(job(home))["encoder_hidden_states"]
    assert np.array_equal(ash["encoder_hidden_states"], base)
    assert not np.array_equal(dogwood["encoder_hidden_states"], base)


def test_one_that_does_not_fit_fails_alone(runner: Runner, home: Path) -> None:
    from pipelines import sd_pipeline

    stranger = lora_file(home / "files" / "stranger.safetensors", unet=tensors_of(sd_pipeline().unet, 1))
    AdapterStore(home).add("stranger", stranger)
    fine, wrong = together(runner, [job(home, ("ash", 1.0)), job(home, ("stranger", 1.0))])
    AdapterStore(home).remove("stranger")
    assert fine.error is None
    assert wrong.error is not None
    assert wrong.error["error"]["message"].startswith("loras: stranger does not fit tiny-sd: ")


def test_names_that_there_are_not_are_listed(home: Path) -> None:
    with pytest.raises(
        InvalidRequest, match=r"there is no adapter 'ask'.* Known: ash, birch, cedar, dogwood"
    ):
        job(home, ("ask", 1.0))
    with pytest.raises(ValueError, match="String should match pattern"):
        job(home, ("../ash", 1.0))
    with pytest.raises(InvalidRequest, match="is no name of an adapter"):
        job(home, prompt="a star <lora:../ash:1>")
    with pytest.raises(InvalidRequest, match="is no weight from -4 to 4"):
        job(home, prompt="a star <lora:ash:nan>")
