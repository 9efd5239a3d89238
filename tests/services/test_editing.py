"""Pictures made from pictures by a real server: its native routes and OpenAI's, with real clients."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
from pathlib import Path
from typing import Any

import bentoml
import httpx
import numpy as np
import openai
import pytest
from PIL import Image
from server import Server

PROMPT = "a large green circle on the left of a blue background"
SETTINGS: dict[str, Any] = {"num_inference_steps": 12, "seed": 3}
RED, GREEN, BLUE = (220, 40, 40), (40, 180, 60), (40, 80, 220)

# BentoML's client leaves its temporary folder to the garbage collector.
leaves_a_folder = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A red disc on the left of a blue picture."""
    sides = np.mgrid[0:64, 0:64]
    inside = (sides[0] - 32) ** 2 + (sides[1] - 19) ** 2 < 17**2
    path = tmp_path_factory.mktemp("pictures") / "red.png"
    Image.fromarray(np.where(inside[..., None], RED, BLUE).astype(np.uint8)).save(path)
    return path


@pytest.fixture(scope="module")
def left(red: Path) -> Path:
    """A mask of the left half: white is where to paint."""
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 40, 64))
    mask.save(red.with_name("left.png"))
    return red.with_name("left.png")


@pytest.fixture(scope="module")
def hole(red: Path, left: Path) -> Path:
    """The picture with its left half transparent."""
    picture = Image.open(red).convert("RGBA")
    picture.putalpha(Image.open(left).point(lambda level: 255 - level))
    picture.save(red.with_name("hole.png"))
    return red.with_name("hole.png")


def decoded(b64_json: str | None) -> Image.Image:
    assert b64_json
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def distance(picture: Image.Image, colour: tuple[int, int, int]) -> float:
    """How far the middle of the disc is from a colour, in levels."""
    disc = np.asarray(picture.convert("RGB"), dtype=float)[26:38, 13:25]
    return float(np.abs(disc - colour).mean())


def kept(picture: Image.Image, red: Path) -> float:
    """How far the right side, that no mask covers, is from the picture's own, in levels."""
    before, after = (np.asarray(p.convert("RGB"), dtype=float)[:, 44:] for p in (Image.open(red), picture))
    return float(np.abs(before - after).mean())


@leaves_a_folder
def test_bentoml_s_client_sends_pictures_as_paths_and_as_pil_images(
    server: Server, red: Path, left: Path
) -> None:
    with bentoml.SyncHTTPClient(server.url, timeout=60) as client:
        by_path = client.img2img(prompt=PROMPT, image=red, strength=0.9, **SETTINGS)
        by_image = client.img2img(prompt=PROMPT, image=Image.open(red), strength=0.9, **SETTINGS)
        painted = client.inpaint(prompt=PROMPT, image=str(red), mask=left, strength=1.0, **SETTINGS)
        assert by_path.tobytes() == by_image.tobytes()
        assert "Seed: 3" in painted.info["parameters"]
        assert distance(by_path, GREEN) < 40
        assert distance(painted, GREEN) < 40
        assert kept(painted, red) < 12
    del client
    gc.collect()


@leaves_a_folder
def test_bentoml_s_asynchronous_client_does_too(server: Server, red: Path) -> None:
    async def asked() -> Image.Image:
        async with bentoml.AsyncHTTPClient(server.url, timeout=60) as client:
            picture: Image.Image = await client.img2img(prompt=PROMPT, image=red, num_inference_steps=2)
            return picture.copy()

    assert asyncio.run(asked()).size == (64, 64)
    gc.collect()


