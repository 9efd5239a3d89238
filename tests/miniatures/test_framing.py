"""Pictures with micro-conditioning: the numbers beside a picture say what was done to it."""

from __future__ import annotations

import numpy as np
import pytest

from jubako.miniatures.framing import SIDE, blown_up, cropped, draw_framed
from jubako.miniatures.reader import read
from jubako.miniatures.world import arrange, parse

LAYOUT = arrange(parse("a small red star in the center of a white background"), np.random.default_rng(0))


def test_crop_moves_the_object_by_its_offset() -> None:
    (whole,) = read(cropped(LAYOUT, 0, 0)).objects
    (cut,) = read(cropped(LAYOUT, 4, 10)).objects
    assert whole.y - cut.y == pytest.approx(4 / SIDE, abs=0.01)
    assert whole.x - cut.x == pytest.approx(10 / SIDE, abs=0.01)


def test_blown_up_picture_is_blurred_and_has_the_usual_size() -> None:
    picture = blown_up(LAYOUT, 16)
    assert picture.size == (SIDE, SIDE)
    sharp, soft = (np.asarray(p, np.int64) for p in (cropped(LAYOUT, 0, 0), picture))
    assert np.abs(np.diff(soft, axis=1)).max() < np.abs(np.diff(sharp, axis=1)).max()


def test_most_pictures_have_the_numbers_sent_by_default() -> None:
    numbers = draw_framed(400, seed=1, cropped_share=0.15, blown_up_share=0.1).time_ids
    usual = (numbers == numbers.new_tensor([SIDE, SIDE, 0, 0, SIDE, SIDE])).all(1).float().mean().item()
    assert 0.65 < usual < 0.85
    assert (numbers[:, 2:4] > 0).any()
    assert (numbers[:, 0] < SIDE).any()
