"""Which files a finished object comes as."""

from __future__ import annotations

import io
from typing import Any

import av
import numpy as np
import pytest
import trimesh
from PIL import Image
from solid_objects import dice, job

from jubako.job import Solid
from jubako.result import File
from jubako.solids import solid_files
from jubako.surface import encode_surface, read_glb
from jubako.turntable import VIEWS, turntable

TURNING = Solid(grid_size=32, frame_size=64, turntable=True)


def frames(file: File) -> Any:
    """The frames of an MP4, [frames, height, width, 3]."""
    with av.open(io.BytesIO(file.content), "r") as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("file_format", ["glb", "obj"])
def test_a_mesh_comes_alone_where_no_turntable_is_asked_for(file_format: str) -> None:
    one = job(output_format=file_format)
    file, variants = solid_files(dice(), one, {})
    assert file.content == encode_surface(dice(), file_format, one, {})
    assert file.content_type == {"glb": "model/gltf-binary", "obj": "model/obj"}[file_format]
    assert variants == {}


def test_a_turntable_beside_a_mesh_is_an_mp4_of_its_views() -> None:
    box = dice((1.0, 0.8, 0.5))
    file, variants = solid_files(box, job(solid=TURNING), {})
    assert len(read_glb(file.content).faces) == 12
    clip = variants["turntable"]
    assert clip.content_type == "video/mp4"
    shown, views = frames(clip).astype(int), turntable(box, 64)
    assert shown.shape == views.shape == (VIEWS, 64, 64, 3)
    # The codec is lossy, but every frame is nearer to its own view than to any other.
    apart = np.abs(shown[:, None] - views[None]).mean(axis=(2, 3, 4))
    assert apart.argmin(axis=1).tolist() == list(range(VIEWS))


def test_a_turntable_alone_has_the_mesh_beside_it() -> None:
    clip, variants = solid_files(dice(), job(solid=TURNING, output_format="mp4"), {})
    assert clip.content_type == "video/mp4"
    assert len(frames(clip)) == VIEWS
    assert set(variants) == {"mesh"}
    assert variants["mesh"].content_type == "model/gltf-binary"
    assert len(trimesh.load_mesh(io.BytesIO(variants["mesh"].content), file_type="glb").faces) == 12


def test_a_gif_turns_once_in_two_seconds_and_again() -> None:
    file, _ = solid_files(dice(), job(solid=TURNING, output_format="gif"), {})
    image = Image.open(io.BytesIO(file.content))
    assert (image.format, image.size, image.info["loop"]) == ("GIF", (64, 64), 0)
    assert getattr(image, "n_frames", 1) == VIEWS


def test_the_file_that_an_object_was_read_from_is_given_as_it_is() -> None:
    own = encode_surface(dice(), "glb", job(seed=1), {})
    assert solid_files(dice(), job(seed=2), {}, own)[0].content == own
    assert solid_files(dice(), job(solid=TURNING, output_format="mp4"), {}, own)[1]["mesh"].content == own
    assert b"jubako" in solid_files(dice(), job(output_format="obj"), {}, own)[0].content
