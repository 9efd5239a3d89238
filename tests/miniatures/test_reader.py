"""The pixel checker: right on every rendered scene, and not to be talked into anything else."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image, ImageFilter

from jubako.miniatures.reader import judge, read, shows
from jubako.miniatures.world import Layout, Placed, Scene, arrange, parse, random_scene, render


def drawn(caption: str, side: int = 64) -> Image.Image:
    return render(arrange(parse(caption), np.random.default_rng(0)), side)


@pytest.mark.parametrize(("side", "count"), [(64, 1500), (128, 150), (256, 60)])
def test_reader_reads_every_rendered_scene(side: int, count: int) -> None:
    rng = np.random.default_rng(side)
    for i in range(count):
        scene = random_scene(rng, 1 + i % 2)
        verdict = judge(read(render(arrange(scene, rng), side)), scene)
        assert verdict.ok, (scene.caption(), verdict.misses)


def test_reader_measures_centre_and_radius() -> None:
    rng = np.random.default_rng(1)
    for i in range(100):
        layout = arrange(random_scene(rng, 1 + i % 2), rng)
        seen = {(o.shape, o.colour): o for o in read(render(layout)).objects}
        for placed in layout.objects:
            measured = seen[placed.shape, placed.colour]
            assert (measured.x, measured.y) == pytest.approx((placed.x, placed.y), abs=0.015)
            assert measured.radius == pytest.approx(placed.radius, rel=0.08)


def test_reader_forgives_slight_blur_and_noise() -> None:
    rng = np.random.default_rng(2)
    for i in range(100):
        scene = random_scene(rng, 1 + i % 2)
        soft = render(arrange(scene, rng)).filter(ImageFilter.GaussianBlur(0.6))
        noisy = np.asarray(soft, np.float64) + rng.normal(0, 4, (64, 64, 3))
        verdict = judge(read(Image.fromarray(noisy.clip(0, 255).astype(np.uint8))), scene)
        assert verdict.ok, (scene.caption(), verdict.misses)


def test_another_scenes_caption_is_refused() -> None:
    rng = np.random.default_rng(3)
    scenes = [random_scene(rng, 1 + i % 2) for i in range(200)]
    for scene, other in itertools.pairwise(scenes):
        if scene != other:
            assert not judge(read(render(arrange(scene, rng))), other).ok


@pytest.mark.parametrize(
    ("caption", "part"),
    [
        ("a large red star left of a small blue ring on a white background", ""),
        ("a red star left of a blue ring on a white background", ""),
        ("a large red star right of a small blue ring on a white background", "colour"),
        ("a large red star above a small blue ring on a white background", "position"),
        ("a large blue star left of a small red ring on a white background", "colour"),
        ("a large red ring left of a small blue star on a white background", "shape"),
        ("a small red star left of a small blue ring on a white background", "size"),
        ("a large red star left of a small blue ring on a black background", "background"),
        ("a large red star on the left of a white background", "count"),
    ],
)
def test_verdict_names_the_part_that_is_wrong(caption: str, part: str) -> None:
    picture = drawn("a large red star left of a small blue ring on a white background")
    verdict = shows(picture, caption)
    assert verdict.ok == (part == ""), verdict.misses
    if part:
        assert not getattr(verdict, part)
        assert verdict.misses


def test_place_of_one_object_matters() -> None:
    picture = drawn("a small red star on the left of a white background")
    assert shows(picture, "a small red star on the left of a white background").ok
    verdict = shows(picture, "a small red star on the top of a white background")
    assert verdict.misses == ("stands at the left instead of the top",)
    assert shows(picture, "a red star").ok


def test_blank_and_noise_show_nothing() -> None:
    caption = "a red circle in the center of a blue background"
    blank = Image.new("RGB", (64, 64), (40, 80, 220))
    assert shows(blank, caption).misses == ("expected 1 object(s), found 0",)
    rng = np.random.default_rng(4)
    for _ in range(20):
        noise = Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8))
        assert not shows(noise, caption).ok


def test_a_formless_object_is_no_shape() -> None:
    stroke = Image.new("RGB", (64, 64), (245, 245, 245))
    stroke.paste((220, 40, 40), (4, 28, 60, 34))
    assert [seen.shape for seen in read(stroke).objects] == ["blob"]


def test_a_third_object_is_seen() -> None:
    layout = arrange(parse("a red star left of a blue ring on a white background"), np.random.default_rng(0))
    crowded = Layout("white", (*layout.objects, Placed("circle", "green", 0.5, 0.14, 0.1)))
    scene: Scene = parse("a red star left of a blue ring on a white background")
    assert judge(read(render(crowded)), scene).misses == ("expected 2 object(s), found 3",)


def test_only_square_pictures_are_read() -> None:
    with pytest.raises(ValueError, match="square"):
        read(Image.new("RGB", (64, 32)))


def test_world_and_reader_need_no_torch() -> None:
    code = "import sys, jubako.miniatures.reader, jubako.miniatures.world; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
