"""What every shipped miniature has: a small folder of text and safetensors, and figures on target."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
TARGETS = {
    "tiny-sd": (0.90, 0.75),
    "tiny-sdxl": (0.85, 0.65),
    "tiny-sdxl-lightning": (0.85, 0.65),
    "tiny-sd3": (0.85, 0.65),
}
PARTS = {
    "tiny-sd": {"vae", "text_encoder", "unet"},
    "tiny-sdxl": {"vae", "text_encoder", "text_encoder_2", "unet"},
    "tiny-sdxl-lightning": {"vae", "text_encoder", "text_encoder_2", "unet"},
    "tiny-sd3": {"vae", "text_encoder", "text_encoder_2", "text_encoder_3", "transformer"},
    "tiny-svd": {"vae", "image_encoder", "unet"},
}
CLASSES = {
    "tiny-sd": "StableDiffusionPipeline",
    "tiny-sdxl": "StableDiffusionXLPipeline",
    "tiny-sdxl-lightning": "StableDiffusionXLPipeline",
    "tiny-sd3": "StableDiffusion3Pipeline",
    "tiny-svd": "StableVideoDiffusionPipeline",
}
# SHA256SUMS has none.
SUFFIXES = {name: {".safetensors", ".json", ".txt", ".md", ""} for name in TARGETS} | {
    "tiny-svd": {".safetensors", ".json", ".md", ""},
}


def report(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((EMBEDDED / name / "training.json").read_text())
    return loaded


@pytest.mark.parametrize("name", PARTS)
def test_folder_holds_safetensors_and_text_only_and_is_small(name: str) -> None:
    files = [path for path in (EMBEDDED / name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == SUFFIXES[name]
    assert sum(path.stat().st_size for path in files) <= 16_000_000


@pytest.mark.parametrize("name", PARTS)
def test_folder_has_the_layout_of_its_pipeline(name: str) -> None:
    index = json.loads((EMBEDDED / name / "model_index.json").read_text())
    assert index["_class_name"] == CLASSES[name]
    weights = (EMBEDDED / name).glob("*/*.safetensors")
    assert {path.parent.name for path in weights} == PARTS[name]


@pytest.mark.parametrize("name", PARTS)
def test_no_file_says_where_it_was_made(name: str) -> None:
    for path in (EMBEDDED / name).rglob("*.json"):
        assert "_name_or_path" not in path.read_text(), path


@pytest.mark.parametrize("name", TARGETS)
def test_recorded_figures_reach_the_targets(name: str) -> None:
    one, two = TARGETS[name]
    recorded = report(name)
    assert recorded["evaluation"]["prompts_each"] >= 150
    for key in ("evaluation", "evaluation_without_t5"):
        if judged := recorded.get(key):
            assert judged["one_object"]["ok"] >= one, key
            assert judged["two_objects"]["ok"] >= two, key


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sd3", "tiny-svd"])
def test_autoencoder_has_passed_its_gate(name: str) -> None:
    assert report(name)["autoencoder"]["gate"]["ok"] >= 0.98


def test_lightning_keeps_its_share_of_the_teachers_score() -> None:
    shares = report("tiny-sdxl-lightning")["share_of_teacher"]
    assert shares["one_object"] >= 0.8
    assert shares["two_objects"] >= 0.8


@pytest.mark.parametrize("name", TARGETS)
def test_card_gives_the_recorded_figures(name: str) -> None:
    text = (EMBEDDED / name / "README.md").read_text()
    judged = report(name)["evaluation"]
    assert "license: apache-2.0" in text
    assert f"| all right | {judged['one_object']['ok']:.1%} | {judged['two_objects']['ok']:.1%} |" in text
