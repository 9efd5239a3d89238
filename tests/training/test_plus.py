"""The checker that proves that something was learned: it finds the plus, and nothing else."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from PIL import Image, ImageFilter
from plus import FIVE, Drawn, draw, find

from jubako.miniatures.world import COLOURS, PLACES, SHAPES, Item, Scene, arrange, render


def test_it_finds_the_plus_in_every_pair_of_colours() -> None:
    for colour, background in product(COLOURS, COLOURS):
        if colour != background:
            found = find(draw(Drawn(colour, background, 0.5, 0.45, 0.27)))
            assert found.plus, (colour, background, found)
            assert (found.colour, found.background) == (colour, background)


def test_it_finds_the_five_and_blurred_ones() -> None:
    for each in FIVE:
        assert find(draw(each)).overlap > 0.98
        assert find(draw(each).filter(ImageFilter.GaussianBlur(1))).plus


@pytest.mark.parametrize("shape", SHAPES)
def test_it_rejects_the_world_s_own_shapes(shape: str) -> None:
    rng = np.random.default_rng(0)
    for colour, background, place, size in product(COLOURS, COLOURS, PLACES, ("small", "large")):
        if colour == background or (size == "small" and place != "center"):
            continue
        found = find(render(arrange(Scene((Item(shape, colour, size),), background, place=place), rng)))
        assert not found.plus
        assert size == "small" or found.shape == shape


def test_it_rejects_what_is_half_a_plus_or_more_than_one() -> None:
    half = draw(FIVE[0])
    half.paste(COLOURS[FIVE[0].background], (32, 0, 64, 28))
    assert not find(half).plus
    two = draw(Drawn("red", "blue", 0.25, 0.5, 0.2))
    two.paste(draw(Drawn("red", "blue", 0.75, 0.5, 0.2)).crop((32, 0, 64, 64)), (32, 0))
    assert not find(two).plus


def test_it_rejects_noise_and_blanks() -> None:
    rng = np.random.default_rng(0)
    assert not find(Image.new("RGB", (64, 64), "red")).plus
    for _ in range(5):
        assert not find(Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8))).plus
