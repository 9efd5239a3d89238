"""The shipped miniature `tiny-sd`: its folder, its figures, and pictures that show what was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from jubako.miniatures.evaluation import evaluate, prompts
from jubako.miniatures.export import load
from jubako.miniatures.reader import shows
from jubako.miniatures.recipe import GUIDANCE, STEPS
from jubako.miniatures.tokenizer import LENGTH, WORDS

FOLDER = Path(__file__).parents[2] / "models" / "embedded" / "tiny-sd"


@pytest.fixture(scope="module")
def pipeline() -> Iterator[StableDiffusionPipeline]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield load(FOLDER)
    torch.set_num_threads(threads)


def test_folder_holds_safetensors_and_text_only_and_is_small() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".safetensors", ".json", ".txt", ".md"}
    assert sum(path.stat().st_size for path in files) <= 14_000_000


def test_folder_has_the_layout_of_stable_diffusion() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False
    for weights in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert (FOLDER / f"{weights}.safetensors").is_file()


def test_recorded_figures_reach_the_targets() -> None:
    report = json.loads((FOLDER / "training.json").read_text())
    assert report["autoencoder"]["gate"]["ok"] >= 0.98
    assert report["evaluation"]["one_object"]["ok"] >= 0.90
    assert report["evaluation"]["two_objects"]["ok"] >= 0.75


def test_every_word_of_the_world_is_one_token(pipeline: StableDiffusionPipeline) -> None:
    for word in WORDS:
        assert len(pipeline.tokenizer.tokenize(word)) == 1, word


def test_any_text_can_be_tokenized(pipeline: StableDiffusionPipeline) -> None:
    ids = pipeline.tokenizer("Zwölf Boxkämpfer, 十二 🎨!", padding="max_length").input_ids
    assert len(ids) == LENGTH
    assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_pictures_show_the_one_object_asked_for(pipeline: StableDiffusionPipeline) -> None:
    judged = evaluate(pipeline, prompts(12, 1, seed=11), steps=STEPS, guidance=GUIDANCE, seed=11)
    misses = [(one.scene.caption(), one.verdict.misses) for one in judged if not one.verdict.ok]
    assert len(misses) <= 2, misses


@pytest.mark.parametrize("scheduler", [EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_other_schedulers_run_on_the_stock_config(
    pipeline: StableDiffusionPipeline,
    scheduler: type[EulerDiscreteScheduler | DPMSolverMultistepScheduler],
) -> None:
    caption = "a large red circle in the center of a white background"
    other = StableDiffusionPipeline(
        **pipeline.components | {"scheduler": scheduler.from_config(pipeline.scheduler.config)},
        requires_safety_checker=False,
    )
    other.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    picture = other(caption, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generator).images[
        0
    ]
    assert shows(picture, caption).ok
