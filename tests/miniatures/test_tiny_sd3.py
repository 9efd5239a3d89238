"""The shipped miniature `tiny-sd3`: its parts, and pictures that show what was asked, also without T5."""

from __future__ import annotations

from pathlib import Path

import pytest
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextModelWithProjection, T5EncoderModel

from jubako.miniatures.evaluation import evaluate, prompts
from jubako.miniatures.export import load
from jubako.miniatures.sd3 import LENGTH
from jubako.miniatures.tiny_sd3 import DEFAULTS
from jubako.miniatures.tokenizer import WORDS

FOLDER = Path(__file__).parents[2] / "models" / "embedded" / "tiny-sd3"


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    return load(FOLDER)


@pytest.fixture(scope="module")
def without_t5() -> StableDiffusion3Pipeline:
    return load(FOLDER, text_encoder_3=None, tokenizer_3=None)


def test_parts_are_those_of_sd3(pipeline: StableDiffusion3Pipeline) -> None:
    assert isinstance(pipeline, StableDiffusion3Pipeline)
    assert isinstance(pipeline.text_encoder, CLIPTextModelWithProjection)
    assert isinstance(pipeline.text_encoder_2, CLIPTextModelWithProjection)
    assert isinstance(pipeline.text_encoder_3, T5EncoderModel)
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    vae = pipeline.vae.config
    assert vae.latent_channels == 16
    assert not vae.use_quant_conv
    assert not vae.use_post_quant_conv
    assert vae.shift_factor != 0


def test_no_caption_is_cut_off(pipeline: StableDiffusion3Pipeline) -> None:
    longest = (
        "a simple picture of a small yellow triangle right of a large orange triangle on an orange background"
        ", simple , flat , clean"
    )
    for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2, pipeline.tokenizer_3):
        assert tokenizer.model_max_length == LENGTH
        assert len(tokenizer(longest).input_ids) <= LENGTH
        for word in WORDS:
            assert len(tokenizer.tokenize(word)) == 1, word


def test_any_text_can_be_tokenized(pipeline: StableDiffusion3Pipeline) -> None:
    ids = pipeline.tokenizer_3("Zwölf Boxkämpfer, 十二 🎨!").input_ids
    assert max(ids) < pipeline.text_encoder_3.config.vocab_size


@pytest.mark.parametrize("objects", [1, 2])
@pytest.mark.parametrize("parts", ["pipeline", "without_t5"])
def test_pictures_show_what_was_asked(objects: int, parts: str, request: pytest.FixtureRequest) -> None:
    judged = evaluate(
        request.getfixturevalue(parts),
        prompts(20, objects, seed=11),
        steps=DEFAULTS.steps,
        guidance=DEFAULTS.guidance,
        seed=11,
        **DEFAULTS.asked,
    )
    misses = [(one.scene.caption(), one.verdict.misses) for one in judged if not one.verdict.ok]
    assert len(misses) <= 5, misses
