"""Pictures that clients send: every kind is read rightly, and every broken one is refused by its field."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from jubako.errors import InvalidRequest
from jubako.pictures import MAX_PIXELS, alpha_varies, opaque, open_mask, open_picture, png, resized

ORIENTATION = 0x0112

# How a camera stores an upright picture under each orientation of EXIF.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def file(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corners() -> Image.Image:
    """Wider than high, with four colours of which each corner has its own."""
    image = Image.new("RGB", (4, 2))
    for i, colour in enumerate(("red", "lime", "blue", "yellow")):
        image.paste(colour, (2 * (i % 2), i // 2, 2 * (i % 2) + 2, i // 2 + 1))
    return image


def refused(data: bytes) -> str:
    with pytest.raises(InvalidRequest) as caught:
        open_picture(data, "image")
    assert caught.value.param == "image"
    return caught.value.message


@pytest.mark.parametrize("orientation", STORED)
def test_a_picture_comes_upright_whichever_way_the_camera_was_held(orientation: int) -> None:
    method = STORED[orientation]
    stored = corners() if method is None else corners().transpose(method)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    upright = open_picture(file(stored, exif=exif), "image")
    assert upright.size == (4, 2)
    assert upright.convert("RGB").tobytes() == corners().tobytes()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_are_read(kind: str) -> None:
    assert open_picture(file(Image.new("RGB", (8, 6), "red"), kind), "image").size == (8, 6)


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF"])
def test_other_formats_are_refused_with_those_that_are_read(kind: str) -> None:
    assert refused(file(Image.new("RGB", (8, 8)), kind)) == (
        "image: not a picture that can be read; send one of PNG, JPEG, WEBP"
    )


def test_what_is_transparent_gets_white_behind_it() -> None:
    half = Image.new("RGBA", (2, 1), (255, 0, 0, 128))
    half.putpixel((1, 0), (0, 0, 255, 0))
    seen = opaque(open_picture(file(half), "image"))
    assert [seen.getpixel((x, 0)) for x in (0, 1)] == [(255, 127, 127), (255, 255, 255)]


def test_a_palette_keeps_its_colours_and_its_transparent_one() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    opened = open_picture(file(image, transparency=1), "image")
    assert alpha_varies(opened)
    assert [opaque(opened).getpixel((x, 0)) for x in (0, 1)] == [(255, 0, 0), (255, 255, 255)]


def test_sixteen_bits_of_grey_become_eight_and_are_not_clipped() -> None:
    levels = np.linspace(0, 65535, 256, dtype=np.uint16).reshape(1, 256)
    seen = opaque(open_picture(file(Image.fromarray(levels)), "image"))
    grey = np.asarray(seen)[0, :, 0].astype(int)
    assert abs(grey - np.arange(256)).max() <= 1


def test_a_jpeg_in_cmyk_gets_its_colours() -> None:
    seen = opaque(open_picture(file(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), "image"))
    assert seen.mode == "RGB"
    assert seen.getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_file_that_ends_too_early_is_refused(kind: str) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = file(Image.fromarray(noise), kind)
    assert refused(data[: len(data) // 2])


def test_text_is_no_picture() -> None:
    assert "not a picture" in refused(b"hello")


def test_a_bomb_is_refused_before_it_is_unpacked() -> None:
    # A header is enough: 20,000 pixels each way, of which nothing follows.
    bomb = bytearray(file(Image.new("1", (1, 1))))
    bomb[16:24] = (20_000).to_bytes(4, "big") * 2
    bomb[29:33] = _crc(bytes(bomb[12:29]))
    assert f"past the limit of {MAX_PIXELS} pixels" in refused(bytes(bomb))
    bomb[16:24] = (9_000).to_bytes(4, "big") * 2
    bomb[29:33] = _crc(bytes(bomb[12:29]))
    assert f"past the limit of {MAX_PIXELS} pixels" in refused(bytes(bomb))


def _crc(chunk: bytes) -> bytes:
    return zlib.crc32(chunk).to_bytes(4, "big")


SEEDS = [file(corners(), kind) for kind in ("PNG", "JPEG", "WEBP")]


@settings(max_examples=300, deadline=None)
@given(
    data=st.sampled_from(SEEDS),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_a_file_with_changed_bytes_is_read_or_refused_but_never_fails(
    data: bytes, changes: list[tuple[int, int]]
) -> None:
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    try:
        opaque(open_picture(bytes(changed), "image"))
    except InvalidRequest as error:
        assert error.param == "image"


def test_a_mask_with_transparent_parts_paints_there() -> None:
    mask = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    mask.putpixel((1, 0), (255, 255, 255, 0))
    assert [open_mask(file(mask), "mask").getpixel((x, 0)) for x in (0, 1)] == [0, 255]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_a_mask_without_transparent_parts_paints_where_it_is_white(mode: str) -> None:
    mask = Image.new("L", (2, 1), 0)
    mask.putpixel((1, 0), 255)
    opened = open_mask(file(mask.convert(mode)), "mask")
    assert opened.mode == "L"
    assert [opened.getpixel((x, 0)) for x in (0, 1)] == [0, 255]


@pytest.mark.parametrize("colour", ["white", "black", (255, 255, 255, 0)])
def test_a_mask_that_is_the_same_everywhere_is_refused(colour: Any) -> None:
    with pytest.raises(InvalidRequest, match="the same everywhere; make what to paint transparent") as caught:
        open_mask(file(Image.new("RGBA", (8, 8), colour)), "mask")
    assert caught.value.param == "mask"


def test_one_transparency_over_all_of_a_picture_does_not_vary() -> None:
    assert not alpha_varies(Image.new("RGBA", (8, 8), (255, 0, 0, 128)))
    assert not alpha_varies(Image.new("RGB", (8, 8)))


def test_exact_distorts_and_cover_crops_evenly() -> None:
    image = corners().resize((400, 200), Image.Resampling.NEAREST)
    exact = resized(image, (100, 100), "exact")
    assert [exact.getpixel((x, 10)) for x in (5, 95)] == [(255, 0, 0), (0, 255, 0)]
    cover = resized(image, (100, 100), "cover")
    assert cover.tobytes() == ImageOps.fit(image, (100, 100), Image.Resampling.LANCZOS).tobytes()
    assert [cover.getpixel((x, 10)) for x in (5, 95)] == [(255, 0, 0), (0, 255, 0)]


def test_a_picture_of_the_right_size_is_not_touched() -> None:
    image = corners()
    assert resized(image, (4, 2), "cover") is image
    assert Image.open(io.BytesIO(png(image))).tobytes() == image.tobytes()
