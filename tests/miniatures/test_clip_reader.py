"""The checker of clips: right clips pass, and each way of being wrong is named."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from jubako.miniatures.clip_reader import clip_figures, judge_clip
from jubako.miniatures.motion import FRAMES, Motion, distance, random_motion
from jubako.miniatures.world import Layout, Placed, render

MOTION = Motion(Layout("blue", (Placed("square", "red", 0.3, 0.5, 0.13),)), 128, 0.2)


def test_rendered_clips_are_right_and_go_as_far_as_asked() -> None:
    rng = np.random.default_rng(3)
    motions = [random_motion(rng)[1] for _ in range(40)]
    verdicts = []
    for motion in motions:
        frames = motion.frames()
        verdict = judge_clip(frames, frames[0])
        assert verdict.ok, (motion, verdict.misses)
        assert verdict.distance == pytest.approx(distance(motion.bucket), abs=0.01)
        verdicts.append(verdict)
    figures = clip_figures(verdicts, [motion.bucket for motion in motions])
    assert figures["ok"] == 1.0
    assert figures["spearman"] > 0.99


def test_larger_pictures_are_read_too() -> None:
    frames = MOTION.frames(128)
    verdict = judge_clip(frames, frames[0])
    assert verdict.ok, verdict.misses
    assert verdict.distance == pytest.approx(0.2, abs=0.01)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (Placed("square", "green", 0.4, 0.5, 0.13), "frame 4: the red square is green"),
        (Placed("circle", "red", 0.4, 0.5, 0.13), "frame 4: the red square is a circle"),
    ],
)
def test_object_that_changes_on_the_way_is_not_kept(changed: Placed, said: str) -> None:
    frames = MOTION.frames()
    frames[4] = render(Layout("blue", (changed,)))
    verdict = judge_clip(frames, MOTION.frames()[0])
    assert not verdict.kept
    assert said in verdict.misses


def test_object_that_vanishes_has_gone_nowhere() -> None:
    frames = MOTION.frames()
    frames[-1] = render(Layout("blue", ()))
    verdict = judge_clip(frames, frames[0])
    assert not verdict.kept
    assert verdict.distance == 0
    assert "frame 7: 0 objects" in verdict.misses


def test_another_background_is_not_kept() -> None:
    frames = MOTION.frames()
    frames[2] = render(replace(MOTION.at(2), background="white"))
    assert "frame 2: the background is white instead of blue" in judge_clip(frames, frames[0]).misses


def test_first_frame_must_be_the_picture() -> None:
    frames = MOTION.frames()
    verdict = judge_clip(frames[::-1], frames[0])
    assert verdict.kept
    assert not verdict.first
    assert "the first frame has the object elsewhere" in verdict.misses


def test_jump_in_the_middle_is_not_straight() -> None:
    frames = MOTION.frames()
    jumping = [frames[0]] * (FRAMES - 1) + [frames[-1]]
    verdict = judge_clip(jumping, frames[0])
    assert verdict.first
    assert verdict.kept
    assert not verdict.straight


def test_picture_of_two_objects_is_refused() -> None:
    other = Placed("circle", "white", 0.74, 0.5, 0.13)
    picture = render(replace(MOTION.layout, objects=(*MOTION.layout.objects, other)))
    with pytest.raises(ValueError, match="one object"):
        judge_clip(MOTION.frames(), picture)


def test_speck_beside_the_object_is_not_kept_but_does_not_hide_its_way() -> None:
    frames = MOTION.frames()
    speck = Placed("square", "white", 0.8, 0.8, 0.06)
    last = MOTION.at(FRAMES - 1)
    frames[-1] = render(replace(last, objects=(*last.objects, speck)))
    verdict = judge_clip(frames, frames[0])
    assert not verdict.kept
    assert verdict.straight
    assert verdict.distance == pytest.approx(0.2, abs=0.01)
