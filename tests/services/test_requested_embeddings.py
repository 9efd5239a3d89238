"""Embeddings that requests to a real server ask for."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from embedding_files import embedding_file
from PIL import Image
from server import ROOT, Server, serving

from jubako.adapters.store import AdapterStore

CONFIG = ROOT / "models" / "embedded" / "tiny-sd" / "text_encoder" / "config.json"
ASKED = {"model": "tiny-sd", "prompt": "a red zog on the left", "seed": 7, "steps": 4}


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two families, and embeddings that fit none and one of their models."""
    folder = tmp_path_factory.mktemp("embeddings")
    store, width = AdapterStore(folder / "jubako"), json.loads(CONFIG.read_text())["hidden_size"]
    store.add("zog", embedding_file(folder / "zog.safetensors", 1, zog=(3, width)))
    store.add("wide", embedding_file(folder / "wide.safetensors", 2, wide=(3, width + 1)))
    with serving(folder, JUBAKO_FAMILIES="sd,sd3") as server:
        yield server


def pixels(response: httpx.Response) -> np.ndarray[Any, Any]:
    assert response.status_code == 200, response.text
    return np.asarray(Image.open(io.BytesIO(response.content))).astype(int)


def test_they_change_the_picture_of_who_asks_and_no_other(own_server: Server) -> None:
    def drawn(**fields: Any) -> httpx.Response:
        return own_server.post("/txt2img", ASKED | fields)

    before = pixels(drawn())
    listed = drawn(embeddings=["zog"])
    tagged = drawn(prompt="a red <embedding:zog> on the left")
    negative = drawn(negative_prompt="a <embedding:zog>")
    assert abs(pixels(listed) - before).max() > 10
    assert np.array_equal(pixels(tagged), pixels(listed))
    assert abs(pixels(negative) - before).max() > 10
    assert np.array_equal(pixels(drawn()), before)
    said = json.loads(Image.open(io.BytesIO(listed.content)).info["jubako"])["job"]
    assert said["prompt"] == "a red <embedding:zog> on the left"
    assert [use["name"] for use in said["embeddings"]] == ["zog"]


def test_a_form_names_them_one_by_one_and_openai_s_route_takes_them(own_server: Server) -> None:
    wanted = pixels(own_server.post("/txt2img", ASKED | {"embeddings": ["zog"]}))
    form = {name: str(value) for name, value in ASKED.items()} | {"embeddings[]": "zog"}
    sent = httpx.post(f"{own_server.url}/txt2img", data=form, timeout=60)
    assert np.array_equal(pixels(sent), wanted)
    reply = own_server.post("/v1/images/generations", ASKED | {"embeddings": ["zog"]})
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"embeddings": ["zig"]}, "embeddings", "no adapter 'zig'. Did you mean 'zog'? Known: wide, zog"),
        ({"embeddings": ["../zog"]}, "embeddings.0", "should match pattern"),
        (
            {"embeddings": ["wide"], "prompt": "a wide zog"},
            "embeddings",
            "wide does not fit tiny-sd: its vectors",
        ),
        ({"embeddings": ["zog"], "prompt": "a star"}, "embeddings", "the word of zog, is in neither prompt"),
        ({"embeddings": ["zog"], "model": "tiny-sd3"}, "embeddings", "tiny-sd3 takes none"),
        ({"prompt": "a <embedding:zog>", "model": "tiny-sd3"}, "embeddings", "tiny-sd3 takes none"),
    ],
)
def test_refusals_name_the_field_and_the_choices(
    own_server: Server, fields: dict[str, Any], param: str, message: str
) -> None:
    response = own_server.post("/txt2img", ASKED | fields)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