def test_a_picture_comes_the_same_as_an_upload_and_in_json(server: Server, red: Path) -> None:
    fields = {"prompt": PROMPT, "steps": 4, "seed": 3}
    upload = httpx.post(f"{server.url}/img2img", data=fields, files={"image": red.read_bytes()}, timeout=60)
    text = base64.b64encode(red.read_bytes()).decode()
    plain = server.post("/img2img", {**fields, "image": text})
    url = server.post("/img2img", {**fields, "image": f"data:image/png;base64,{text}"})
    pictures = [Image.open(io.BytesIO(reply.content)) for reply in (upload, plain, url)]
    assert len({picture.tobytes() for picture in pictures}) == 1
    job = json.loads(pictures[0].info["jubako"])["job"]
    assert (job["task"], job["strength"], len(job["image_sha256"])) == ("img2img", 0.75, 64)


def test_little_strength_keeps_the_picture_and_much_does_not(server: Server, red: Path) -> None:
    text = base64.b64encode(red.read_bytes()).decode()
    pictures = [
        server.post("/img2img", {"prompt": PROMPT, "image": text, "strength": strength, **SETTINGS}).content
        for strength in (0.1, 0.95)
    ]
    weak, strong = (Image.open(io.BytesIO(content)) for content in pictures)
    assert distance(weak, RED) < distance(strong, RED)
    assert distance(strong, GREEN) < distance(weak, GREEN)


def test_openai_s_edit_with_a_mask_paints_only_there(client: openai.OpenAI, red: Path, left: Path) -> None:
    reply = client.images.edit(
        image=red,
        mask=left,
        prompt=PROMPT,
        n=2,
        size="64x64",
        response_format="b64_json",
        input_fidelity="high",
        extra_body={**SETTINGS, "strength": 1.0},
    )
    assert reply.data is not None
    assert [picture.seed for picture in reply.data] == [3, 4]  # type: ignore[attr-defined] # ours
    assert reply.warnings == ["input_fidelity is ignored"]  # type: ignore[attr-defined] # ours
    for picture in reply.data:
        assert distance(decoded(picture.b64_json), GREEN) < 40
        assert kept(decoded(picture.b64_json), red) < 12


def test_openai_s_edit_paints_what_is_transparent(client: openai.OpenAI, red: Path, hole: Path) -> None:
    reply = client.images.edit(image=[hole], prompt=PROMPT, extra_body={**SETTINGS, "strength": 1})
    assert reply.data is not None
    assert distance(decoded(reply.data[0].b64_json), GREEN) < 40
    assert kept(decoded(reply.data[0].b64_json), red) < 12


def test_openai_s_variations_are_like_the_picture(client: openai.OpenAI, red: Path) -> None:
    with pytest.warns(DeprecationWarning, match="deprecated"):
        reply = client.images.create_variation(image=red, n=2, extra_body=SETTINGS)
    assert reply.data is not None
    pictures = [decoded(picture.b64_json) for picture in reply.data]
    assert pictures[0].tobytes() != pictures[1].tobytes()
    assert all(json.loads(picture.info["jubako"])["job"]["strength"] == 0.6 for picture in pictures)


def test_an_edit_streams_its_steps(client: openai.OpenAI, red: Path) -> None:
    events = client.images.edit(
        image=red,
        prompt=PROMPT,
        stream=True,
        extra_body={"num_inference_steps": 4, "strength": 0.5},
    )
    *steps, last = [event.model_dump() for event in events]
    assert {step["type"] for step in steps} == {"image_edit.progress"}
    # Half of four steps.
    assert len(steps) == 2
    assert last["type"] == "image_edit.completed"
    assert decoded(last["b64_json"]).size == (64, 64)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"strngth": 0.5}, "strngth", "Did you mean 'strength'"),
        ({"strength": 0.001}, "strength", "take at least 0.04"),
        ({"resize_mode": "crop"}, "resize_mode", "'cover', 'fit' or 'exact'"),
        ({"model": "sd1.5-inpainting"}, "model", "does not do img2img"),
        ({"model": "sd1.5"}, "model", "jubako pull sd1.5"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"background": "transparent"}, "background", "opaque or auto"),
        ({"size": "65x64"}, "width", "the nearest legal are 64 and 72"),
        ({"n": 11}, "n", "limit of 10"),
    ],
)
def test_an_edit_that_can_not_be_is_refused_by_field(
    server: Server, red: Path, fields: dict[str, Any], param: str, message: str
) -> None:
    response = httpx.post(
        f"{server.url}/v1/images/edits",
        data={"prompt": "x", **fields},
        files={"image": red.read_bytes()},
        timeout=60,
    )
    error = response.json()["error"]
    assert 400 <= response.status_code < 500 or error["code"] == "model_not_on_disk"
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert message in error["message"]


