"""Adapters over HTTP: sent, listed, used, removed; and what is refused leaves nothing behind."""

from __future__ import annotations

import asyncio
import http.client
import json
import pickle
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from embedding_files import embedding_file
from lora_files import tiny_sd_lora
from safetensors.torch import save
from server import Server

from jubako.weights.checkpoint import digest

Form = list[tuple[str, tuple[str | None, bytes]]]


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    """A client of the server, whose adapters it removes in the end."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client
        for adapter in client.get("/v1/adapters").json()["data"]:
            assert client.delete(f"/v1/adapters/{adapter['id']}").status_code == 200


@pytest.fixture
def home(server: Server) -> Path:
    return server.log.parent / "jubako"


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return tiny_sd_lora(tmp_path_factory.mktemp("lora") / "zog.safetensors", 1).read_bytes()


def form(content: bytes, *more: tuple[str, str], file: str = "zog.safetensors") -> Form:
    return [("file", (file, content)), *((name, (None, text.encode())) for name, text in more)]


def written(home: Path) -> list[str]:
    folder = home / "adapters"
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(reply: httpx.Response, status: int = 400) -> tuple[str | None, str]:
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["param"], error["message"]


def header(document: Any, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + data


def zipped() -> bytes:
    """What torch.save writes: a pickle in a ZIP file."""
    kept = BytesIO()
    with zipfile.ZipFile(kept, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"unet.to_q.lora_A.weight": 1}))
    return kept.getvalue()


def test_one_is_sent_listed_shown_used_and_removed(
    client: httpx.Client, home: Path, lora: bytes, tmp_path: Path
) -> None:
    reply = client.post(
        "/v1/adapters", files=form(lora, ("name", "zog"), ("base", "tiny-sd"), ("trigger", "zog"))
    )
    assert reply.status_code == 201, reply.text
    assert reply.headers["location"] == "/v1/adapters/zog"
    (tmp_path / "same").write_bytes(lora)
    told = {"id": "zog", "object": "adapter", "name": "zog", "kind": "lora", "bytes": len(lora)}
    told |= {"sha256": digest(tmp_path / "same"), "base": "tiny-sd", "trigger": "zog"}
    made = reply.json()
    assert made.items() >= told.items()
    assert abs(made["created"] - time.time()) < 60
    assert written(home) == ["zog", "zog/adapter.safetensors", "zog/card.json"]

    listed = client.get("/v1/adapters").json()
    assert listed.keys() == {"object", "data", "first_id", "last_id", "has_more"}
    assert (listed["object"], listed["has_more"], listed["first_id"]) == ("list", False, "zog")
    shown = client.get("/v1/adapters/zog").json()
    assert shown == made
    assert shown.pop("card") == {"base": "tiny-sd", "trigger": "zog"}
    assert listed["data"] == [shown]

    asked: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "steps": 3}
    plain = client.post("/txt2img", json=asked)
    styled = client.post("/txt2img", json=asked | {"loras": [{"name": "zog"}]})
    assert (plain.status_code, styled.status_code) == (200, 200)
    assert plain.content != styled.content

    gone = client.delete("/v1/adapters/zog")
    assert gone.json() == {"id": "zog", "object": "adapter", "deleted": True}
    assert written(home) == []
    assert refused(client.delete("/v1/adapters/zog"), 404)[0] == "name"
    param, message = refused(client.post("/txt2img", json=asked | {"loras": [{"name": "zog"}]}))
    assert (param, message) == ("loras", "loras: there is no adapter 'zog'. Known: none")


def test_an_embedding_is_told_from_loras(client: httpx.Client, tmp_path: Path) -> None:
    content = embedding_file(tmp_path / "x.safetensors", emb_params=(2, 128)).read_bytes()
    made = client.post("/v1/adapters", files=form(content, ("name", "zog"), ("trigger", "<zog>")))
    assert (made.status_code, made.json()["kind"]) == (201, "embedding")
    asked: dict[str, Any] = {"prompt": "a <zog>", "embeddings": ["zog"], "steps": 1}
    assert client.post("/txt2img", json=asked).status_code == 200
    param, message = refused(client.post("/txt2img", json=asked | {"loras": [{"name": "zog"}]}))
    assert param == "loras"
    assert "'zog' is of the kind embedding" in message


def test_one_of_another_family_or_that_was_not_pulled_is_refused_before_anything_is_queued(
    client: httpx.Client, lora: bytes
) -> None:
    """Also on a server that serves neither the family nor its models."""
    client.post("/v1/adapters", files=form(lora, ("name", "stranger"), ("base", "sdxl")))
    for name, told in (
        ("stranger", "loras: stranger was made for sdxl of the family sdxl; tiny-sd is of sd"),
        ("lcm-sd1.5", "loras: lcm-sd1.5 is not on this machine; fetch it with: jubako pull lcm-sd1.5"),
    ):
        asked: dict[str, Any] = {"prompt": "a red circle", "loras": [{"name": name}]}
        for path, more in (
            ("/txt2img", {}),
            ("/v1/images/generations", {"stream": True}),
            ("/v1/images/compare", {"models": ["tiny-sd"]}),
            ("/v1/jobs", {"task": "txt2img"}),
        ):
            assert refused(client.post(path, json=asked | more)) == ("loras", told), path


def test_one_without_a_name_is_called_by_its_content_and_not_by_its_file(
    client: httpx.Client, lora: bytes
) -> None:
    made = client.post("/v1/adapters", files=form(lora, file="../../evil.safetensors")).json()
    assert made["name"] == f"adapter-{made['sha256'][:12]}"
    assert (made["base"], made["trigger"]) == (None, None)
    param, message = refused(client.post("/v1/adapters", files=form(lora)))
    assert param == "name"
    assert "already; remove it first" in message


PICKLED = pickle.dumps({"unet.mid_block.to_q.lora_A.weight": [1.0]})


@pytest.mark.parametrize(
    ("content", "file"),
    [
        pytest.param(PICKLED, "zog.bin", id="a pickle"),
        pytest.param(PICKLED, "zog.safetensors", id="a pickle by another name"),
        pytest.param(zipped(), "zog.safetensors", id="what torch.save writes"),
        pytest.param((2 * 2**30).to_bytes(8, "little") + b"{}", "zog.safetensors", id="a header of 2 GB"),
        pytest.param(header(b"[" * 200_000), "zog.safetensors", id="a header nested without end"),
        pytest.param(header(b'{"' + b"x" * 17 * 2**20 + b'":1}'), "zog.safetensors", id="a header of 17 MB"),
        pytest.param(header(["lora_A"]), "zog.safetensors", id="a header that is a list"),
        pytest.param(
            header({"x.lora_A.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 2**62]}}, b"abcd"),
            "zog.safetensors",
            id="data that is not there",
        ),
        pytest.param(b"", "zog.safetensors", id="nothing"),
        pytest.param(b"\0\0", "zog.safetensors", id="two bytes"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(
    client: httpx.Client, home: Path, content: bytes, file: str
) -> None:
    before = written(home)
    assert refused(client.post("/v1/adapters", files=form(content, ("name", "zog"), file=file))) == (
        "file",
        "file: it is no safetensors file, or a torn one",
    )
    assert written(home) == before


def test_a_torn_file_is_refused_wherever_it_was_torn(client: httpx.Client, home: Path, lora: bytes) -> None:
    for length in (4, 20, len(lora) // 2, len(lora) - 1):
        torn = client.post("/v1/adapters", files=form(lora[:length], ("name", "zog")))
        assert refused(torn) == ("file", "file: it is no safetensors file, or a torn one")
    longer = client.post("/v1/adapters", files=form(lora + b"x", ("name", "zog")))
    assert refused(longer)[0] == "file"
    assert written(home) == []


def test_a_file_that_is_no_lora_is_refused(client: httpx.Client, home: Path) -> None:
    import torch

    other = save({"model.layer.weight": torch.ones(2)})
    reply = client.post("/v1/adapters", files=form(other, ("name", "zog")))
    assert refused(reply) == ("file", "file: it holds neither tensors of a LoRA nor an embedding alone")
    assert written(home) == []


@pytest.mark.parametrize(
    "name", ["../zog", "a/b", "%2e%2e", "..", "zog\n", "", ".hidden", "zög", "a\\b", "a\0b", "x" * 65]
)
def test_a_name_that_is_none_is_refused(client: httpx.Client, home: Path, lora: bytes, name: str) -> None:
    param, message = refused(client.post("/v1/adapters", files=form(lora, ("name", name))))
    assert param == "name"
    assert message.startswith(f"name: {name!r} is no name; take letters, digits")
    assert written(home) == []


@pytest.mark.parametrize("path", ["%2e%2e", "..%2fjobs.sqlite", "a%2fb", "zog%0a", "zog", ".hidden", "%00"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_address_leads_to_no_other_file(server: Server, home: Path, method: str, path: str) -> None:
    # httpx would resolve the dots itself.
    connection = http.client.HTTPConnection(str(urlsplit(server.url).netloc), timeout=10)
    kept = sorted(home.iterdir())
    connection.request(method, f"/v1/adapters/{path}")
    reply = connection.getresponse()
    error = json.loads(reply.read())["error"]
    connection.close()
    assert reply.status == 404
    assert error["code"] in {"adapter_not_found", "not_found"}
    assert sorted(home.iterdir()) == kept


@pytest.mark.parametrize(
    ("more", "param", "told"),
    [
        ([("nmae", (None, b"zog"))], "nmae", "Did you mean 'name'? Known: name, base, trigger"),
        ([("file", ("b.safetensors", b"x"))], "file", "given twice"),
        ([("name", (None, b"a")), ("name", (None, b"b"))], "name", "given twice"),
        ([("other", ("b.safetensors", b"x"))], "other", "unknown field"),
        ([("name", ("b.safetensors", b"x"))], "name", "valid string"),
        ([("trigger", (None, b"a\x1b[2Jb"))], "trigger", "without control characters"),
        ([("base", (None, b""))], "base", "at least 1 character"),
        ([("base", (None, b"x" * 201))], "base", "at most 200 characters"),
    ],
)
def test_odd_fields_of_the_form_are_refused_by_name(
    *, client: httpx.Client, home: Path, lora: bytes, more: Form, param: str, told: str
) -> None:
    found, message = refused(client.post("/v1/adapters", files=[*form(lora), *more]))
    assert found == param
    assert told in message
    assert written(home) == []


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b'{"name": "zog"}', "application/json"),
        (b"name=zog&file=abc", "application/x-www-form-urlencoded"),
        (b"abc", "application/octet-stream"),
    ],
)
def test_what_is_no_form_of_parts_is_refused(client: httpx.Client, content: bytes, content_type: str) -> None:
    reply = client.post("/v1/adapters", content=content, headers={"Content-Type": content_type})
    param, message = refused(reply)
    assert param == "file"
    assert "multipart/form-data" in message


def test_a_form_without_a_file_is_refused(client: httpx.Client, home: Path) -> None:
    for parts in ([("name", (None, b"zog"))], [("file", (None, b"text"))]):
        param, message = refused(client.post("/v1/adapters", files=parts))
        assert (param, message) == ("file", "file: the form holds no file of this name")
    assert refused(
        client.post("/v1/adapters", content=b"abc", headers={"Content-Type": "multipart/form-data"})
    )[1].startswith("the form can't be read")
    assert written(home) == []


def test_a_name_that_is_taken_is_refused_also_when_two_come_at_once(
    client: httpx.Client, home: Path, lora: bytes
) -> None:
    with ThreadPoolExecutor(8) as pool:
        replies = list(
            pool.map(lambda _: client.post("/v1/adapters", files=form(lora, ("name", "zog"))), range(8))
        )
    assert sorted(reply.status_code for reply in replies) == [201] + [400] * 7
    told = {refused(reply) for reply in replies if reply.status_code != 201}
    assert told == {("name", "name: there is an adapter 'zog' already; remove it first")}
    assert written(home) == ["zog", "zog/adapter.safetensors", "zog/card.json"]


def test_a_body_past_the_limit_is_refused_before_it_is_read(server: Server, home: Path) -> None:
    connection = http.client.HTTPConnection(str(urlsplit(server.url).netloc), timeout=10)
    connection.putrequest("POST", "/v1/adapters")
    connection.putheader("Content-Type", "multipart/form-data; boundary=b")
    connection.putheader("Content-Length", str(5 * 2**30))
    connection.endheaders()
    reply = connection.getresponse()
    error = json.loads(reply.read())["error"]
    connection.close()
    assert reply.status == 413
    assert error["code"] == "too_large"
    assert "a body of more than 4097 MB is not taken" in error["message"]
    assert written(home) == []


def test_big_files_are_hashed_beside_everybody_else_s_requests(
    client: httpx.Client, home: Path, server: Server
) -> None:
    """While the digest of a big file is made for the first time, other requests are answered at once."""
    with (home / "adapters" / "big.safetensors").open("wb") as big:
        big.truncate(3 * 2**30)

    async def watched() -> tuple[float, list[float]]:
        waits: list[float] = []
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as other:
            listing = asyncio.create_task(other.get("/v1/adapters"))
            started = time.monotonic()
            while not listing.done():
                asked = time.monotonic()
                assert (await other.get("/livez")).status_code == 200
                waits.append(time.monotonic() - asked)
            first = time.monotonic() - started
            assert [each["bytes"] for each in (await listing).json()["data"]] == [3 * 2**30]
            return first, waits

    first, waits = asyncio.run(watched())
    started = time.monotonic()
    assert client.get("/v1/adapters/big").status_code == 200
    again = time.monotonic() - started
    assert max(waits) < first / 2, f"hashed in {first:.2f} s; somebody waited {max(waits):.2f} s"
    assert again < first / 2, f"hashed in {first:.2f} s, and once more in {again:.2f} s"
