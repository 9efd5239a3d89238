"""Moving scenes: straight ways, as long as asked, that stay in view."""

from __future__ import annotations

import numpy as np
import pytest

from jubako.miniatures.motion import (
    FARTHEST,
    FRAMES,
    MOST_MOTION,
    distance,
    draw_clips,
    random_motion,
    set_moving,
)
from jubako.miniatures.world import Layout, Placed, render


@pytest.mark.parametrize("bucket", [0, 60, MOST_MOTION])
def test_object_goes_as_far_as_its_bucket_says_and_stays_in_view(bucket: int) -> None:
    rng = np.random.default_rng(4)
    for _ in range(200):
        _, motion = random_motion(rng, bucket)
        assert abs(motion.dx) == pytest.approx(distance(bucket))
        (last,) = motion.at(FRAMES - 1).objects
        assert last.radius <= min(last.x, last.y, 1 - last.x, 1 - last.y) + 1e-9, motion


@pytest.mark.parametrize(("x", "way"), [(0.3, 1), (0.5, 1), (0.7, -1)])
def test_object_goes_to_the_side_on_which_there_is_room(x: float, way: int) -> None:
    motion = set_moving(Layout("blue", (Placed("circle", "red", x, 0.5, 0.13),)), MOST_MOTION)
    assert motion.dx == way * FARTHEST


def test_distance_grows_evenly_with_the_bucket() -> None:
    assert distance(0) == 0
    assert distance(MOST_MOTION) == FARTHEST


def test_first_frame_is_the_scene_itself() -> None:
    _, motion = random_motion(np.random.default_rng(5), MOST_MOTION)
    assert motion.at(0) == motion.layout


def test_same_seed_draws_the_same_clips() -> None:
    one, other = draw_clips(3, seed=6), draw_clips(3, seed=6)
    assert one.motions == other.motions
    assert np.array_equal(one.pixels, other.pixels)
    assert one.pixels.shape == (3, FRAMES, 64, 64, 3)
    assert np.array_equal(one.pixels[0, 0], np.asarray(render(one.motions[0].layout)))
