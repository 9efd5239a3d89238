"""Views of objects whose every side is known."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers.pipelines.shap_e.camera import create_pan_cameras
from solid_objects import FRONT, SIDES, dice, pyramid

from jubako.surface import Surface
from jubako.turntable import AMBIENT, ELEVATION, _turned, turntable

WHITE = [255, 255, 255]


def hue(pixel: object) -> tuple[bool, ...]:
    """Which of red, green and blue a shaded pixel has."""
    return tuple(bool(level) for level in np.asarray(pixel) > 40)


def test_each_side_comes_to_the_front_as_the_camera_goes_around() -> None:
    views = turntable(dice(), 64, views=4)
    assert views.shape == (4, 64, 64, 3)
    assert views.dtype == np.uint8
    # Just below the middle, which is where the upper front edge may be.
    shown = [hue(view[40, 32]) for view in views]
    assert shown == [SIDES[side] for side in (FRONT, (-1, 0, 0), (0, 0, -1), (1, 0, 0))]


def test_the_top_is_seen_above_the_front_and_white_around_both() -> None:
    view = turntable(dice(), 64, views=1)[0]
    middle = [hue(pixel) for pixel in view[:, 32]]
    seen = [colour for row, colour in enumerate(middle) if row == 0 or colour != middle[row - 1]]
    white, top, front = (True, True, True), SIDES[0, 1, 0], SIDES[FRONT]
    assert [seen[0], seen[-1]] == [white, white]
    assert [colour for colour in seen if colour in {top, front}] == [top, front]
    assert view[0, 0].tolist() == view[0, -1].tolist() == view[-1, 0].tolist() == WHITE


def test_cameras_stand_where_those_of_the_stock_renderer_stand() -> None:
    origins = create_pan_cameras(32).origin.numpy()
    # Theirs come back to the first place with the last view, which would halt a loop.
    for origin, angle in zip(origins, np.linspace(0, 2 * np.pi, len(origins)), strict=True):
        upright = np.array([origin[0], origin[2], -origin[1]]) / np.linalg.norm(origin)
        assert np.allclose(upright @ _turned(angle), (0, 0, 1), atol=1e-6)


def test_a_side_is_as_bright_as_it_faces_the_camera() -> None:
    front = turntable(dice(), 64, views=1)[0][40, 32]
    expected = (AMBIENT + (1 - AMBIENT) * np.cos(ELEVATION)) * 255
    assert front.tolist() == pytest.approx([expected, 0, 0], abs=1)


@pytest.mark.parametrize("scale", [0.001, 1.0, 1000.0])
def test_an_object_of_any_size_and_place_fills_the_view(scale: float) -> None:
    small = dice()
    moved = Surface(small.vertices * np.float32(scale) + np.float32(scale * 5), small.faces, small.colours)
    assert np.abs(turntable(moved, 64, 3).astype(int) - turntable(small, 64, 3)).mean() < 0.5


def test_what_is_nearer_hides_what_is_behind_it_whatever_comes_first() -> None:
    def pane(z: float, colour: tuple[float, float, float]) -> Surface:
        corners = np.array([[-1, -1, z], [1, -1, z], [1, 1, z], [-1, 1, z]], np.float32)
        return Surface(
            corners, np.array([[0, 1, 2], [0, 2, 3]]), np.tile(np.array(colour, np.float32), (4, 1))
        )

    near, far = pane(0.5, (1, 0, 0)), pane(-0.5, (0, 0, 1))
    for first, second in ((near, far), (far, near)):
        both = Surface(
            np.concatenate([first.vertices, second.vertices]),
            np.concatenate([first.faces, second.faces + 4]),
            np.concatenate([first.colours, second.colours]),
        )
        front, back = turntable(both, 64, views=2)
        assert hue(front[32, 32]) == (True, False, False)
        assert hue(back[32, 32]) == (False, False, True)


def test_colours_change_evenly_across_a_triangle() -> None:
    corners = np.array([[-1, -1, 0], [1, -1, 0], [0, 1, 0]], np.float32)
    flag = Surface(corners, np.array([[0, 1, 2]]), np.eye(3, dtype=np.float32))
    view = turntable(flag, 128, views=1)[0]
    inside = view[(view != 255).any(axis=2)].astype(int)
    # The three weights add up to one everywhere but at the edge, where white joins in.
    brightness = inside.sum(axis=1)
    assert brightness.min() == pytest.approx(np.median(brightness), abs=3)


def test_triangles_without_an_area_are_not_drawn() -> None:
    surface = pyramid()
    lines = np.array([[0, 1, 1], [2, 2, 2]])
    drawn = turntable(
        Surface(surface.vertices, np.concatenate([surface.faces, lines]), surface.colours), 32, 4
    )
    assert np.array_equal(drawn, turntable(surface, 32, 4))


def test_views_do_not_depend_on_how_many_triangles_are_tried_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = turntable(dice(), 64, views=2)
    monkeypatch.setattr("jubako.turntable.TRIED", 100)
    assert np.array_equal(turntable(dice(), 64, views=2), whole)


def test_one_point_is_drawn_as_nothing() -> None:
    point = Surface(np.zeros((3, 3), np.float32), np.array([[0, 1, 2]]), np.zeros((3, 3), np.float32))
    assert (turntable(point, 32, views=1) == 255).all()
