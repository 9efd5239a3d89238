"""Objects whose shape and colours are known, and a job that asks for one."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import trimesh

from jubako.job import Job, Solid
from jubako.surface import Surface

__all__ = ["FRONT", "SIDES", "dice", "job", "pyramid"]

# Normals of a die's sides and their colours.
FRONT = (0, 0, 1)
SIDES: dict[tuple[int, int, int], tuple[float, float, float]] = {
    FRONT: (1, 0, 0),
    (0, 0, -1): (0, 1, 1),
    (1, 0, 0): (0, 1, 0),
    (-1, 0, 0): (1, 0, 1),
    (0, 1, 0): (1, 1, 0),
    (0, -1, 0): (0, 0, 1),
}


def pyramid() -> Surface:
    """Pointing up along Z to 2, with feet at X 1 and 0 and at Y -3: no turn or mirror image is the same."""
    vertices = np.array([[0, 0, 2], [1, 0, 0], [0, -3, 0], [0, 0, 0]], np.float32)
    faces = np.array([[0, 2, 1], [0, 1, 3], [0, 3, 2], [1, 2, 3]])
    colours = np.array([[1, 0, 0], [0, 0.5, 0], [0, 0, 0.25], [0.1, 0.2, 0.3]], np.float32)
    return Surface(vertices, faces, colours)


def dice(extents: tuple[float, float, float] = (1, 1, 1)) -> Surface:
    """A box with a colour of its own on each side."""
    box: Any = trimesh.creation.box(extents)
    corners = box.triangles.reshape(-1, 3).astype(np.float32)
    normals = np.round(box.face_normals).astype(int)
    colours: npt.NDArray[np.float32] = np.repeat(
        np.array([SIDES[tuple(normal)] for normal in normals], np.float32), 3, axis=0
    )
    return Surface(corners, np.arange(len(corners)).reshape(-1, 3), colours)


def job(**fields: Any) -> Job:
    """A job of an object; what is not given has a small value."""
    given: dict[str, Any] = {
        "id": "abc",
        "task": "txt2mesh",
        "family": "mesh",
        "model": "shap-e",
        "prompt": "a chair\nmade of glass",
        "negative_prompt": "",
        "width": 256,
        "height": 256,
        "num_inference_steps": 64,
        "guidance_scale": 15.0,
        "scheduler": "HeunDiscreteScheduler",
        "seed": 7,
        "solid": Solid(grid_size=32, frame_size=64, turntable=False),
        "output_format": "glb",
        "output_compression": 90,
    }
    return Job.model_validate(given | fields)
