"""Fingerprints: near for the same picture as other files, far for others and for other colours."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from jubako.engine.fingerprint import fingerprint
from jubako.miniatures.world import arrange, parse, render

CAPTION = "a large red circle on the left of a blue background"


def picture(caption: str, side: int = 256, seed: int = 1) -> Image.Image:
    return render(arrange(parse(caption), np.random.default_rng(seed)), side)


def printed(image: Image.Image) -> str:
    return fingerprint(decoded(image))


def decoded(image: Image.Image) -> torch.Tensor:
    return torch.tensor(np.asarray(image.convert("RGB"))).movedim(-1, 0) / 255


def apart(one: str, other: str) -> int:
    assert len(one) == len(other) == 16
    return (int(one, 16) ^ int(other, 16)).bit_count()


def as_jpeg(image: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=50)
    return Image.open(buffer)


def noisy(image: Image.Image) -> Image.Image:
    noise = np.random.default_rng(1).normal(0, 5, (*image.size[::-1], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def brighter(image: Image.Image) -> Image.Image:
    return Image.fromarray((np.asarray(image) * 1.05).clip(0, 255).astype(np.uint8))


SAME: Mapping[str, Callable[[Image.Image], Image.Image]] = {
    "jpeg": as_jpeg,
    "smaller": lambda image: image.resize((96, 96)),
    "larger": lambda image: image.resize((1024, 1024)),
    "noise": noisy,
    "blur": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
    "brighter": brighter,
}


@pytest.mark.parametrize("change", SAME.values(), ids=SAME)
def test_what_files_do_to_a_picture_changes_few_bits(change: Callable[[Image.Image], Image.Image]) -> None:
    image = picture(CAPTION)
    assert apart(printed(image), printed(change(image))) <= 4


@pytest.mark.parametrize(
    "caption",
    [
        "a large red circle on the right of a blue background",
        "a large green circle on the left of a blue background",
        "a large red circle on the left of a yellow background",
        "a small white star above a large black ring on a green background",
    ],
    ids=["place", "colour", "background", "all"],
)
def test_another_place_or_colour_is_another_picture(caption: str) -> None:
    assert apart(printed(picture(CAPTION)), printed(picture(caption))) > 4


def test_half_precision_and_any_proportions_are_taken() -> None:
    image = picture(CAPTION)
    assert apart(fingerprint(decoded(image).half()), printed(image)) <= 1
    wide = image.resize((640, 96))
    assert apart(printed(wide), printed(image)) <= 4


def test_a_picture_of_one_colour_is_like_itself_under_noise() -> None:
    grey = Image.new("RGB", (256, 256), (120, 120, 120))
    assert apart(printed(grey), printed(noisy(grey))) <= 4


def test_a_clip_has_those_of_its_first_and_its_middle_frame_and_an_object_none() -> None:
    frames = [picture(CAPTION, seed=seed) for seed in range(5)]
    clip = fingerprint(torch.stack([decoded(frame) for frame in frames]))
    assert clip == printed(frames[0]) + printed(frames[2])
    assert fingerprint(torch.zeros(64, 512)) == ""
