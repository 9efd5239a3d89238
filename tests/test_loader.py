"""The loader on small random models of a family whose models share components."""

from __future__ import annotations

import asyncio
import gc
import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipelines import refiner_pipeline, sdxl_pipeline

from jubako.catalog import Catalog, load_catalog
from jubako.errors import GenerationFailed, JubakoError, ModelNotOnDisk
from jubako.loader import FamilyLoader
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.runner import Runner
from jubako.settings import Settings, load_settings

LIMITS = "limits: {min_side: 64, multiple_of: 8}"


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("catalog")
    base = sdxl_pipeline()
    base.save_pretrained(folder / "base")
    refiner_pipeline(base).save_pretrained(folder / "refiner")
    base.save_pretrained(folder / "torn")
    weights = folder / "torn" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (folder / "sdxl.yaml").write_text(
        "family: sdxl\nmodels:\n"
        f"  sdxl: {{weights: {{repo: null, variant: null, folder: base}}, {LIMITS}}}\n"
        f"  sdxl-refiner: {{weights: {{repo: null, variant: null, folder: refiner}}, {LIMITS}}}\n"
        f"  sdxl-inpainting: {{weights: {{repo: null, variant: null, folder: torn}}, {LIMITS}}}\n"
    )
    return load_catalog(folder)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings({"JUBAKO_HOME": str(tmp_path), "JUBAKO_DEVICE": "cpu"})


@pytest.fixture
def loader(catalog: Catalog, settings: Settings) -> FamilyLoader:
    return FamilyLoader(catalog.families["sdxl"], settings, torch.device("cpu"))


def ignored(_: float) -> None:
    """Nobody listens."""


def test_what_models_share_is_needed_once(loader: FamilyLoader) -> None:
    base, refiner = loader.needed(["sdxl"]), loader.needed(["sdxl-refiner"])
    both = loader.needed(["sdxl", "sdxl-refiner"])
    assert max(base, refiner) < both < base + refiner
    told: list[float] = []
    loader.load("sdxl", told.append)
    assert told[0] == 0
    assert told == sorted(told)
    assert told[-1] == 1
    assert loader.needed(["sdxl"]) == 0
    assert loader.needed(["sdxl-refiner"]) == both - base
    loader.load("sdxl-refiner", ignored)
    # The files' headers count what the modules take but for buffers that are computed.
    assert both <= loader.bytes <= 1.1 * both
    assert loader.bytes < loader.bytes_of("sdxl") + loader.bytes_of("sdxl-refiner")
    before = loader.bytes
    freed = loader.freed_by("sdxl")
    loader.unload("sdxl")
    assert loader.bytes == before - freed
    loader.unload("sdxl-refiner")
    assert loader.bytes == 0


def test_what_is_unloaded_is_gone(loader: FamilyLoader) -> None:
    gc.collect()
    before = count_of_parameters()
    model = loader.load("sdxl", ignored)
    assert count_of_parameters() > before
    del model
    loader.unload("sdxl")
    assert count_of_parameters() == before


def test_a_load_that_fails_leaves_nothing_behind(loader: FamilyLoader) -> None:
    gc.collect()
    before = count_of_parameters()
    with pytest.raises(JubakoError) as caught:
        loader.load("sdxl-inpainting", ignored)
    # Even while the error is still held.
    assert isinstance(caught.value, JubakoError)
    assert count_of_parameters() == before
    assert loader.bytes == 0


def count_of_parameters() -> int:
    # Not isinstance: it asks objects for their class, and some of torch's answer with a warning.
    return sum(type(each) is torch.nn.Parameter for each in gc.get_objects())


def test_a_family_s_own_failure_is_told_without_its_words(
    loader: FamilyLoader, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrap(*_: object) -> None:
        raise RuntimeError("somewhere inside")

    monkeypatch.setattr(loader, "_wrap", wrap)
    with pytest.raises(GenerationFailed, match=r"^the weights of sdxl could not be loaded$"):
        loader.load("sdxl", ignored)
    assert "somewhere inside" in caplog.text
    assert loader.bytes == 0


def test_weights_that_were_not_fetched_are_named_before_anything_is_evicted(loader: FamilyLoader) -> None:
    with pytest.raises(ModelNotOnDisk, match="jubako pull sdxl-turbo"):
        loader.needed(["sdxl", "sdxl-turbo"])


def test_a_job_with_a_refiner_runs_on_both_models(catalog: Catalog, settings: Settings) -> None:
    # Past a budget for one byte both are loaded as one.
    runner = Runner(catalog.families["sdxl"], settings.model_copy(update={"memory_budget": 1}))
    fields = {"prompt": "a red circle", "model": "sdxl", "steps": 4, "width": 64, "height": 64, "seed": 7}
    refined = plan(TextToImage.model_validate({**fields, "refiner": 0.5}), catalog)
    result = asyncio.run(runner.generate(refined)).checked()
    assert set(runner.loaded) == {"sdxl", "sdxl-refiner"}
    alone = asyncio.run(runner.generate(plan(TextToImage.model_validate(fields), catalog))).checked()
    runner.close()
    pictures = [Image.open(io.BytesIO(each.content)).tobytes() for each in (result, alone)]
    assert pictures[0] != pictures[1]
