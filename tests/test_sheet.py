"""The contact sheet: every picture is on it, in its place, and no text is cut."""

from __future__ import annotations

from PIL import Image, ImageChops, ImageFont

from jubako.sheet import _wrapped, contact_sheet

PAPER = (255, 255, 255)


def filled(size: tuple[int, int], colour: str) -> Image.Image:
    return Image.new("RGB", size, colour)


def places(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """The box of all pixels of exactly this colour."""
    bands = [
        band.point([255 if level == value else 0 for level in range(256)])
        for band, value in zip(sheet.split(), colour, strict=True)
    ]
    box = ImageChops.darker(ImageChops.darker(bands[0], bands[1]), bands[2]).getbbox()
    assert box is not None
    return box


def test_pictures_of_other_sizes_stand_in_rows_and_columns_at_one_height() -> None:
    sheet = contact_sheet(
        [
            [filled((64, 64), "#ff0000"), filled((64, 64), "#00ff00")],
            [filled((512, 256), "#0000ff"), filled((512, 256), "#ff00ff")],
        ],
        ["small", "large"],
        ["4 steps", "8 steps"],
        "a title",
        "seed 7",
    )
    red, green, blue, pink = (
        places(sheet, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 0, 255))
    )
    assert [box[3] - box[1] for box in (red, green, blue, pink)] == [256] * 4
    assert [box[2] - box[0] for box in (red, green, blue, pink)] == [256, 256, 512, 512]
    assert red[1] == green[1] < blue[1] == pink[1]
    assert red[2] <= green[0]
    assert blue[2] <= pink[0]
    assert abs((red[0] + red[2]) - (blue[0] + blue[2])) <= 1, "a column is not centred"


def test_small_pictures_are_enlarged_and_large_ones_shrunk() -> None:
    for side, shown in ((64, 192), (300, 300), (1024, 512)):
        box = places(contact_sheet([[filled((side, side), "#ff0000")]], ["m"], [""], "x"), (255, 0, 0))
        assert (box[2] - box[0], box[3] - box[1]) == (shown, shown)


def test_nothing_touches_the_edges_however_long_the_names_are() -> None:
    sheet = contact_sheet(
        [[filled((64, 64), "red")]],
        ["a-model-with-an-extremely-long-name-that-has-no-spaces-" * 3],
        ["a value of many words that is far wider than its picture " * 3],
        "word " * 300 + "x" * 500,
        "negative prompt: " + "y" * 400,
    )
    for edge in (
        (0, 0, sheet.width, 8),
        (0, 0, 8, sheet.height),
        (sheet.width - 8, 0, sheet.width, sheet.height),
        (0, sheet.height - 8, sheet.width, sheet.height),
    ):
        strip = sheet.crop(edge)
        assert strip.getcolors() == [(strip.width * strip.height, PAPER)]


def test_wrapped_text_loses_nothing_and_no_line_is_too_wide() -> None:
    font = ImageFont.load_default(size=16)
    text = "a small green star above " + "z" * 200 + " on a\nwhite\tbackground"
    wrapped = _wrapped(text, 150, font)
    assert "".join(wrapped.lines).replace(" ", "") == "".join(text.split())
    assert max(font.getlength(line) for line in wrapped.lines) <= 150
    assert _wrapped("", 150, font).lines == ()
