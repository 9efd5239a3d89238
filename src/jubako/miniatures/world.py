"""The captioned world: what a scene is, how it is said, how it is drawn.

A `Scene` holds words only, a `Layout` holds geometry; `arrange` turns the one into the other and `render`
draws it. Lengths are fractions of the picture's side; x grows to the right, y downwards. No torch here.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 40),
    "purple": (150, 60, 190),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "star", "ring")
SIZES = ("small", "large")
PLACES: dict[str, tuple[float, float]] = {
    "left": (0.3, 0.5),
    "right": (0.7, 0.5),
    "top": (0.5, 0.3),
    "bottom": (0.5, 0.7),
    "center": (0.5, 0.5),
}
# Where the first and the second object of a relation stand.
RELATIONS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "left of": ((0.26, 0.5), (0.74, 0.5)),
    "right of": ((0.74, 0.5), (0.26, 0.5)),
    "above": ((0.5, 0.26), (0.5, 0.74)),
    "below": ((0.5, 0.74), (0.5, 0.26)),
}
SMALL_RADIUS = 0.13
LARGE_RADIUS = 0.26
# Two large objects must leave a gap of more than a pixel at 64 px, hence smaller than a lone one.
LARGE_RADIUS_OF_TWO = 0.20

_SUPERSAMPLING = 4
_RING_HOLE = 0.5
_STAR_NOTCH = 0.45


@dataclass(frozen=True)
class Item:
    """One object as said; without a size word, either size is right."""

    shape: str
    colour: str
    size: str | None = None

    def caption(self) -> str:
        return " ".join(word for word in ("a", self.size, self.colour, self.shape) if word)


@dataclass(frozen=True)
class Scene:
    """What a caption says. One item may have a place, two items have a relation; `None` means unsaid."""

    items: tuple[Item, ...]
    background: str | None = None
    place: str | None = None
    relation: str | None = None

    def caption(self) -> str:
        words = f" {self.relation} ".join(item.caption() for item in self.items)
        if self.place is None:
            return words if self.background is None else f"{words} on a {self.background} background"
        words += f" {'in' if self.place == 'center' else 'on'} the {self.place}"
        return words if self.background is None else f"{words} of a {self.background} background"


@dataclass(frozen=True)
class Placed:
    """One object as drawn: centre and radius in fractions of the side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Layout:
    background: str
    objects: tuple[Placed, ...]


def random_scene(rng: np.random.Generator, objects: int) -> Scene:
    """A complete scene of one or two objects, each part drawn evenly; a size is said two times in three."""
    background, *colours = _choices(rng, tuple(COLOURS), 2)
    if objects == 1:
        return Scene((_random_item(rng, colours[0]),), background, place=_choice(rng, tuple(PLACES)))
    first = _random_item(rng, colours[0])
    second = first
    while (second.shape, second.colour) == (first.shape, first.colour):
        second = _random_item(rng, _choice(rng, tuple(c for c in COLOURS if c != background)))
    return Scene((first, second), background, relation=_choice(rng, tuple(RELATIONS)))


