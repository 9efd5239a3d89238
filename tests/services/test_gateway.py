"""The public routes of a real server, with real clients."""

from __future__ import annotations

import base64
import gc
import io
import json
from typing import Any

import bentoml
import httpx
import openai
import pytest
from PIL import Image
from server import Server

from jubako.catalog import load_catalog

ROUTES = ("/txt2img", "/v1/images/generations")


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def decoded(b64_json: str | None) -> Image.Image:
    assert b64_json
    return Image.open(io.BytesIO(base64.b64decode(b64_json)))


def test_the_native_route_returns_a_png_with_seed_and_timings_in_its_headers(server: Server) -> None:
    response = server.post("/txt2img", {"prompt": "a red circle", "seed": 7, "steps": 4})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-seed"] == "7"
    phases = [part.split(";")[0] for part in response.headers["server-timing"].split(", ")]
    assert phases == ["queued", "prepared", "denoised", "decoded", "encoded"]
    image = Image.open(io.BytesIO(response.content))
    assert image.size == (64, 64)
    assert json.loads(image.info["jubako"])["job"]["seed"] == 7


# BentoML's client leaves its temporary folder to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_bentoml_s_own_client_gets_a_picture(server: Server) -> None:
    with bentoml.SyncHTTPClient(server.url, timeout=60) as client:
        image = client.txt2img(prompt="a red circle", num_inference_steps=4, seed=7)
        assert image.size == (64, 64)
        assert "Seed: 7" in image.info["parameters"]
        assert "tiny-sd" in {model["id"] for model in client.models()}
    del client
    gc.collect()


def test_openai_s_client_gets_pictures_with_their_seeds(client: openai.OpenAI) -> None:
    reply = client.images.generate(
        prompt="a red circle",
        model="tiny-sd",
        n=2,
        size="96x64",
        response_format="b64_json",
        output_format="webp",
        quality="hd",
        user="someone",
        extra_body={
            "seed": 7,
            "negative_prompt": "blue",
            "num_inference_steps": 4,
            "guidance_scale": 3,
            "scheduler": "Euler a",
        },
    )
    assert reply.data is not None
    assert [picture.seed for picture in reply.data] == [7, 8]  # type: ignore[attr-defined] # ours
    for picture in reply.data:
        image = decoded(picture.b64_json)
        assert (image.format, image.size) == ("WEBP", (96, 64))
    assert reply.output_format == "webp"
    assert reply.warnings == ["quality is ignored"]  # type: ignore[attr-defined] # ours


def test_openai_s_client_streams_steps_and_then_the_picture(client: openai.OpenAI) -> None:
    events = client.images.generate(
        prompt="a red circle", stream=True, extra_body={"num_inference_steps": 3, "seed": 7}
    )
    *steps, last = [event.model_dump() for event in events]
    assert [(step["step"], step["steps"]) for step in steps] == [(1, 3), (2, 3), (3, 3)]
    assert last["type"] == "image_generation.completed"
    assert decoded(last["b64_json"]).size == (64, 64)


def test_both_routes_give_the_same_picture_for_the_same_job(server: Server) -> None:
    fields = {"prompt": "a red circle", "seed": 11, "steps": 4}
    native = Image.open(io.BytesIO(server.post("/txt2img", fields).content))
    reply = server.post("/v1/images/generations", fields).json()
    assert native.tobytes() == decoded(reply["data"][0]["b64_json"]).tobytes()


@pytest.mark.parametrize("route", [*ROUTES, "/v1/jobs", "/v1/images/compare"])
def test_a_model_whose_licence_nobody_accepted_is_refused_with_its_link(server: Server, route: str) -> None:
    own = {"task": "txt2img"} if route == "/v1/jobs" else {}
    chosen = {"models": ["tiny-sd", "sd-turbo"]} if route.endswith("compare") else {"model": "sd-turbo"}
    reply = server.post(route, {"prompt": "a red circle", **own, **chosen})
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (403, "licence_not_accepted", "model")
    for told in (
        "sai-nc-community",
        load_catalog().model("sd-turbo").licence.url,
        "JUBAKO_ACCEPTED_LICENCES",
    ):
        assert told in error["message"]


