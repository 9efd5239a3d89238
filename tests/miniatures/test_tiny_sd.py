"""The shipped miniature `tiny-sd`: its words, and pictures that show what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, EulerDiscreteScheduler, StableDiffusionPipeline

from jubako.miniatures.evaluation import evaluate, prompts
from jubako.miniatures.export import load
from jubako.miniatures.reader import shows
from jubako.miniatures.tiny_sd import DEFAULTS
from jubako.miniatures.tokenizer import LENGTH, WORDS

FOLDER = Path(__file__).parents[2] / "models" / "embedded" / "tiny-sd"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return load(FOLDER)


def test_folder_asks_for_no_safety_checker() -> None:
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["safety_checker"] == [None, None]
    assert index["requires_safety_checker"] is False


def test_every_word_of_the_world_is_one_token(pipeline: StableDiffusionPipeline) -> None:
    for word in WORDS:
        assert len(pipeline.tokenizer.tokenize(word)) == 1, word


def test_any_text_can_be_tokenized(pipeline: StableDiffusionPipeline) -> None:
    ids = pipeline.tokenizer("Zwölf Boxkämpfer, 十二 🎨!", padding="max_length").input_ids
    assert len(ids) == LENGTH
    assert max(ids) < pipeline.text_encoder.config.vocab_size


def test_pictures_show_the_one_object_asked_for(pipeline: StableDiffusionPipeline) -> None:
    judged = evaluate(
        pipeline, prompts(12, 1, seed=11), steps=DEFAULTS.steps, guidance=DEFAULTS.guidance, seed=11
    )
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
    picture = other(
        caption,
        num_inference_steps=DEFAULTS.steps,
        guidance_scale=DEFAULTS.guidance,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    assert shows(picture, caption).ok
