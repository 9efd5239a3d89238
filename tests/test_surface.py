"""Surfaces as files: upright, coloured, with the settings inside, and read back."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
import trimesh
from PIL import Image
from solid_objects import SIDES, dice, job, pyramid

from jubako.surface import Surface, encode_surface, read_glb, upright

FACTS = {"commit": "0123"}


def loaded(data: bytes, file_format: str = "glb") -> Any:
    return trimesh.load_mesh(io.BytesIO(data), file_type=file_format, process=False)


def textured(uv: Any, **material: Any) -> Any:
    visual: Any = trimesh.visual
    return visual.TextureVisuals(uv=uv, material=visual.material.PBRMaterial(**material))


def same(one: Surface, other: Surface, colour: float = 0.02) -> bool:
    """Whether places and triangles are equal and no colour is further apart than that."""
    return bool(
        np.allclose(one.vertices, other.vertices, atol=1e-6)
        and np.array_equal(one.faces, other.faces)
        and np.abs(one.colours - other.colours).max() < colour
    )


def test_z_up_becomes_y_up_and_the_front_faces_z() -> None:
    mesh = loaded(encode_surface(upright(pyramid()), "glb", job(), FACTS))
    assert mesh.bounds.tolist() == [[0, 0, 0], [1, 2, 3]]
    # Turned, not mirrored: its faces still look outwards.
    assert mesh.volume == pytest.approx(1.0)


@pytest.mark.parametrize("file_format", ["glb", "obj"])
def test_a_file_loads_with_the_same_triangles(file_format: str) -> None:
    mesh = loaded(encode_surface(pyramid(), file_format, job(), FACTS), file_format)
    assert len(mesh.faces) == 4
    assert mesh.is_watertight
    assert np.allclose(np.sort(mesh.vertices, axis=0), np.sort(pyramid().vertices, axis=0))


def test_colours_of_a_glb_are_linear_and_come_back_as_they_were() -> None:
    data = encode_surface(pyramid(), "glb", job(), FACTS)
    written = np.asarray(loaded(data).visual.vertex_colors)
    # Half as bright on a screen is a fifth of the light.
    assert written[1].tolist() == [0, round(0.2140 * 255), 0, 255]
    assert same(read_glb(data), pyramid())


def test_colours_of_an_obj_are_those_of_a_screen() -> None:
    text = encode_surface(pyramid(), "obj", job(), FACTS).decode()
    vertices = [line.split()[1:] for line in text.splitlines() if line.startswith("v ")]
    assert np.allclose(np.array(vertices, float)[:, 3:6], pyramid().colours, atol=1 / 255)


def test_a_glb_has_normals_and_the_settings_inside() -> None:
    data = encode_surface(pyramid(), "glb", job(), FACTS)
    length = int.from_bytes(data[12:16], "little")
    tree = json.loads(data[20 : 20 + length])
    assert "NORMAL" in tree["meshes"][0]["primitives"][0]["attributes"]
    settings = tree["asset"]["extras"]["jubako"]
    assert settings["commit"] == "0123"
    assert settings["job"]["prompt"] == "a chair\nmade of glass"
    assert settings["job"]["solid"]["grid_size"] == 32


def test_an_obj_has_the_settings_in_its_first_line() -> None:
    first = encode_surface(pyramid(), "obj", job(), FACTS).decode().splitlines()[0]
    assert json.loads(first.removeprefix("# jubako "))["job"]["seed"] == 7


def test_the_same_surface_and_job_give_the_same_file() -> None:
    for file_format in ("glb", "obj"):
        assert encode_surface(pyramid(), file_format, job(), FACTS) == encode_surface(
            pyramid(), file_format, job(), FACTS
        )


def test_a_textured_glb_has_at_each_vertex_the_colour_of_its_texture() -> None:
    picture = Image.new("RGB", (64, 64), "red")
    picture.paste((0, 0, 255), (32, 0, 64, 64))
    mesh: Any = trimesh.Trimesh([[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 1, 2]], process=False)
    mesh.visual = textured([[0.1, 0.5], [0.9, 0.5], [0.1, 0.9]], baseColorTexture=picture)
    surface = read_glb(bytes(mesh.export(file_type="glb")))
    assert surface.colours.tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]


def test_a_material_without_a_texture_colours_all_vertices() -> None:
    mesh: Any = trimesh.creation.box((1, 1, 1))
    mesh.visual = textured(np.zeros((8, 2)), baseColorFactor=[0, 255, 0, 255])
    surface = read_glb(bytes(mesh.export(file_type="glb")))
    assert np.array_equal(surface.colours, np.tile([0, 1, 0], (len(surface.vertices), 1)))


def test_a_scene_is_read_whole_with_its_parts_in_their_places() -> None:
    scene: Any = trimesh.Scene()
    for place in (-2, 2):
        transform = np.eye(4)
        transform[0, 3] = place
        scene.add_geometry(trimesh.creation.box((1, 1, 1)), transform=transform)
    surface = read_glb(bytes(scene.export(file_type="glb")))
    assert len(surface.faces) == 24
    assert surface.vertices.min(axis=0).tolist() == [-2.5, -0.5, -0.5]
    assert surface.vertices.max(axis=0).tolist() == [2.5, 0.5, 0.5]
    assert surface.faces.max() == len(surface.vertices) - 1


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"glTF",
        b"not a GLB file at all, but long enough",
        encode_surface(pyramid(), "glb", job(), FACTS)[:-1],
        encode_surface(pyramid(), "obj", job(), FACTS),
        encode_surface(pyramid(), "glb", job(), FACTS).replace(b'"VEC3"', b'"VEC9"'),
    ],
)
def test_what_is_no_glb_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="GLB file"):
        read_glb(data)


def test_places_that_are_no_numbers_are_refused() -> None:
    broken = Surface(pyramid().vertices * np.float32("nan"), pyramid().faces, pyramid().colours)
    with pytest.raises(ValueError, match="triangles without places"):
        read_glb(encode_surface(broken, "glb", job(), FACTS))


def test_every_side_of_a_die_keeps_its_colour() -> None:
    surface = read_glb(encode_surface(dice(), "glb", job(), FACTS))
    assert same(surface, dice(), colour=1e-6)
    assert {tuple(colour) for colour in surface.colours.round(3).tolist()} == set(SIDES.values())