def thinned(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same scene said with fewer words: sizes, the place or the background left out by chance."""
    items = tuple(replace(item, size=item.size if rng.random() < 0.5 else None) for item in scene.items)
    place = scene.place if rng.random() < 0.4 else None
    background = scene.background if rng.random() < 0.6 else None
    return replace(scene, items=items, place=place, background=background)


def arrange(scene: Scene, rng: np.random.Generator) -> Layout:
    """Choose what the scene leaves open and shake centres and sizes by a few percent."""
    taken = {item.colour for item in scene.items}
    background = scene.background or _choice(rng, tuple(c for c in COLOURS if c not in taken))
    if scene.relation is not None:
        centres: tuple[tuple[float, float], ...] = RELATIONS[scene.relation]
    else:
        centres = (PLACES[scene.place or _choice(rng, tuple(PLACES))],)
    large = LARGE_RADIUS if len(scene.items) == 1 else LARGE_RADIUS_OF_TWO
    objects = []
    for item, (x, y) in zip(scene.items, centres, strict=True):
        size = item.size or _choice(rng, SIZES)
        radius = (large if size == "large" else SMALL_RADIUS) * rng.uniform(0.96, 1.04)
        dx, dy = rng.uniform(-0.012, 0.012, 2)
        objects.append(Placed(item.shape, item.colour, x + dx, y + dy, radius))
    return Layout(background, tuple(objects))


def render(layout: Layout, side: int = 64) -> Image.Image:
    """Draw a layout, anti-aliased, as an RGB picture of side x side pixels."""
    fine = side * _SUPERSAMPLING
    canvas = Image.new("RGB", (fine, fine), COLOURS[layout.background])
    for placed in layout.objects:
        mask = Image.new("L", (fine, fine))
        draw_shape(mask, placed.shape, placed.x * fine, placed.y * fine, placed.radius * fine)
        canvas.paste(COLOURS[placed.colour], (0, 0), mask)
    return canvas.reduce(_SUPERSAMPLING)


def draw_shape(mask: Image.Image, shape: str, x: float, y: float, radius: float) -> None:
    """Fill a shape with 255 in a one-channel picture; all lengths in its pixels."""
    pen = ImageDraw.Draw(mask)
    if shape in ("circle", "ring"):
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=255)
        if shape == "ring":
            hole = radius * _RING_HOLE
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
    else:
        pen.polygon([(x + radius * u, y + radius * v) for u, v in _corners(shape)], fill=255)


def parse(caption: str) -> Scene:
    """Read a caption, complete or thinned, back into a scene; anything else is a `ValueError`."""
    text = " ".join(caption.lower().split())
    if match := _TWO.fullmatch(text):
        first, second = _item(match, "1"), _item(match, "2")
        return Scene((first, second), match["background"], relation=match["relation"])
    if match := _ONE.fullmatch(text):
        return Scene((_item(match, "1"),), match["background"], place=match["place"])
    raise ValueError(f"not a caption of this world: {caption!r}")


def _corners(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape of radius 1 around its centroid."""
    if shape == "square":
        return [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)]
    points, reach, notch = (3, 1.05, None) if shape == "triangle" else (5, 1.05, 1.05 * _STAR_NOTCH)
    corners = []
    for i in range(points):
        angle = 2 * math.pi * i / points - math.pi / 2
        corners.append((reach * math.cos(angle), reach * math.sin(angle)))
        if notch is not None:
            angle += math.pi / points
            corners.append((notch * math.cos(angle), notch * math.sin(angle)))
    return corners


def _pattern(names: tuple[str, ...]) -> str:
    return "|".join(names)


def _item_pattern(number: str) -> str:
    return (
        rf"(?:an? )?(?:(?P<size{number}>{_pattern(SIZES)}) )?"
        rf"(?P<colour{number}>{_pattern(tuple(COLOURS))}) (?P<shape{number}>{_pattern(SHAPES)})"
    )


_BACKGROUND = rf"an? (?P<background>{_pattern(tuple(COLOURS))}) background"
_ONE = re.compile(
    rf"{_item_pattern('1')}(?: (?:on|in) the (?P<place>{_pattern(tuple(PLACES))}))?"
    rf"(?: (?:of|on) {_BACKGROUND})?"
)
_TWO = re.compile(
    rf"{_item_pattern('1')} (?P<relation>{_pattern(tuple(RELATIONS))}) {_item_pattern('2')}"
    rf"(?: on {_BACKGROUND})?"
)


def _item(match: re.Match[str], number: str) -> Item:
    return Item(match["shape" + number], match["colour" + number], match["size" + number])


def _random_item(rng: np.random.Generator, colour: str) -> Item:
    size = _choice(rng, SIZES) if rng.random() < 2 / 3 else None
    return Item(_choice(rng, SHAPES), colour, size)


def _choice(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]


def _choices(rng: np.random.Generator, options: tuple[str, ...], count: int) -> list[str]:
    return [options[i] for i in rng.permutation(len(options))[:count]]
