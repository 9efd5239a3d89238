"""A subject that no miniature has seen, the plus: how it is drawn, and a checker that finds it by its pixels.

The checker knows nothing of models. It takes the frame's colour for the background, whatever differs from it
for the object, and compares the object's outline with ideal ones of its own centroid and area: it must be
nearest to the plus, and near it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy import ndimage

from jubako.miniatures.world import COLOURS, SHAPES, draw_shape

Floats = NDArray[np.float32]

SIDE = 64
PLUS = "plus"
_ARM = 0.34  # half the width of an arm, in radii
_FINE = 4
_FRAME_PX = 2
_LEAST_CONTRAST = 60.0  # of 255 levels, as a distance in RGB
_LEAST_PX = 60
_CLEAR_OVERLAP = 0.78
_ALONE = 0.92  # of all that is not background, the object's share


@dataclass(frozen=True)
class Found:
    """The outline nearest to a picture's object, how they overlap, its share of all objects, and colours.

    ``plus`` says whether it counts as the subject, in whatever colours.
    """

    shape: str
    overlap: float
    alone: float
    colour: str
    background: str

    @property
    def plus(self) -> bool:
        return self.shape == PLUS and self.overlap >= _CLEAR_OVERLAP and self.alone >= _ALONE


@dataclass(frozen=True)
class Drawn:
    """A plus as drawn: colours of the world, centre and radius in fractions of the side."""

    colour: str
    background: str
    x: float
    y: float
    radius: float


FIVE = (
    Drawn("red", "blue", 0.5, 0.5, 0.27),
    Drawn("yellow", "black", 0.3, 0.5, 0.27),
    Drawn("white", "green", 0.7, 0.5, 0.27),
    Drawn("blue", "orange", 0.5, 0.3, 0.27),
    Drawn("black", "yellow", 0.5, 0.7, 0.27),
)


def draw(drawn: Drawn, side: int = SIDE) -> Image.Image:
    """The picture, anti-aliased."""
    fine = side * _FINE
    mask = _mask(PLUS, drawn.x * fine, drawn.y * fine, drawn.radius * fine, fine)
    canvas = Image.new("RGB", (fine, fine), COLOURS[drawn.background])
    canvas.paste(COLOURS[drawn.colour], (0, 0), mask)
    return canvas.reduce(_FINE)


def find(picture: Image.Image) -> Found:
    """What a picture of 64 x 64 pixels shows, as far as its largest object goes."""
    background, colour, cover = _parted(np.asarray(picture.convert("RGB"), np.float32))
    nothing = Found("nothing", 0.0, 0.0, _named(colour), _named(background))
    labels, count = ndimage.label(cover > 0.5)
    if count == 0:
        return nothing
    areas = ndimage.sum_labels(cover, labels, range(1, count + 1))
    region = labels == int(np.argmax(areas)) + 1
    if region.sum() < _LEAST_PX:
        return nothing
    own = np.where(ndimage.binary_dilation(region, iterations=2), cover, 0).astype(np.float32)
    alone = float(areas.max() / areas.sum())
    overlap, shape = max((_overlap(own, _like(own, shape)), shape) for shape in (PLUS, *SHAPES))
    return Found(shape, overlap, alone, _named(colour), _named(background))


def _parted(pixels: Floats) -> tuple[Floats, Floats, Floats]:
    """The background's colour, the object's, and how far each pixel has gone from the one to the other."""
    frame = np.ones(pixels.shape[:2], bool)
    frame[_FRAME_PX:-_FRAME_PX, _FRAME_PX:-_FRAME_PX] = False
    background = np.median(pixels[frame], axis=0).astype(np.float32)
    distance = np.linalg.norm(pixels - background, axis=-1)
    far = np.quantile(distance, 0.98)
    if far < _LEAST_CONTRAST:
        return background, background, np.zeros(distance.shape, np.float32)
    colour = np.median(pixels[distance >= 0.7 * far], axis=0).astype(np.float32)
    way = colour - background
    cover = np.clip((pixels - background) @ way / (way @ way), 0, 1)
    # What differs from the background in another direction is no background either.
    beside = np.linalg.norm((pixels - background) - cover[..., None] * way, axis=-1)
    cover = np.maximum(cover, np.clip(beside / np.linalg.norm(way), 0, 1))
    return background, colour, np.asarray(cover, np.float32)


def _named(colour: Floats) -> str:
    """The nearest colour of the world."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def _like(cover: Floats, shape: str) -> Floats:
    """The ideal outline of a shape with the centroid and the area of this one."""
    area = float(cover.sum())
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    x, y = float((cover * xs).sum() / area), float((cover * ys).sum() / area)
    radius = float(np.sqrt(area / _unit_area(shape)))
    fine = _mask(shape, x * _FINE, y * _FINE, radius * _FINE, SIDE * _FINE)
    return np.asarray(fine.reduce(_FINE), np.float32) / np.float32(255)


def _unit_area(shape: str) -> float:
    unit = 40
    mask = _mask(shape, 1.5 * unit, 1.5 * unit, unit, 3 * unit)
    return float(np.asarray(mask, np.float32).sum() / 255 / unit**2)


def _mask(shape: str, x: float, y: float, radius: float, side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    if shape != PLUS:
        draw_shape(mask, shape, x, y, radius)
        return mask
    pen, arm = ImageDraw.Draw(mask), radius * _ARM
    pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill=255)
    pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill=255)
    return mask


def _overlap(one: Floats, other: Floats) -> float:
    """Intersection over union of two soft masks."""
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())