def test_two_pictures_are_refused_and_addresses_are_not_fetched(
    server: Server, client: openai.OpenAI, red: Path
) -> None:
    with pytest.raises(openai.BadRequestError, match="one picture is taken, not 2"):
        client.images.edit(image=[red, red], prompt="x")
    for route in ("/img2img", "/inpaint", "/v1/images/edits", "/v1/images/variations"):
        error = server.post(route, {"prompt": "x", "image": f"{server.url}/livez"}).json()["error"]
        assert error["param"] == "image"
        assert "addresses are not fetched" in error["message"]


@pytest.mark.parametrize("route", ["/img2img", "/v1/images/edits", "/v1/images/compare"])
def test_a_file_past_50_mb_is_too_large(server: Server, route: str) -> None:
    fields = {"prompt": "x", **({"models": "tiny-sd"} if route.endswith("compare") else {})}
    large = {"image": bytes(50 * 2**20 + 1)}
    response = httpx.post(f"{server.url}{route}", data=fields, files=large, timeout=60)
    assert response.status_code == 413
    assert response.json()["error"]["param"] == "image"


def test_a_comparison_is_a_sheet_and_its_pictures(server: Server, red: Path) -> None:
    fields = {"prompt": PROMPT, "seed": 3, "guidance_scale": 1, "negative_prompt": "x"}
    axis = {"field": "steps", "values": [1, 3]}
    reply = server.post("/v1/images/compare", {**fields, "models": ["tiny-sd"], "axis": axis}).json()
    assert reply["seed"] == 3
    assert [(entry["model"], entry["value"], entry["seed"]) for entry in reply["data"]] == [
        ("tiny-sd", 1, 3),
        ("tiny-sd", 3, 3),
    ]
    assert [entry["settings"]["num_inference_steps"] for entry in reply["data"]] == [1, 3]
    assert all(decoded(entry["b64_json"]).size == (64, 64) for entry in reply["data"])
    sheet = decoded(reply["sheet"]["b64_json"])
    assert (sheet.format, *sheet.size) == ("PNG", reply["sheet"]["width"], reply["sheet"]["height"])
    (warning,) = reply["warnings"]
    assert warning.startswith("tiny-sd: negative_prompt has no effect")
    alone = server.post("/v1/images/generations", {**fields, "steps": 3}).json()["data"][0]
    assert decoded(alone["b64_json"]).tobytes() == decoded(reply["data"][1]["b64_json"]).tobytes()


def test_a_comparison_takes_a_picture_in_a_form(server: Server, red: Path) -> None:
    response = httpx.post(
        f"{server.url}/v1/images/compare",
        data={
            "prompt": PROMPT,
            "models": "tiny-sd",
            "steps": "4",
            "axis[field]": "strength",
            "axis[values]": "0.3,0.9",
        },
        files={"image": red.read_bytes()},
        timeout=60,
    )
    assert response.status_code == 200, response.text
    assert [entry["settings"]["strength"] for entry in response.json()["data"]] == [0.3, 0.9]


def test_a_comparison_with_a_model_that_is_not_on_disk_says_which(server: Server) -> None:
    response = server.post("/v1/images/compare", {"prompt": "x", "models": ["tiny-sd", "sd1.5"], "steps": 1})
    assert (response.status_code, response.json()["error"]["code"]) == (503, "model_not_on_disk")
    assert "jubako pull sd1.5" in response.json()["error"]["message"]
