"""Requests become jobs: every field filled, every limit kept."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jubako.catalog import load_catalog
from jubako.errors import InvalidRequest, JubakoError
from jubako.job import Job
from jubako.planning import plan, plan_images
from jubako.request import ImagesGenerate, TextToImage

CATALOG = load_catalog()


def planned(**fields: Any) -> Job:
    return plan(TextToImage.model_validate({"prompt": "a red circle", **fields}), CATALOG)


def test_unset_fields_get_the_model_s_defaults() -> None:
    job = planned(model="sd2.1")
    assert (job.family, job.width, job.height, job.num_inference_steps) == ("sd", 768, 768, 50)
    assert (job.guidance_scale, job.scheduler, job.negative_prompt) == (7.5, "DDIMScheduler", "")


def test_a_guidance_scale_of_zero_is_kept() -> None:
    assert planned(guidance_scale=0).guidance_scale == 0
    assert planned(model="sd-turbo").guidance_scale == 0


def test_the_default_model_can_be_chosen() -> None:
    assert planned().model == "tiny-sd"
    assert plan(TextToImage(prompt="x"), CATALOG, "sd1.5").model == "sd1.5"


def test_a_seed_is_drawn_anew_and_a_given_one_kept() -> None:
    assert planned(seed=7).seed == 7
    assert len({planned().seed for _ in range(20)}) == 20


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"width": 65}, "width", "65 is not a multiple of 8; the nearest legal are 64 and 72"),
        ({"height": 1000}, "height", "1000 is outside of 32 to 128 of tiny-sd"),
        ({"model": "sd1.5", "width": 1024, "height": 1024}, "width", "past the limit of 786432 pixels"),
        ({"num_inference_steps": 151}, "num_inference_steps", "tiny-sd takes 1 to 150 steps, not 151"),
        ({"guidance_scale": 31}, "guidance_scale", "31.0 is past the limit of 30"),
        ({"prompt": "x" * 4001}, "prompt", "4001 characters are past the limit of 4000"),
        ({"negative_prompt": "x" * 4001}, "negative_prompt", "4001 characters are past the limit"),
        ({"scheduler": "Eular"}, "scheduler", "Did you mean 'Euler'"),
        ({"model": "sd1.5-inpainting"}, "model", "does not do txt2img; it does: inpaint"),
        ({"model": "sd15"}, "model", "unknown model 'sd15'. Did you mean 'sd1.5'"),
    ],
)
def test_what_a_model_can_not_do_is_refused_by_field(fields: Any, param: str, message: str) -> None:
    with pytest.raises(JubakoError) as caught:
        planned(**fields)
    assert caught.value.param == param
    assert message in caught.value.message


@given(width=st.integers(1, 5000), height=st.integers(1, 5000), model=st.sampled_from(["tiny-sd", "sd1.5"]))
def test_a_planned_size_is_legal_and_what_was_asked(width: int, height: int, model: str) -> None:
    limits = CATALOG.model(model).limits
    try:
        job = planned(model=model, width=width, height=height)
    except InvalidRequest as error:
        assert error.param in {"width", "height"}
        return
    assert (job.width, job.height) == (width, height)
    assert width % limits.multiple_of == height % limits.multiple_of == 0
    assert width * height <= limits.max_pixels


def test_pictures_of_one_request_have_their_own_ids_and_seeds_that_count_up() -> None:
    jobs = plan_images(ImagesGenerate(prompt="x", n=3, seed=5), CATALOG)
    assert [job.seed for job in jobs] == [5, 6, 7]
    assert len({job.id for job in jobs}) == 3


def test_openai_sizes_are_read() -> None:
    assert plan_images(ImagesGenerate(prompt="x", size="96x64"), CATALOG)[0].width == 96
    assert plan_images(ImagesGenerate(prompt="x", size="auto"), CATALOG)[0].width == 64


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"size": "big"}, "size"),
        ({"size": "64x64", "width": 64}, "size"),
        ({"n": 11}, "n"),
        ({"background": "transparent"}, "background"),
    ],
)
def test_openai_fields_that_can_not_be_served_are_refused(fields: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan_images(ImagesGenerate.model_validate({"prompt": "x", **fields}), CATALOG)
    assert caught.value.param == param
