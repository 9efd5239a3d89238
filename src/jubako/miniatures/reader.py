"""The pixel checker: reads what a picture shows, from its pixels alone, and compares it with a caption.

Nearest palette colour, connected regions, and for each region the best match among ideal masks of the five
shapes. It knows nothing of models, so it judges rendered and generated pictures alike. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from jubako.miniatures.world import (
    COLOURS,
    LARGE_RADIUS_OF_TWO,
    PLACES,
    RELATIONS,
    SHAPES,
    SMALL_RADIUS,
    Scene,
    draw_shape,
    parse,
)

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

SIDE = 64  # every picture is read at this size
_NAMES = tuple(COLOURS)
_PALETTE = np.array([COLOURS[name] for name in _NAMES], np.float32)
_SPECK_PX = 20  # smaller regions do not count; the smallest true object covers 90 pixels
_FRAME_PX = 2  # width of the outer frame in which the background's colour is voted
_LARGE_FROM = float(np.sqrt(SMALL_RADIUS * LARGE_RADIUS_OF_TWO))
_CLEAR_OVERLAP = 0.7  # a region that overlaps its best shape by less is not a shape at all
_UNIT_PX = 40  # radius at which the unit shapes' areas are measured


@dataclass(frozen=True)
class Seen:
    """One object as read: centre and radius in fractions of the side; overlap 1 is a perfect shape."""

    shape: str
    colour: str
    size: str
    x: float
    y: float
    radius: float
    overlap: float


@dataclass(frozen=True)
class Reading:
    background: str
    objects: tuple[Seen, ...]


@dataclass(frozen=True)
class Verdict:
    """Which parts of a caption a picture shows; a part that the caption leaves open is right."""

    count: bool
    colour: bool
    shape: bool
    size: bool
    background: bool
    position: bool
    misses: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.misses


def read(image: Image.Image) -> Reading:
    """Read a square picture of any size."""
    pixels = _pixels(image)
    nearest = np.argmin(_distances(pixels, _PALETTE), axis=-1)
    background = _background(nearest)
    labels = _purified(pixels, nearest, background)
    regions = _regions(labels, background)
    objects = [_seen(pixels, region, regions, background) for region in regions]
    return Reading(_NAMES[background], tuple(sorted(objects, key=lambda seen: (seen.y + seen.x, seen.x))))


def shows(image: Image.Image, caption: str) -> Verdict:
    """Whether a picture shows what a caption of the world's grammar (complete or thinned) says."""
    return judge(read(image), parse(caption))


def judge(reading: Reading, scene: Scene) -> Verdict:
    """Compare a reading with what was asked; two objects may be told apart by colour and shape."""
    wanted, found = scene.items, reading.objects
    if len(found) != len(wanted):
        backdrop = _background_misses(reading, scene)
        misses = (f"expected {len(wanted)} object(s), found {len(found)}", *backdrop)
        return Verdict(False, False, False, False, not backdrop, False, misses)
    if scene.relation is not None:
        return _judge_in_order(reading, scene, _in_order(found, scene.relation))
    return _judge_in_order(reading, scene, found)


def _judge_in_order(reading: Reading, scene: Scene, found: tuple[Seen, ...]) -> Verdict:
    colour, shape, size = [], [], []
    for item, seen in zip(scene.items, found, strict=True):
        name = f"the {item.colour} {item.shape}"
        if seen.colour != item.colour:
            colour.append(f"{name} is {seen.colour}")
        if seen.shape != item.shape:
            shape.append(f"{name} is a {seen.shape}")
        if item.size not in (None, seen.size):
            size.append(f"{name} is {seen.size} instead of {item.size}")
    position = _position_misses(scene, found)
    backdrop = _background_misses(reading, scene)
    return Verdict(
        count=True,
        colour=not colour,
        shape=not shape,
        size=not size,
        background=not backdrop,
        position=not position,
        misses=(*colour, *shape, *size, *backdrop, *position),
    )


def _in_order(found: tuple[Seen, ...], relation: str) -> tuple[Seen, ...]:
    """The two objects in the order in which the relation names them."""
    (x1, y1), (x2, y2) = RELATIONS[relation]
    return tuple(sorted(found, key=lambda seen: (seen.x - 0.5) * (x1 - x2) + (seen.y - 0.5) * (y1 - y2)))[
        ::-1
    ]


def _position_misses(scene: Scene, found: tuple[Seen, ...]) -> tuple[str, ...]:
    if scene.relation is not None:
        # Asked side by side but drawn one above the other is as wrong as swapped.
        dx, dy = abs(found[0].x - found[1].x), abs(found[0].y - found[1].y)
        across = scene.relation in ("left of", "right of")
        if (dx > dy) == across:
            return ()
        return (
            f"not {scene.relation}: the objects stand {'above each other' if across else 'side by side'}",
        )
    if scene.place is None:
        return ()
    seen = found[0]
    place = min(PLACES, key=lambda name: (PLACES[name][0] - seen.x) ** 2 + (PLACES[name][1] - seen.y) ** 2)
    return () if place == scene.place else (f"stands at the {place} instead of the {scene.place}",)