def test_models_are_listed_in_openai_s_shape_with_licences_and_limits(client: openai.OpenAI) -> None:
    listed = {model.id: model.model_dump() for model in client.models.list()}
    assert list(listed) == list(load_catalog().only(("sd",)).names)
    assert listed["tiny-sd"]["on_disk"] is True
    assert listed["sd1.5"]["on_disk"] is False
    assert listed["sd-turbo"]["licence"]["commercial"] == "no"
    asked = {
        name: (entry["licence"]["acceptance"], entry["licence"]["accepted"]) for name, entry in listed.items()
    }
    assert asked["tiny-sd"] == asked["sd1.5"] == (False, True)
    assert asked["sd-turbo"] == (True, False)
    one = client.models.retrieve("tiny-sd").model_dump()
    assert one["limits"] == listed["tiny-sd"]["limits"]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("fields", "status", "param", "message"),
    [
        ({"prompt": "x", "model": "nope"}, 404, "model", "Known: tiny-sd, sd1.4"),
        ({"prompt": "x", "stpes": 3}, 400, "stpes", "Did you mean 'steps'"),
        ({}, 400, "prompt", "Field required"),
        ({"prompt": "x", "width": 65}, 400, "width", "the nearest legal are 64 and 72"),
        ({"prompt": "x", "height": 4096}, 400, "height", "outside of 32 to 128"),
        ({"prompt": "x", "steps": 1000}, 400, "num_inference_steps", "takes 1 to 150 steps"),
        ({"prompt": "x", "steps": "many"}, 400, "steps", "valid integer"),
        ({"prompt": "x" * 5000}, 400, "prompt", "limit of 4000"),
        ({"prompt": "x", "scheduler": "Eular"}, 400, "scheduler", "Did you mean 'Euler'"),
        ({"prompt": "x", "model": "sd1.5"}, 503, "model", "jubako pull sd1.5"),
        ({"prompt": "x", "model": "sd1.5-inpainting"}, 400, "model", "it does: inpaint"),
    ],
)
def test_a_refusal_names_the_field_and_the_choices(
    server: Server, route: str, fields: dict[str, Any], status: int, param: str, message: str
) -> None:
    response = server.post(route, fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert message in error["message"]


def test_openai_only_fields_are_refused_in_the_same_shape(server: Server) -> None:
    for fields, param in (
        ({"n": 99}, "n"),
        ({"size": "huge"}, "size"),
        ({"response_format": "url"}, "response_format"),
    ):
        response = server.generate("x", **fields)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == param


def test_what_has_no_effect_is_told_by_both_routes(server: Server) -> None:
    fields = {"prompt": "x", "steps": 1, "guidance_scale": 1, "negative_prompt": "ä"}
    told = "negative_prompt has no effect at a guidance_scale of 1 or below"
    assert json.loads(server.post("/txt2img", fields).headers["x-warnings"]) == [told]
    reply = server.post("/v1/images/generations", {**fields, "style": "vivid"}).json()
    assert reply["warnings"] == ["style is ignored", told]
    assert "x-warnings" not in server.post("/txt2img", {"prompt": "x", "steps": 1}).headers


@pytest.mark.parametrize(
    ("method", "path", "content", "content_type", "status"),
    [
        ("POST", "/txt2img", b"{", "application/json", 400),
        ("POST", "/v1/images/generations", b"{", "application/json", 400),
        ("POST", "/v1/images/generations", b"a=b", "application/x-www-form-urlencoded", 400),
        ("POST", "/v1/images/edits", b"{", "application/json", 400),
        ("POST", "/v1/images/variations", b"a", "multipart/form-data", 400),
        ("POST", "/img2img", b"a", "multipart/form-data; boundary=b", 400),
        ("POST", "/inpaint", b"a=b", "application/x-www-form-urlencoded", 400),
        ("POST", "/v1/images/compare", b"[]", "application/json", 400),
        ("GET", "/v1/images/edits", b"", "application/json", 405),
        ("POST", "/txt2img", b"[]", "application/json", 400),
        ("POST", "/txt2img", b'"a"', "application/json", 400),
        ("POST", "/txt2img", b"\x80\x04N.", "application/vnd.bentoml+pickle", 415),
        ("GET", "/txt2img", b"", "application/json", 405),
        ("GET", "/v1/images/generations", b"", "application/json", 405),
        ("GET", "/nowhere", b"", "application/json", 404),
        ("GET", "/v1/models/nope", b"", "application/json", 404),
    ],
)
def test_every_other_failure_has_the_one_error_shape_too(
    server: Server, method: str, path: str, content: bytes, content_type: str, status: int
) -> None:
    response = httpx.request(
        method, server.url + path, content=content, headers={"content-type": content_type}, timeout=10
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]


def test_a_stream_that_can_not_start_says_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match=r"jubako pull sd1\.5"):
        list(client.images.generate(prompt="x", model="sd1.5", stream=True))


def test_the_gateway_s_process_has_no_torch(server: Server) -> None:
    import psutil

    workers = {}
    for process in psutil.Process(server.process.pid).children(recursive=True):
        arguments = " ".join(process.cmdline())
        if "worker" in arguments:
            maps = {mapped.path for mapped in process.memory_maps()}
            workers[arguments] = any("libtorch" in path for path in maps)
    gateway = [has_torch for arguments, has_torch in workers.items() if "--service-name SD" not in arguments]
    family = [has_torch for arguments, has_torch in workers.items() if "--service-name SD" in arguments]
    assert family == [True]
    assert gateway == [False]
