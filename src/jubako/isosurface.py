"""From a field of signed distances on a grid to the triangles of the surface where it is zero. No torch."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["OUTSIDE", "EmptyFieldError", "isosurface"]

# What lies around the grid: as far outside of the object as a distance can be.
OUTSIDE = -1.0

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]


class EmptyFieldError(ValueError):
    """Nothing of the field lies inside of an object, so there is no surface."""


def isosurface(field: Floats, lower: Floats, upper: Floats) -> tuple[Floats, Indices]:
    """The surface of a field [x, y, z] that is positive inside of the object: vertices [v, 3], faces [f, 3].

    ``lower`` and ``upper`` [3] are the places of the grid's first and last point. A border of outside around
    the grid closes objects that reach to its edge. Faces are counterclockwise as seen from outside. Raises
    EmptyFieldError where nothing is inside, or where a distance is no number.

    Lewiner et al., "Efficient implementation of marching cubes' cases with topological guarantees", 2003.
    """
    # scikit-image takes half a second to import, and most processes never meet an object.
    from skimage import measure

    marching_cubes: Any = measure.marching_cubes
    if not np.isfinite(field).all() or field.max() <= 0:
        raise EmptyFieldError("nothing of the field lies inside of an object")
    closed = np.pad(field, 1, constant_values=OUTSIDE)
    cell = (upper - lower) / (np.array(field.shape, np.float32) - 1)
    vertices, faces, _, _ = marching_cubes(closed, 0.0, gradient_direction="ascent")
    # Points of the grid stand one further in the padded one.
    return (lower + (vertices - 1) * cell).astype(np.float32), faces.astype(np.int64)
