"""A contact sheet: pictures in rows and columns with their names, under a title. Pillow only."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

__all__ = ["contact_sheet"]

PAPER, INK, PALE = "white", (20, 20, 20), (110, 110, 110)
GAP, MARGIN = 8, 16
LEAST_HEIGHT, MOST_HEIGHT = 192, 512
LEAST_WIDTH = 480

# In heights of a picture: the fonts of the title, the names and the notes, and the width of a row's name.
FONTS = (0.1, 0.08, 0.07)
ROW_NAME = 0.9

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class _Text:
    """Lines that fit a width, and the height that they take."""

    lines: tuple[str, ...]
    font: Font

    @property
    def line_height(self) -> int:
        box = self.font.getbbox("Åg")
        return int(box[3] - box[1]) + 6

    @property
    def height(self) -> int:
        return self.line_height * len(self.lines)

    @property
    def width(self) -> int:
        return max((_ceil(self.font.getlength(line)) for line in self.lines), default=0)

    def draw(
        self, on: ImageDraw.ImageDraw, left: int, top: int, width: int, colour: tuple[int, int, int]
    ) -> None:
        """Write the lines, each in the middle of the width; at its left where the width is 0."""
        for line in self.lines:
            shift = max(0, (width - _ceil(self.font.getlength(line))) // 2)
            on.text((left + shift, top), line, fill=colour, font=self.font)
            top += self.line_height


def contact_sheet(
    pictures: Sequence[Sequence[Image.Image]],
    rows: Sequence[str],
    columns: Sequence[str],
    title: str,
    subtitle: str = "",
) -> Image.Image:
    """The pictures, all scaled to one height, with a name before each row and one over each column."""
    tallest = max(picture.height for row in pictures for picture in row)
    height = min(max(tallest, LEAST_HEIGHT), MOST_HEIGHT)
    large, normal, small = (ImageFont.load_default(size=round(height * share)) for share in FONTS)
    scaled = [[_scaled(picture, height) for picture in row] for row in pictures]
    widths = [max(row[i].width for row in scaled) for i in range(len(columns))]
    row_names = [_wrapped(name, round(height * ROW_NAME), normal) for name in rows]
    column_names = [_wrapped(name, width, normal) for name, width in zip(columns, widths, strict=True)]
    left = MARGIN + max(name.width for name in row_names) + 2 * GAP
    full = max(left + sum(widths) + GAP * (len(widths) - 1) + MARGIN, LEAST_WIDTH)
    heading = _wrapped(title, full - 2 * MARGIN, large)
    notes = _wrapped(subtitle, full - 2 * MARGIN, small)
    top = MARGIN + heading.height + GAP // 2 + notes.height + 2 * GAP
    below_names = top + max(name.height for name in column_names) + (GAP if any(columns) else 0)
    row_heights = [max(height, name.height) for name in row_names]

    sheet = Image.new("RGB", (full, below_names + sum(row_heights) + GAP * (len(rows) - 1) + MARGIN), PAPER)
    on = ImageDraw.Draw(sheet)
    heading.draw(on, MARGIN, MARGIN, 0, INK)
    notes.draw(on, MARGIN, MARGIN + heading.height + GAP // 2, 0, PALE)
    for x, width, name in zip(_starts(left, widths), widths, column_names, strict=True):
        name.draw(on, x, top, width, INK)
    for y, row_height, name, row in zip(
        _starts(below_names, row_heights), row_heights, row_names, scaled, strict=True
    ):
        name.draw(on, MARGIN, y + (row_height - name.height) // 2, 0, INK)
        for x, width, picture in zip(_starts(left, widths), widths, row, strict=True):
            sheet.paste(picture, (x + (width - picture.width) // 2, y + (row_height - height) // 2))
    return sheet


def _scaled(picture: Image.Image, height: int) -> Image.Image:
    width = max(1, round(picture.width * height / picture.height))
    return picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)


def _starts(first: int, sizes: Sequence[int]) -> Iterator[int]:
    for size in sizes:
        yield first
        first += size + GAP


def _wrapped(text: str, width: int, font: Font) -> _Text:
    """The text in lines of at most this width, broken between words and, where one is too long, within it."""
    lines: list[str] = []
    line = ""
    for word in re.findall(r"\S+", text):
        longer = f"{line} {word}" if line else word
        if font.getlength(longer) <= width:
            line = longer
            continue
        if line:
            lines.append(line)
        *parts, line = _pieces(word, width, font)
        lines.extend(parts)
    return _Text((*lines, line) if line else tuple(lines), font)


def _pieces(word: str, width: int, font: Font) -> Iterator[str]:
    piece = ""
    for letter in word:
        if piece and font.getlength(piece + letter) > width:
            yield piece
            piece = ""
        piece += letter
    yield piece


def _ceil(length: float) -> int:
    return int(-(-length // 1))
