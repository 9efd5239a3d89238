"""The grammar and the renderer of the captioned world."""

from __future__ import annotations

import numpy as np
import pytest

from jubako.miniatures.world import COLOURS, Item, Scene, arrange, parse, random_scene, render, thinned


def scenes(count: int, seed: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [random_scene(rng, 1 + i % 2) for i in range(count)]


def test_every_caption_parses_back_into_its_scene() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(1000, seed=1):
        assert parse(scene.caption()) == scene
        fewer = thinned(scene, rng)
        assert parse(fewer.caption()) == fewer


def test_captions_are_worded_as_the_grammar_says() -> None:
    star = Item("star", "red", "small")
    ring = Item("ring", "orange")
    assert (
        Scene((star,), "blue", place="left").caption() == "a small red star on the left of a blue background"
    )
    assert (
        Scene((ring,), "blue", place="center").caption() == "a orange ring in the center of a blue background"
    )
    both = Scene((star, ring), "white", relation="above")
    assert both.caption() == "a small red star above a orange ring on a white background"


@pytest.mark.parametrize(
    "caption", ["", "a dog", "a red circle on a pink background", "a red circle near a blue star", "circle"]
)
def test_other_captions_are_refused(caption: str) -> None:
    with pytest.raises(ValueError, match="not a caption"):
        parse(caption)


def test_users_may_write_an_and_capitals() -> None:
    assert parse("An orange  Ring on a blue background") == Scene((Item("ring", "orange"),), "blue")


def test_objects_differ_from_each_other_and_from_the_background() -> None:
    for scene in scenes(1000, seed=2):
        looks = {(item.shape, item.colour) for item in scene.items}
        assert len(looks) == len(scene.items)
        assert scene.background not in {item.colour for item in scene.items}


def test_objects_stay_inside_the_picture_and_apart() -> None:
    rng = np.random.default_rng(3)
    for scene in scenes(1000, seed=3):
        objects = arrange(scene, rng).objects
        for placed in objects:
            reach = placed.radius * 1.05
            assert reach < min(placed.x, placed.y, 1 - placed.x, 1 - placed.y) + 0.01
        if len(objects) == 2:
            first, second = objects
            apart = max(abs(first.x - second.x), abs(first.y - second.y))
            assert apart - first.radius * 1.05 - second.radius * 1.05 > 1 / 64


def test_the_same_seed_draws_the_same_pictures() -> None:
    scene = parse("a red circle left of a blue star")
    one, other = (np.asarray(render(arrange(scene, np.random.default_rng(7)))) for _ in range(2))
    assert (one == other).all()


def test_colours_are_drawn_exactly() -> None:
    layout = arrange(
        parse("a large red square in the center of a green background"), np.random.default_rng(0)
    )
    for side in (64, 128):
        picture = render(layout, side)
        assert picture.getpixel((side // 2, side // 2)) == COLOURS["red"]
        assert picture.getpixel((0, 0)) == COLOURS["green"]
