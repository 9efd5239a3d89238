"""Views of an object that turns once, drawn from its triangles without a GPU.

The surface itself is drawn, not the model's radiance field: it shows what the mesh file holds, looks the same
for objects of every origin, and takes a twentieth of the time. A depth buffer in numpy, since renderers of
other libraries need OpenGL or wheels that not every machine has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jubako.surface import Surface

__all__ = ["VIEWS", "turntable"]

VIEWS = 20
# Of Shap-E's own cameras: how far they look to either side together, and half as high as they are far.
FIELD_OF_VIEW = 0.7
ELEVATION = np.arctan(0.5)
AMBIENT = 0.4
# Pixels are averages of this many by this many.
SUPERSAMPLING = 2
# Pixels of triangles tried at a time, which bounds the memory that a view takes.
TRIED = 500_000

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


def turntable(surface: Surface, size: int, views: int = VIEWS) -> npt.NDArray[np.uint8]:
    """Views [views, size, size, 3] on white from all around, first of the front (+Z), slightly from above."""
    middle = (surface.vertices.min(axis=0) + surface.vertices.max(axis=0)) / 2
    centred = (surface.vertices - middle).astype(np.float64)
    radius = float(np.linalg.norm(centred, axis=1).max()) or 1.0
    angles = np.linspace(0, 2 * np.pi, views, endpoint=False)
    return np.stack([_view(centred / radius, surface, angle, size) for angle in angles])


def _view(vertices: Floats, surface: Surface, angle: float, size: int) -> npt.NDArray[np.uint8]:
    """One view of vertices within a sphere of radius 1."""
    projected = _Projected.of(vertices @ _turned(angle), surface.faces, size * SUPERSAMPLING)
    pixels = np.ones((size * SUPERSAMPLING) ** 2 * 3).reshape(-1, 3)
    places, faces = projected.nearest()
    weights = projected.weights(faces, places % projected.size, places // projected.size)
    # What is linear on the object is so on the screen only after a division by the distance.
    weights *= projected.nearness[surface.faces[faces]]
    weights /= weights.sum(axis=1, keepdims=True)
    colours = np.einsum("pk,pkc->pc", weights, surface.colours[surface.faces[faces]])
    pixels[places] = colours * projected.brightness(faces)[:, None]
    fine = pixels.reshape(size, SUPERSAMPLING, size, SUPERSAMPLING, 3)
    averaged: npt.NDArray[np.uint8] = np.round(fine.mean(axis=(1, 3)) * 255).astype(np.uint8)
    return averaged


def _turned(angle: float) -> Floats:
    """What rows of places are multiplied by to see them from this angle: x right, y up, z to the viewer."""
    c, s, up, level = np.cos(angle), np.sin(angle), np.sin(ELEVATION), np.cos(ELEVATION)
    around = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    tilted = np.array([[1, 0, 0], [0, level, up], [0, -up, level]])
    product: Floats = around @ tilted
    return product


@dataclass(frozen=True)
class _Projected:
    """Triangles as the camera sees them.

    ``seen`` [v, 3] are places before the camera, ``screen`` [v, 2] those in pixels, right and down, and
    ``nearness`` [v] is one over the distance, which is linear on the screen.
    """

    seen: Floats
    screen: Floats
    nearness: Floats
    faces: Indices
    size: int

    @classmethod
    def of(cls, seen: Floats, faces: Indices, size: int) -> _Projected:
        # As near as the sphere of radius 1 just fits.
        nearness = 1 / (1 / np.sin(FIELD_OF_VIEW / 2) - seen[:, 2])
        flat = seen[:, :2] * nearness[:, None] / np.tan(FIELD_OF_VIEW / 2)
        return cls(seen, (flat * (1, -1) + 1) * size / 2, nearness, faces, size)

    def brightness(self, faces: Indices) -> Floats:
        """How bright each of these triangles is under a light at the camera, seen from either side."""
        a, b, c = (self.seen[self.faces[faces, corner]] for corner in range(3))
        normals = np.cross(b - a, c - a)
        lengths = np.linalg.norm(normals, axis=1)
        return AMBIENT + (1 - AMBIENT) * np.abs(normals[:, 2]) / np.where(lengths == 0, 1, lengths)

    def weights(self, faces: Indices, x: Indices, y: Indices) -> Floats:
        """Barycentric coordinates [p, 3] of the middles of these pixels in these triangles."""
        px, py = x + 0.5, y + 0.5
        (ax, ay), (bx, by), (cx, cy) = (self.screen[self.faces[faces, corner]].T for corner in range(3))
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        area[area == 0] = np.nan  # seen edge on, so that nothing is inside
        second = ((px - ax) * (cy - ay) - (py - ay) * (cx - ax)) / area
        third = ((bx - ax) * (py - ay) - (by - ay) * (px - ax)) / area
        return np.stack([1 - second - third, second, third], axis=1)

    def nearest(self) -> tuple[Indices, Indices]:
        """The pixels that show something, and the nearest triangle in the middle of each."""
        # The upper half of a key is the nearness, whose bits sort like the numbers; the lower the triangle.
        keys = np.zeros(self.size**2, np.uint64)
        corners = self.screen[self.faces]
        low = np.clip(np.ceil(corners.min(axis=1) - 0.5), 0, self.size).astype(np.int64)
        high = np.clip(np.floor(corners.max(axis=1) + 0.5), 0, self.size).astype(np.int64)
        span = np.maximum(high - low, 0)
        # Most triangles of a fine surface lie between the middles of pixels.
        spanning = np.flatnonzero(span.all(axis=1))
        ends = np.cumsum(span[spanning].prod(axis=1))
        for group in np.split(spanning, _cuts(ends)):
            places, faces, nearness = self._inside(group, low[group], span[group])
            upper = nearness.astype(np.float32).view(np.uint32).astype(np.uint64) << np.uint64(32)
            np.maximum.at(keys, places, upper | faces.astype(np.uint64))
        shown = np.flatnonzero(keys)
        return shown, (keys[shown] & np.uint64(0xFFFFFFFF)).astype(np.int64)

    def _inside(self, faces: Indices, low: Indices, span: Indices) -> tuple[Indices, Indices, Floats]:
        """The pixels whose middles lie in these triangles, with triangle and nearness there.

        ``low`` and ``span`` [f, 2] are the boxes around the triangles, in pixels.
        """
        counts = span.prod(axis=1)
        of = np.repeat(np.arange(len(faces)), counts)
        number = np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)
        down, right = np.divmod(number, span[of, 0])
        # Weights change evenly from pixel to pixel: all but the first take two sums.
        x, y = low.T
        first = self.weights(faces, x, y)
        rightward, downward = self.weights(faces, x + 1, y) - first, self.weights(faces, x, y + 1) - first
        weights = first[of] + right[:, None] * rightward[of] + down[:, None] * downward[of]
        inside = np.flatnonzero((weights >= 0).all(axis=1))
        of = of[inside]
        nearness = np.einsum("pk,pk->p", weights[inside], self.nearness[self.faces[faces[of]]])
        return (y[of] + down[inside]) * self.size + x[of] + right[inside], faces[of], nearness


def _cuts(ends: Indices) -> Indices:
    """Where to cut a list of triangles, whose pixels add up to ``ends``, into groups of about ``TRIED``."""
    total = int(ends[-1]) if len(ends) else 0
    cuts: Indices = np.unique(np.searchsorted(ends, np.arange(TRIED, total, TRIED)))
    return cuts
