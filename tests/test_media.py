"""What is written into a picture's file can be read back."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jubako.catalog import load_catalog
from jubako.job import Job
from jubako.media import EXIF_IFD, USER_COMMENT, encode_image, parameters_text, read_parameters
from jubako.planning import plan
from jubako.request import TextToImage

CATALOG = load_catalog()


def job(**fields: Any) -> Job:
    return plan(TextToImage.model_validate({"prompt": "a red circle", "seed": 7, **fields}), CATALOG)


def opened(job: Job) -> Image.Image:
    picture = Image.effect_noise((64, 64), 50).convert("RGB")
    return Image.open(io.BytesIO(encode_image(picture, job, {"commit": "abc"})))


def test_the_parameters_are_in_the_grammar_that_galleries_read() -> None:
    text = parameters_text(job(negative_prompt="blue", scheduler="DPM++ 2M Karras"))
    assert text.splitlines()[:2] == ["a red circle", "Negative prompt: blue"]
    assert text.splitlines()[2].startswith(
        "Steps: 25, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 2, Seed: 7, Size: 64x64, "
        "Model: tiny-sd, RNG: CPU, Version: jubako"
    )


words = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60)


@given(prompt=words, negative=words)
def test_the_parameters_give_the_prompts_back(prompt: str, negative: str) -> None:
    read = read_parameters(parameters_text(job(prompt=prompt, negative_prompt=negative)))
    if not prompt.startswith("Negative prompt: "):
        assert (read["prompt"], read["negative_prompt"]) == (prompt, negative)
    assert read["Seed"] == "7"


def test_a_png_carries_the_parameters_and_the_whole_job() -> None:
    made = job(prompt="ein roter Kreis, größer")
    image = opened(made)
    assert image.info["parameters"] == parameters_text(made)
    chunk = json.loads(image.info["jubako"])
    assert Job.model_validate(chunk["job"]) == made
    assert chunk["commit"] == "abc"


@pytest.mark.parametrize("output_format", ["jpeg", "webp"])
def test_other_formats_carry_the_parameters_in_exif(output_format: str) -> None:
    made = job(output_format=output_format)
    image = opened(made)
    assert image.format == output_format.upper()
    comment = image.getexif().get_ifd(EXIF_IFD)[USER_COMMENT]
    assert comment.removeprefix(b"UNICODE\0").decode("utf-16-be") == parameters_text(made)