def _background_misses(reading: Reading, scene: Scene) -> tuple[str, ...]:
    if scene.background in (None, reading.background):
        return ()
    return (f"the background is {reading.background} instead of {scene.background}",)


def _pixels(image: Image.Image) -> Floats:
    if image.width != image.height:
        raise ValueError(f"only square pictures can be read, not {image.width} x {image.height}")
    image = image.convert("RGB")
    if image.width != SIDE:
        image = image.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(image, np.float32)


def _distances(pixels: Floats, colours: Floats) -> Floats:
    """Squared RGB distances, H x W x number of colours."""
    difference = pixels[:, :, None, :] - colours
    return np.asarray(np.einsum("hwcd,hwcd->hwc", difference, difference), np.float32)


def _background(nearest: NDArray[np.int64]) -> int:
    """The colour most frequent in the frame, which objects hardly touch."""
    frame = np.ones(nearest.shape, bool)
    frame[_FRAME_PX:-_FRAME_PX, _FRAME_PX:-_FRAME_PX] = False
    return int(np.bincount(nearest[frame], minlength=len(_NAMES)).argmax())


def _purified(pixels: Floats, nearest: NDArray[np.int64], background: int) -> NDArray[np.int64]:
    """Nearest colours among those that fill an area.

    The blurred edge of yellow on red is orange: a colour counts only where it is thicker than an edge.
    """
    others = (colour for colour in range(len(_NAMES)) if colour != background)
    present = [background, *(c for c in others if ndimage.binary_erosion(nearest == c).any())]
    labels: NDArray[np.int64] = np.array(present)[np.argmin(_distances(pixels, _PALETTE[present]), axis=-1)]
    return labels


def _regions(labels: NDArray[np.int64], background: int) -> list[tuple[int, Mask]]:
    """(colour, mask) of every connected region that is neither background, speck nor a mere edge."""
    regions = []
    for colour in np.unique(labels):
        if colour == background:
            continue
        numbered, count = ndimage.label(labels == colour)
        for number in range(1, count + 1):
            mask = numbered == number
            if mask.sum() >= _SPECK_PX and ndimage.binary_erosion(mask).sum() >= 4:
                regions.append((int(colour), mask))
    return regions


def _seen(pixels: Floats, region: tuple[int, Mask], regions: list[tuple[int, Mask]], background: int) -> Seen:
    colour, mask = region
    near = ndimage.binary_dilation(mask, iterations=2)
    for _, other in regions:
        if other is not mask:
            near &= ~ndimage.binary_dilation(other)
    cover = np.where(near | mask, _coverage(pixels, colour, background), 0).astype(np.float32)
    area = float(cover.sum())
    ys, xs = np.mgrid[:SIDE, :SIDE] + 0.5
    x, y = float((cover * xs).sum() / area), float((cover * ys).sum() / area)
    matches = []
    for shape in SHAPES:
        radius = float(np.sqrt(area / _unit_area(shape)))
        matches.append((_overlap(cover, _ideal(shape, x, y, radius)), shape, radius / SIDE))
    overlap, shape, share = max(matches)
    if overlap < _CLEAR_OVERLAP:
        shape = "blob"
    size = "large" if share > _LARGE_FROM else "small"
    return Seen(shape, _NAMES[colour], size, x / SIDE, y / SIDE, share, overlap)


def _coverage(pixels: Floats, colour: int, background: int) -> Floats:
    """How far each pixel has gone from the background's colour to the object's, 0 to 1."""
    way = _PALETTE[colour] - _PALETTE[background]
    return np.asarray(np.clip((pixels - _PALETTE[background]) @ way / (way @ way), 0, 1), np.float32)


def _ideal(shape: str, x: float, y: float, radius: float) -> Floats:
    """The anti-aliased mask of a shape; lengths in pixels."""
    fine = Image.new("L", (SIDE * 4, SIDE * 4))
    draw_shape(fine, shape, x * 4, y * 4, radius * 4)
    return np.asarray(fine.reduce(4), np.float32) / np.float32(255)


def _overlap(one: Floats, other: Floats) -> float:
    """Intersection over union of two soft masks."""
    return float(np.minimum(one, other).sum() / np.maximum(one, other).sum())


@cache
def _unit_area(shape: str) -> float:
    """Area of a shape of radius 1."""
    mask = Image.new("L", (3 * _UNIT_PX, 3 * _UNIT_PX))
    draw_shape(mask, shape, 1.5 * _UNIT_PX, 1.5 * _UNIT_PX, _UNIT_PX)
    return float(np.asarray(mask, np.float32).sum() / 255 / _UNIT_PX**2)
