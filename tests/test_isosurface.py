"""Surfaces of fields whose shape is known."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import trimesh

from jubako.isosurface import EmptyFieldError, isosurface

Floats = npt.NDArray[np.float32]

LOWER, UPPER = np.full(3, -1, np.float32), np.full(3, 1, np.float32)


def ball(radius: float, points: int = 32, middle: tuple[float, float, float] = (0, 0, 0)) -> Floats:
    """How far inside of a ball each point of a grid from -1 to 1 lies."""
    axis = np.linspace(-1, 1, points)
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    distance = np.sqrt((x - middle[0]) ** 2 + (y - middle[1]) ** 2 + (z - middle[2]) ** 2)
    return (radius - distance).astype(np.float32)


def test_a_ball_has_its_radius_and_its_volume_and_faces_outwards() -> None:
    vertices, faces = isosurface(ball(0.7), LOWER, UPPER)
    assert np.abs(np.linalg.norm(vertices, axis=1) - 0.7).max() < 0.005
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight
    assert mesh.volume == pytest.approx(4 / 3 * np.pi * 0.7**3, rel=0.02)


def test_axes_and_places_are_kept() -> None:
    vertices, _ = isosurface(ball(0.2, middle=(0.5, -0.25, 0)), LOWER, UPPER)
    assert np.allclose(vertices.mean(axis=0), (0.5, -0.25, 0), atol=0.01)
    stretched, _ = isosurface(
        ball(0.2, middle=(0.5, -0.25, 0)), LOWER, UPPER + np.array([2, 0, 0], np.float32)
    )
    assert np.allclose(stretched.mean(axis=0), (2.0, -0.25, 0), atol=0.02)


def test_the_size_of_an_object_does_not_depend_on_the_grid() -> None:
    extents = [np.ptp(isosurface(ball(0.7, points), LOWER, UPPER)[0], axis=0) for points in (12, 24, 48)]
    assert np.allclose(extents, 1.4, atol=0.04)


def test_an_object_that_fills_the_grid_is_closed() -> None:
    vertices, faces = isosurface(ball(1.5), LOWER, UPPER)
    mesh = trimesh.Trimesh(vertices, faces, process=False)
    assert mesh.is_watertight
    assert np.abs(vertices).max() <= 1 + 2 / 31


@pytest.mark.parametrize("field", [ball(-0.1), np.zeros((8, 8, 8)), np.full((8, 8, 8), np.nan)])
def test_a_field_without_an_inside_has_no_surface(field: Floats) -> None:
    with pytest.raises(EmptyFieldError):
        isosurface(field.astype(np.float32), LOWER, UPPER)
