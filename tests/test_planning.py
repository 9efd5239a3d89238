"""Requests become jobs: every field filled, every limit kept."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from jubako.catalog import load_catalog
from jubako.errors import InvalidRequest, JubakoError
from jubako.job import Job
from jubako.planning import plan
from jubako.request import ImageToImage, Inpaint, TextToImage

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
        (
            {"embeddings": list("abcdefgh"), "prompt": "<embedding:i>"},
            "embeddings",
            "9 are past the limit of 8",
        ),
        ({"prompt": "<embedding:../a>"}, "prompt", "'../a' in <embedding:…> is no name of an embedding"),
        ({"negative_prompt": "<embedding:a:1>"}, "negative_prompt", "'a:1' in <embedding:…> is no name"),
        ({"model": "tiny-sd3", "embeddings": ["a"]}, "embeddings", "tiny-sd3 takes none, only models of"),
        ({"model": "tiny-sd3", "negative_prompt": "<embedding:a>"}, "embeddings", "tiny-sd3 takes none"),
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


def file(size: tuple[int, int] = (64, 64), colour: Any = "red", corner: Any = None) -> bytes:
    image = Image.new("RGBA", size, colour)
    if corner is not None:
        image.paste(corner, (0, 0, size[0] // 2, size[1] // 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


MASK = file(colour="black", corner="white")


def started(**fields: Any) -> Job:
    asked = {"prompt": "a red circle", "image": file(), **fields}
    kind = Inpaint if "mask" in fields else ImageToImage
    return plan(kind.model_validate(asked), CATALOG)


def opened(data: bytes | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(data))


def test_a_text_to_image_job_has_no_picture_and_no_strength() -> None:
    job = planned()
    assert (job.task, job.image, job.mask, job.strength) == ("txt2img", None, None, None)


def test_a_picture_to_start_from_is_brought_to_the_job_s_size() -> None:
    job = started(image=file((200, 100)))
    assert (job.task, job.width, job.height, job.strength) == ("img2img", 128, 64, 0.75)
    assert (opened(job.image).size, opened(job.image).mode) == ((128, 64), "RGB")
    assert job.mask is None


def test_a_mask_goes_the_way_of_its_picture_and_white_is_where_to_paint() -> None:
    job = started(image=file((200, 100)), mask=file((200, 100), "black", "white"), width=64, height=64)
    mask = opened(job.mask)
    assert (job.task, mask.size, mask.mode) == ("inpaint", (64, 64), "L")
    # The sides are cropped away, so what was the left half is now a sixth less.
    assert [mask.getpixel(place) for place in ((5, 5), (60, 5), (5, 60))] == [255, 0, 0]


def test_a_mask_of_transparency_gives_the_same_job_as_one_of_brightness() -> None:
    transparent = file(colour=(0, 0, 0, 255), corner=(0, 0, 0, 0))
    assert opened(started(mask=transparent).mask).tobytes() == opened(started(mask=MASK).mask).tobytes()


@pytest.mark.parametrize("steps", [*range(1, 31), 50, 99, 100, 150])
def test_the_least_strength_that_is_named_is_one_step_and_less_is_refused(steps: int) -> None:
    with pytest.raises(InvalidRequest, match="less than one step") as caught:
        started(steps=steps, strength=0.0001)
    assert caught.value.param == "strength"
    least = float(caught.value.message.rsplit(" ", 1)[1])
    assert int(steps * least) == 1
    assert started(steps=steps, strength=least).strength == least
    with pytest.raises(InvalidRequest, match="less than one step"):
        started(steps=steps, strength=round(least - 0.001, 3))


@pytest.mark.parametrize("model", [model.name for model in CATALOG])
def test_every_model_s_own_defaults_are_at_least_one_step_of_each_of_its_tasks(model: str) -> None:
    tasks = CATALOG.model(model).tasks
    if "txt2img" in tasks:
        assert planned(model=model).task == "txt2img"
    if "img2img" in tasks:
        assert started(model=model).task == "img2img"
    if "inpaint" in tasks:
        assert started(model=model, mask=MASK).task == "inpaint"


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"strength": 0}, "strength", "would give the picture back as it is"),
        ({"image": b"GIF89a"}, "image", "send one of PNG, JPEG, WEBP"),
        ({"mask": b"GIF89a"}, "mask", "send one of PNG, JPEG, WEBP"),
        ({"mask": file(colour="white")}, "mask", "the same everywhere"),
        ({"mask": file((32, 64), "black", "white")}, "mask", "32x64 pixels, the picture 64x64"),
        ({"model": "sd1.5-inpainting"}, "model", "does not do img2img; it does: inpaint"),
        ({"width": 65}, "width", "the nearest legal are 64 and 72"),
        ({"refiner": True, "model": "sdxl"}, "refiner", "pictures of txt2img only"),
    ],
)
def test_a_picture_that_can_not_be_started_from_is_refused_by_field(
    fields: Any, param: str, message: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        started(**fields)
    assert caught.value.param == param
    assert message in caught.value.message


def test_a_model_of_nine_channels_takes_a_mask() -> None:
    job = started(model="sd1.5-inpainting", mask=MASK)
    assert (job.model, job.task) == ("sd1.5-inpainting", "inpaint")


def test_what_has_no_effect_is_a_warning() -> None:
    job = planned(model="sd-turbo", negative_prompt="green", guidance_scale=5)
    assert job.guidance_scale == 0
    assert [text.split(" is ")[0] for text in job.warnings] == ["guidance_scale", "negative_prompt"]
    assert planned().warnings == ()


def test_sdxl_is_told_its_sizes_and_other_families_are_not() -> None:
    told = planned(model="sdxl", crop=[8, 16], original_size=[512, 640]).micro_conditioning
    assert told is not None
    assert (told.original_size, told.crop, told.target_size) == ((512, 640), (8, 16), (1024, 1024))
    with pytest.raises(InvalidRequest, match="crop: tiny-sd takes no sizes and no crop"):
        planned(crop=[8, 16])


def test_the_refiner_takes_over_at_the_share_asked_for() -> None:
    assert planned(model="sdxl").refinement is None
    for asked, after in ((True, 0.8), (0.6, 0.6)):
        refinement = planned(model="sdxl", refiner=asked).refinement
        assert refinement is not None
        assert (refinement.model, refinement.after) == ("sdxl-refiner", after)
    with pytest.raises(InvalidRequest, match="refiner: tiny-sd has no refiner"):
        planned(refiner=True)


def test_a_job_is_described_without_its_pictures() -> None:
    described = started(mask=MASK).described()
    assert not {"image", "mask", "warnings", "refinement"} & set(described)
    assert len(described["image_sha256"]) == len(described["mask_sha256"]) == 64
