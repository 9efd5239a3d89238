"""Bodies as every kind of client sends them: JSON, forms, uploads; and what is refused of them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from jubako.compare import Comparison
from jubako.errors import JubakoError
from jubako.images import ImagesEdit
from jubako.request import ImageToImage
from jubako.request import Request as RequestFields
from jubako.services.bodies import MAX_BODY_BYTES, MAX_TEXT_BYTES, read_request, read_upload
from jubako.services.connection import answer

# Starlette's test client answers with the response of whichever HTTP library it found.
Reply = Any

KINDS: dict[str, tuple[type[RequestFields], bool]] = {
    "edit": (ImagesEdit, False),
    "native": (ImageToImage, True),
    "compare": (Comparison, False),
}


async def read(body: Request) -> Response:
    """Answer with the fields that were set."""
    kind, quoted = KINDS[body.path_params["kind"]]
    try:
        request = await read_request(body, kind, quoted=quoted)
    except JubakoError as error:
        return answer(error)
    return JSONResponse(json.loads(request.model_dump_json(exclude_unset=True)))


class Uploaded(RequestFields):
    """What comes beside a file."""

    name: str = "none"


async def take(body: Request) -> Response:
    """Answer with the name and the size of an upload of at most 2 MB."""
    try:
        async with read_upload(body, Uploaded, 2 * 2**20) as (request, content):
            return JSONResponse({"name": request.name, "bytes": len(content.read())})
    except JubakoError as error:
        return answer(error)


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    routes = [Route("/uploads/one", take, methods=["POST"]), Route("/{kind}", read, methods=["POST"])]
    with TestClient(Starlette(routes=routes)) as client:
        yield client


def fields(response: Reply) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    read: dict[str, Any] = response.json()
    return read


def error(response: Reply, status: int = 400) -> tuple[str | None, str]:
    assert response.status_code == status, response.text
    body = response.json()["error"]
    return body["param"], body["message"]


def form(client: TestClient, parts: list[tuple[str, str]], kind: str = "edit") -> Reply:
    """A multipart form whose names may repeat, with one upload."""
    files: list[Any] = [(name, (None, value)) for name, value in parts]
    return client.post(f"/{kind}", files=[*files, ("image", ("../../a.png", b"abc"))])


def test_a_form_s_text_becomes_numbers_and_switches(client: TestClient) -> None:
    sent = [("prompt", "x"), ("n", "2"), ("steps", "4"), ("strength", "0.5"), ("stream", "true")]
    assert fields(form(client, [*sent, ("refiner", "0.7")])) == {
        "prompt": "x",
        "n": 2,
        "num_inference_steps": 4,
        "strength": 0.5,
        "stream": True,
        "refiner": 0.7,
        "image": "abc",
    }


@pytest.mark.parametrize(
    "parts",
    [
        [("skip_layer_guidance[layers][]", "7"), ("skip_layer_guidance[layers][]", "8")],
        [("skip_layer_guidance", '{"layers": [7, 8]}')],
    ],
)
def test_nested_values_come_by_their_names_or_as_json(
    client: TestClient, parts: list[tuple[str, str]]
) -> None:
    read = fields(form(client, [("prompt", "x"), *parts]))
    assert read["skip_layer_guidance"] == {"layers": [7, 8]}


@pytest.mark.parametrize(
    "parts",
    [[("original_size[]", "512"), ("original_size[]", "640")], [("original_size", "[512, 640]")]],
)
def test_lists_come_by_their_names_or_as_json(client: TestClient, parts: list[tuple[str, str]]) -> None:
    assert fields(form(client, [("prompt", "x"), *parts]))["original_size"] == [512, 640]


@pytest.mark.parametrize("prompt", ['["a"]', "[x] (y:1.2)", '"quoted"', "7", "true", "null", "ä — ☃"])
def test_a_prompt_is_text_whatever_it_looks_like(client: TestClient, prompt: str) -> None:
    assert fields(form(client, [("prompt", prompt)]))["prompt"] == prompt
    assert fields(form(client, [("prompt", prompt)], "native"))["prompt"] == prompt.strip('"')


def test_bentoml_s_client_sends_every_field_as_json(client: TestClient) -> None:
    sent = {"prompt": 'say "hi"', "steps": 4, "scheduler": None, "crop": [0, 8], "output_format": "webp"}
    read = fields(form(client, [(name, json.dumps(value)) for name, value in sent.items()], "native"))
    assert read | {"image": ""} == {
        "prompt": 'say "hi"',
        "num_inference_steps": 4,
        "scheduler": None,
        "crop": [0, 8],
        "output_format": "webp",
        "image": "",
    }


@pytest.mark.parametrize("text", [base64.b64encode(b"abc").decode(), "data:image/png;base64,YWJj"])
def test_a_picture_may_be_text_of_a_form_or_of_json(client: TestClient, text: str) -> None:
    for kind in ("edit", "native"):
        body = {"prompt": "x", "image": text}
        assert fields(client.post(f"/{kind}", json=body))["image"] == "abc"
        assert fields(client.post(f"/{kind}", data=body))["image"] == "abc"
        assert (
            fields(client.post(f"/{kind}", files={k: (None, v) for k, v in body.items()}))["image"] == "abc"
        )


def test_openai_s_list_of_one_picture_is_taken(client: TestClient) -> None:
    one = ("image[]", ("a.png", b"abc"))
    assert fields(client.post("/edit", data={"prompt": "x"}, files=[one]))["image"] == "abc"
    assert error(client.post("/edit", data={"prompt": "x"}, files=[one, one])) == (
        "image",
        "image: one picture is taken, not 2",
    )


def test_a_comparison_s_lists_come_in_any_of_these_ways(client: TestClient) -> None:
    axis = [("axis[field]", "steps"), ("axis[values][]", "4"), ("axis[values][]", "8")]
    for models in ([("models", "a, b")], [("models[]", "a"), ("models[]", "b")], [("models", '["a", "b"]')]):
        read = fields(form(client, [("prompt", "x"), *models, *axis], "compare"))
        assert read["models"] == ["a", "b"]
        assert read["axis"] == {"field": "num_inference_steps", "values": ["4", "8"]}


@pytest.mark.parametrize(
    ("parts", "param", "message"),
    [
        ([("prompt", "x"), ("prompt", "y")], "prompt", "prompt: given twice"),
        ([("prompt", "x"), ("image", "YWJj")], "image", "image: given twice"),
        ([("prompt", "x"), ("image[]", "YWJj")], "image", "image: given twice"),
        ([("prompt", "x"), ("steps", "3"), ("num_inference_steps", "3")], "steps", "is another name of"),
        ([("prompt", "x"), ("stpes", "3")], "stpes", "Did you mean 'steps'"),
        ([("prompt", "x"), ("steps", "many")], "steps", "valid integer"),
        ([("prompt", "x"), ("steps", "")], "steps", "valid integer"),
        ([("prompt", "x"), ("crop[a][]", "3")], "crop", "valid tuple"),
        ([("prompt", "x"), ("crop[][a]", "3")], "crop[][a]", "has no name that is understood"),
        ([("prompt", "x"), ("[]", "3")], "[]", "has no name that is understood"),
        ([("prompt[a]", "x")], "prompt", "valid string"),
        ([], "prompt", "Field required"),
    ],
)
def test_what_a_form_can_not_mean_is_refused_by_field(
    client: TestClient, parts: list[tuple[str, str]], param: str, message: str
) -> None:
    named, told = error(form(client, parts))
    assert named == param
    assert message in told


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"", "application/json"),
        (b"\xff", "application/json"),
        (b"x", "multipart/form-data"),
        (b"x", "multipart/form-data; boundary=y"),
        (b'--y\r\nContent-Disposition: form-data; name="a"', "multipart/form-data; boundary=y"),
        (b"--y\r\nContent-Disposition: form-data\r\n\r\nx\r\n--y--", "multipart/form-data; boundary=y"),
        (b"%ff=%ff", "application/x-www-form-urlencoded"),
        (b"x", "image/png"),
    ],
)
def test_a_body_that_can_not_be_read_is_refused(
    client: TestClient, content: bytes, content_type: str
) -> None:
    for kind in ("edit", "native"):
        _, message = error(client.post(f"/{kind}", content=content, headers={"content-type": content_type}))
        assert message


def test_files_and_bodies_past_their_limits_are_too_large(client: TestClient) -> None:
    large = bytes(50 * 2**20 + 1)
    response = client.post("/edit", data={"prompt": "x"}, files={"image": ("a.png", large)})
    assert error(response, 413) == ("image", "image: a file of more than 50 MB is not taken")
    announced = {"content-length": str(MAX_BODY_BYTES + 1)}
    assert error(client.post("/edit", content=b"{}", headers=announced), 413)[0] is None

    def endless() -> Iterator[bytes]:
        for _ in range(MAX_BODY_BYTES // 2**24 + 1):
            yield bytes(2**24)

    assert "a body of more than 150 MB" in error(client.post("/edit", content=endless()), 413)[1]


def test_too_many_parts_are_refused(client: TestClient) -> None:
    assert "Too many fields" in error(form(client, [("prompt", "x")] * 300))[1]


def test_an_upload_is_one_file_up_to_its_own_limit(client: TestClient) -> None:
    size = 2 * 2**20
    sent = client.post("/uploads/one", data={"name": "a"}, files={"file": ("b", bytes(size))})
    assert fields(sent) == {"name": "a", "bytes": size}
    assert fields(client.post("/uploads/one", files={"file": ("b", b"x")})) == {"name": "none", "bytes": 1}


@pytest.mark.parametrize("announced", [True, False], ids=["announced", "in chunks"])
def test_an_upload_past_its_limit_is_too_large(client: TestClient, announced: bool) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    content = part + bytes(2 * 2**20 + MAX_TEXT_BYTES) + b"\r\n--b--\r\n"
    chunks = iter([content[: 2**20], content[2**20 :]])
    reply = client.post(
        "/uploads/one",
        content=content if announced else chunks,
        headers={"Content-Type": "multipart/form-data; boundary=b"},
    )
    assert error(reply, 413) == (None, "a body of more than 3 MB is not taken")


def test_an_upload_s_text_is_short(client: TestClient) -> None:
    long: Any = {"name": (None, "x" * (MAX_TEXT_BYTES + 1)), "file": ("b", b"x")}
    assert error(client.post("/uploads/one", files=long))[1].startswith(
        "the form can't be read: Part exceeded"
    )
