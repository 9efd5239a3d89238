"""Where the catalog says that weights come from: what is refused, and what a record on disk is good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from entries import entry
from pydantic import ValidationError

from jubako.catalog import CatalogError, Model, Overlay, WeightSource, load_catalog
from jubako.weights.layout import choose_files
from jubako.weights.store import (
    OverlayRecord,
    WeightRecord,
    find_overlay,
    find_weights,
    read_record,
    write_record,
)

SD3_FILES = [
    "model_index.json",
    "text_encoder_3/config.json",
    "text_encoder_3/model-00001-of-00002.safetensors",
    "text_encoder_3/model-00002-of-00002.safetensors",
    "text_encoder_3/model.safetensors.index.json",
    "tokenizer_3/tokenizer.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
]
SD3_INDEX = {
    "text_encoder_3": ["transformers", "T5EncoderModel"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "SD3Transformer2DModel"],
}


@pytest.mark.parametrize("ending", ["ckpt", "bin", "pt", "pth", "pkl", "CKPT"])
def test_pickles_are_refused_with_the_reason(ending: str) -> None:
    told = rf"mine.{ending} is a pickle, which can run any code when it is opened.*\.safetensors"
    with pytest.raises(ValidationError, match=told):
        WeightSource.model_validate({"file": f"mine.{ending}"})
    with pytest.raises(ValidationError, match=told):
        Overlay.model_validate({"file": f"mine.{ending}"})


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ({"file": "mine.onnx"}, "mine.onnx is no .safetensors file"),
        ({"folder": "mine", "config": "sdxl"}, "config goes with file"),
        ({"folder": "mine", "file": "mine.safetensors"}, "give one of repo, folder, file and worker"),
        ({"folder": "mine", "overlay": {"repo": "a/b", "file": "/x.safetensors"}}, "is no file of a/b"),
        ({"folder": "mine", "overlay": {"repo": "a/b", "file": "../x.safetensors"}}, "is no file of a/b"),
    ],
)
def test_a_source_that_makes_no_sense_is_refused(source: Any, told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        WeightSource.model_validate(source)


def test_a_refused_file_is_named_with_its_entry(tmp_path: Path) -> None:
    (tmp_path / "sdxl.yaml").write_text("family: sdxl\nmodels: {sdxl: {weights: {overlay: {file: x.ckpt}}}}")
    with pytest.raises(CatalogError, match=r"sdxl.yaml: models.sdxl.weights.overlay: .*x.ckpt is a pickle"):
        load_catalog(tmp_path)


def test_files_are_relative_to_the_catalogs_file_unless_a_repository_has_them(tmp_path: Path) -> None:
    mine = load_catalog().model("sdxl").model_dump(mode="json", exclude={"name", "family", "weights"})
    own = {"file": "a.safetensors", "overlay": {"file": "b/c.safetensors"}}
    hubs = {"repo": "somebody/base", "overlay": {"repo": "somebody/light", "file": "b/c.safetensors"}}
    models = {
        "own": {**mine, "refiner": None, "weights": own},
        "hubs": {**mine, "refiner": None, "weights": hubs},
    }
    (tmp_path / "sdxl.yaml").write_text(json.dumps({"family": "sdxl", "models": models}))
    catalog = load_catalog(tmp_path)
    weights = catalog.model("own").weights
    assert weights.file == tmp_path / "a.safetensors"
    assert weights.overlay is not None
    assert weights.overlay.file == str(tmp_path / "b" / "c.safetensors")
    overlay = catalog.model("hubs").weights.overlay
    assert overlay is not None
    assert overlay.file == "b/c.safetensors"


def test_t5_is_not_fetched_when_left_out() -> None:
    whole = load_catalog().model("sd3.5-medium")
    assert set(choose_files(SD3_FILES, SD3_INDEX, whole)) == set(SD3_FILES)
    small = whole.model_copy(update={"weights": whole.weights.model_copy(update={"text_encoder_3": False})})
    taken = choose_files(SD3_FILES, SD3_INDEX, small)
    assert set(taken) == {name for name in SD3_FILES if "_3/" not in name}


def test_only_a_whole_denoiser_replaces_that_of_the_repository() -> None:
    denoiser = "transformer/diffusion_pytorch_model.safetensors"
    model = load_catalog().model("sd3.5-medium")
    for kind, fetched in (("denoiser", False), ("lora", True), ("motion", True), ("original", False)):
        overlay = Overlay.model_validate({"file": "x.safetensors", "kind": kind})
        laid = model.model_copy(update={"weights": model.weights.model_copy(update={"overlay": overlay})})
        taken = choose_files(SD3_FILES, SD3_INDEX, laid)
        assert (denoiser in taken) == fetched
        assert "transformer/config.json" in taken


def test_a_record_from_before_there_were_overlays_still_counts(tmp_path: Path) -> None:
    model = entry("sdxl", "sdxl", repo="somebody/base")
    old = {"model": "sdxl", "repo": "somebody/base", "commit": "c", "folder": str(tmp_path), "files": {}}
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "sdxl.json").write_text(json.dumps(old))
    assert find_weights(tmp_path, model) == tmp_path


def test_a_record_counts_for_what_its_entry_asks_for_now(tmp_path: Path) -> None:
    repo = "somebody/base"
    overlay = {"repo": "somebody/light", "file": "x.safetensors"}
    plain = entry("m", "sdxl", repo=repo)
    light = entry("m", "sdxl", repo=repo, overlay=overlay)
    (tmp_path / "x.safetensors").write_bytes(b"12")
    arrived = OverlayRecord(commit="c", folder=tmp_path, size=2, kind="denoiser", **overlay)
    record = WeightRecord(model="m", repo=repo, commit="c", folder=tmp_path)
    with_overlay = record.model_copy(update={"overlay": arrived})
    without_t5 = record.model_copy(update={"left_out": ("text_encoder_3", "tokenizer_3")})
    cases: list[tuple[WeightRecord, Model, bool]] = [
        (record, plain, True),
        (record, light, False),
        (with_overlay, light, True),
        (with_overlay, plain, False),
        (with_overlay, entry("m", "sdxl", repo=repo, overlay={**overlay, "kind": "lora"}), False),
        (with_overlay, entry("m", "sdxl", repo=repo, overlay={**overlay, "file": "y.safetensors"}), False),
        (without_t5, plain, False),
        (without_t5, entry("m", "sdxl", repo=repo, text_encoder_3=False), True),
        (record, entry("m", "sdxl", repo=repo, text_encoder_3=False), True),
        (record, entry("m", "sdxl", repo="somebody/else"), False),
    ]
    for number, (written, model, counts) in enumerate(cases):
        write_record(tmp_path, written)
        assert (read_record(tmp_path, model) == written) == counts, number
        assert (find_weights(tmp_path, model) is not None) == counts, number
    write_record(tmp_path, with_overlay)
    assert find_overlay(tmp_path, light) == tmp_path / "x.safetensors"
    assert find_overlay(tmp_path, plain) is None
