"""OpenAI's image routes: what they take, and the jobs that it gives."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from jubako.catalog import load_catalog
from jubako.errors import InvalidRequest, refusal
from jubako.images import ImagesEdit, ImagesGenerate, ImagesVariation, plan_images
from jubako.job import Job

CATALOG = load_catalog()


def file(colour: Any = "red", corner: Any = None, size: tuple[int, int] = (64, 64)) -> bytes:
    image = Image.new("RGBA", size, colour)
    if corner is not None:
        image.paste(corner, (0, 0, size[0] // 2, size[1] // 2))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


MASK = file("black", "white")
HOLE = file("red", (0, 0, 0, 0))


def edited(**fields: Any) -> Job:
    return plan_images(ImagesEdit.model_validate({"prompt": "x", "image": file(), **fields}), CATALOG)[0]


def opened(data: bytes | None) -> Image.Image:
    assert data is not None
    return Image.open(io.BytesIO(data))


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
        ({"size": "0x64"}, "size"),
        ({"n": 11}, "n"),
        ({"background": "transparent"}, "background"),
    ],
)
def test_openai_fields_that_can_not_be_served_are_refused(fields: Any, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        plan_images(ImagesGenerate.model_validate({"prompt": "x", **fields}), CATALOG)
    assert caught.value.param == param


def test_an_edit_with_a_mask_is_inpainting() -> None:
    job = edited(mask=MASK, strength=0.9, size="32x32")
    assert (job.task, job.strength, job.width, job.height) == ("inpaint", 0.9, 32, 32)
    assert [opened(job.mask).getpixel(place) for place in ((4, 4), (28, 28))] == [255, 0]


def test_an_edit_without_a_mask_paints_what_is_transparent() -> None:
    job = edited(image=HOLE)
    assert job.task == "inpaint"
    assert [opened(job.mask).getpixel(place) for place in ((4, 4), (60, 60))] == [255, 0]
    assert opened(job.image).getpixel((4, 4)) == (255, 255, 255)


@pytest.mark.parametrize("image", [file(), file((255, 0, 0, 128))])
def test_an_edit_of_a_picture_that_is_equally_opaque_everywhere_starts_from_it(image: bytes) -> None:
    job = edited(image=image, strength=0.5)
    assert (job.task, job.mask, job.strength) == ("img2img", None, 0.5)


def test_a_mask_wins_over_the_picture_s_own_transparency() -> None:
    job = edited(image=HOLE, mask=file("white", "black"))
    assert [opened(job.mask).getpixel(place) for place in ((4, 4), (60, 60))] == [0, 255]


def test_a_model_made_to_inpaint_needs_something_to_paint() -> None:
    assert edited(model="sd1.5-inpainting", mask=MASK).task == "inpaint"
    with pytest.raises(InvalidRequest, match=r"sd1\.5-inpainting does not do img2img; it does: inpaint"):
        edited(model="sd1.5-inpainting")


def test_pictures_of_one_edit_differ_in_their_seeds_only() -> None:
    request = ImagesEdit.model_validate({"prompt": "x", "image": file(), "mask": MASK, "n": 3, "seed": 5})
    jobs = plan_images(request, CATALOG)
    assert [job.seed for job in jobs] == [5, 6, 7]
    assert len({job.image for job in jobs}) == len({job.mask for job in jobs}) == 1


def test_a_variation_needs_no_prompt_and_is_weak() -> None:
    (job,) = plan_images(ImagesVariation(image=file()), CATALOG)
    assert (job.task, job.prompt, job.strength) == ("img2img", "", 0.6)
    (job,) = plan_images(ImagesVariation(image=file(), prompt="y", strength=0.9), CATALOG)
    assert (job.prompt, job.strength) == ("y", 0.9)


def test_one_picture_may_come_as_a_list_and_more_are_refused() -> None:
    assert ImagesEdit.model_validate({"prompt": "x", "image": [file()]}).image == file()
    with pytest.raises(ValidationError) as caught:
        ImagesEdit.model_validate({"prompt": "x", "image": [file(), file()]})
    error = refusal(caught.value.errors())
    assert (error.param, error.message) == ("image", "image: one picture is taken, not 2")


def test_openai_fields_without_a_meaning_here_are_named() -> None:
    request = ImagesGenerate.model_validate({"prompt": "x", "quality": "hd", "style": "vivid", "user": "me"})
    assert request.ignored() == ["quality is ignored", "style is ignored"]
    assert ImagesGenerate.model_validate({"prompt": "x", "quality": "auto"}).ignored() == []
    edit = ImagesEdit.model_validate({"prompt": "x", "image": b"x", "input_fidelity": "high"})
    assert edit.ignored() == ["input_fidelity is ignored"]
