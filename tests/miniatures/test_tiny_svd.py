"""The shipped miniature `tiny-svd`: its parts, and clips in which the given picture moves as asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKLTemporalDecoder,
    EulerDiscreteScheduler,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from transformers import CLIPVisionModelWithProjection

from jubako.miniatures.clip_evaluation import clip_requests, evaluate_clips, figures_of_clips
from jubako.miniatures.export import load
from jubako.miniatures.motion import FRAMES
from jubako.miniatures.tiny_svd import DEFAULTS

FOLDER = Path(__file__).parents[2] / "models" / "embedded" / "tiny-svd"


@pytest.fixture(scope="module")
def pipeline() -> StableVideoDiffusionPipeline:
    return load(FOLDER)


def report() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((FOLDER / "training.json").read_text())
    return loaded


def test_parts_are_those_of_svd(pipeline: StableVideoDiffusionPipeline) -> None:
    assert isinstance(pipeline, StableVideoDiffusionPipeline)
    assert isinstance(pipeline.image_encoder, CLIPVisionModelWithProjection)
    assert isinstance(pipeline.unet, UNetSpatioTemporalConditionModel)
    assert isinstance(pipeline.vae, AutoencoderKLTemporalDecoder)
    assert isinstance(pipeline.scheduler, EulerDiscreteScheduler)
    assert pipeline.feature_extractor.size["shortest_edge"] == pipeline.image_encoder.config.image_size == 224
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["feature_extractor"] == ["transformers", "CLIPImageProcessor"]


def test_scheduler_is_that_of_svd(pipeline: StableVideoDiffusionPipeline) -> None:
    config = pipeline.scheduler.config
    assert (config.prediction_type, config.timestep_type) == ("v_prediction", "continuous")
    assert (config.use_karras_sigmas, config.timestep_spacing) == (True, "leading")
    assert (config.sigma_min, config.sigma_max) == (0.002, 700.0)


def test_recorded_figures_reach_the_targets() -> None:
    judged = report()["evaluation"]
    assert judged["clips"] >= 100
    assert judged["kept"] >= 0.90
    assert judged["first"] >= 0.95
    assert judged["spearman"] >= 0.8


def test_card_gives_the_recorded_figures() -> None:
    text = (FOLDER / "README.md").read_text()
    judged = report()["evaluation"]
    assert "license: apache-2.0" in text
    assert f"| first frame is the picture | {judged['first']:.1%} |" in text
    assert f"`motion_bucket_id`: {judged['spearman']:.3f}." in text


def test_fresh_pictures_move_as_asked(pipeline: StableVideoDiffusionPipeline) -> None:
    asked = {"steps": 10, "guidance": DEFAULTS.guidance} | DEFAULTS.asked
    judged = evaluate_clips(pipeline, clip_requests(10, seed=11), seed=11, **asked)
    misses = [(one.motion, one.verdict.misses) for one in judged if not one.verdict.kept]
    assert len(misses) <= 2, misses
    assert all(one.verdict.first for one in judged)
    assert figures_of_clips(judged)["spearman"] >= 0.8


def test_same_seed_gives_the_same_clip_and_another_seed_not_quite_the_same(
    pipeline: StableVideoDiffusionPipeline,
) -> None:
    picture = clip_requests(3, seed=12)[-1].frames()[0]

    def clip(seed: int) -> np.ndarray[Any, Any]:
        generator = torch.Generator().manual_seed(seed)
        frames = pipeline(
            picture,
            num_inference_steps=4,
            motion_bucket_id=200,
            generator=generator,
            output_type="np",
            **DEFAULTS.asked,
        ).frames[0]
        return np.asarray(frames)

    first = clip(0)
    assert first.shape == (FRAMES, 64, 64, 3)
    assert np.array_equal(first, clip(0))
    assert not np.array_equal(first, clip(1))
