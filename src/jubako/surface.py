"""Surfaces of objects: coloured triangles, and the files that hold them, GLB and OBJ.

Files have +Y up and the front towards +Z, as glTF wants it. Colours are sRGB from 0 to 1, as on a screen; in
a GLB they are linear, as glTF defines its ``COLOR_0``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import trimesh

from jubako.job import Job
from jubako.media import settings_json

__all__ = ["Surface", "encode_surface", "read_glb", "upright"]

Floats = npt.NDArray[np.float32]
Indices = npt.NDArray[np.int64]

_GREY = 0.6


@dataclass(frozen=True)
class Surface:
    """Triangles with a colour at each vertex: vertices [v, 3], faces [f, 3], colours [v, 3] from 0 to 1."""

    vertices: Floats
    faces: Indices
    colours: Floats


def upright(surface: Surface) -> Surface:
    """A surface with +Z up and its front towards -Y turned to have +Y up and the front towards +Z."""
    x, y, z = surface.vertices.T
    return Surface(np.stack([x, z, -y], axis=1), surface.faces, surface.colours)


def encode_surface(surface: Surface, file_format: str, job: Job, facts: Mapping[str, object]) -> bytes:
    """The surface as a ``glb`` or ``obj`` file that says inside which job made it.

    GLB has it as JSON under ``asset.extras.jubako``, OBJ in its first lines, which are comments. ``facts``
    (the weights' commit) join it.
    """
    settings = settings_json(job, facts)
    if file_format == "glb":
        return _glb(surface, json.loads(settings))
    text = _mesh(surface, surface.colours).export(
        file_type="obj", header=f"jubako {settings}", include_normals=False
    )
    return str(text).encode()


def read_glb(data: bytes) -> Surface:
    """All triangles of a GLB file, placed as its scene places them; ValueError when there are none to read.

    A texture gives each vertex the colour that it has there.
    """
    if data[:4] != b"glTF" or int.from_bytes(data[8:12], "little") != len(data):
        raise ValueError("not a GLB file, or a torn one")
    try:
        scene = trimesh.load_scene(io.BytesIO(data), file_type="glb", process=False)
        parts = list(_parts(scene))
    except Exception as error:  # whatever a reader of foreign files raises
        raise ValueError(f"the GLB file can't be read: {error}") from error
    surface = _joined(parts)
    if not len(surface.faces):
        raise ValueError("the GLB file holds no triangles")
    if not np.isfinite(surface.vertices).all() or surface.faces.max() >= len(surface.vertices):
        raise ValueError("the GLB file has triangles without places")
    return surface


def _glb(surface: Surface, settings: Mapping[str, object]) -> bytes:
    def describe(tree: dict[str, Any]) -> None:
        tree["asset"]["extras"] = {"jubako": settings}

    mesh = _mesh(surface, _linear(surface.colours))
    # Without normals, viewers have to shade every triangle flat.
    data: Any = mesh.export(file_type="glb", include_normals=True, tree_postprocessor=describe)
    return bytes(data)


def _mesh(surface: Surface, colours: Floats) -> trimesh.Trimesh:
    return trimesh.Trimesh(
        surface.vertices,
        surface.faces,
        vertex_colors=np.round(colours * 255).astype(np.uint8),
        process=False,
    )


def _parts(scene: trimesh.Scene) -> Iterator[Surface]:
    for mesh in scene.dump():
        if isinstance(mesh, trimesh.Trimesh):
            yield Surface(
                np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.int64), _colours(mesh)
            )


def _joined(parts: list[Surface]) -> Surface:
    starts = np.cumsum([0, *(len(part.vertices) for part in parts)])
    nothing = np.zeros((0, 3))
    return Surface(
        np.concatenate([nothing, *(part.vertices for part in parts)]).astype(np.float32),
        np.concatenate(
            [nothing, *(part.faces + start for part, start in zip(parts, starts, strict=False))]
        ).astype(np.int64),
        np.concatenate([nothing, *(part.colours for part in parts)]).astype(np.float32),
    )


def _colours(mesh: trimesh.Trimesh) -> Floats:
    """The colour of each vertex, sRGB: painted there, or that of its texture or material."""
    visual: Any = mesh.visual
    if visual.kind == "vertex":
        return _srgb(visual.vertex_colors[:, :3] / np.float32(255))
    if visual.kind == "texture":
        painted = np.asarray(visual.to_color().vertex_colors, np.float32).reshape(-1, 4)[:, :3] / 255
        # A material without a texture has one colour for all.
        return np.broadcast_to(painted, mesh.vertices.shape).astype(np.float32)
    return np.full(mesh.vertices.shape, _GREY, np.float32)


def _linear(colours: Floats) -> Floats:
    return np.where(colours <= 0.04045, colours / 12.92, ((colours + 0.055) / 1.055) ** 2.4).astype(
        np.float32
    )


def _srgb(colours: Floats) -> Floats:
    return np.where(colours <= 0.0031308, colours * 12.92, 1.055 * colours ** (1 / 2.4) - 0.055).astype(
        np.float32
    )
