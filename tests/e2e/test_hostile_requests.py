"""Hundreds of requests that nobody should send: each is refused in the one shape, none breaks anything."""

from __future__ import annotations

import base64
import io
import itertools
import json
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image
from server import Server, serving

from jubako.pictures import png

CAPTION = "a red circle"
SLOW_SECONDS = 5.0

PICTURE = png(Image.new("RGB", (64, 64), (200, 30, 30)))


@dataclass(frozen=True)
class Hostile:
    """A request, and which field its refusal must name; None where there is none to name."""

    path: str
    method: str = "POST"
    json: Any = None
    body: bytes | None = None
    form: dict[str, Any] | None = None
    files: Any = None
    headers: dict[str, str] = field(default_factory=dict)
    param: str | None = "?"

    def send(self, http: httpx.Client) -> httpx.Response:
        body: dict[str, Any] = {}
        if self.json is not None:
            body["json"] = self.json
        if self.body is not None:
            body["content"] = self.body
        if self.form is not None or self.files is not None:
            body |= {"data": self.form, "files": self.files}
        return http.request(self.method, self.path, headers=self.headers, timeout=30, **body)


NUMBERS: list[Any] = [-1, 0, 10**9, 10**30, 1.5, "many", "", None, True, [], {}, "NaN", "1e400", -(2**63)]
TEXTS: list[Any] = [None, 5, [], {}, True, "\ud83d" * 3, "\x00" * 50, "a" * 200_000]
ROUTES = ("/txt2img", "/v1/images/generations", "/v1/jobs")


def _task(path: str, fields: dict[str, Any]) -> dict[str, Any]:
    return {"task": "txt2img", **fields} if path == "/v1/jobs" else fields


def bad_numbers() -> Iterator[Hostile]:
    """Numbers out of their bounds, of another kind, or none."""
    fields = ("num_inference_steps", "width", "height", "guidance_scale", "seed", "strength", "clip_skip")
    for path, name, value in itertools.product(ROUTES, fields, NUMBERS):
        if value is None or (name == "guidance_scale" and value in (0, 1.5)):
            continue
        if name == "seed" and value in (0, 10**9):
            continue
        yield Hostile(path, json=_task(path, {"prompt": CAPTION, name: value}), param=name)


def bad_texts() -> Iterator[Hostile]:
    for path, value in itertools.product(ROUTES, TEXTS):
        if isinstance(value, str) and "\ud83d" in value:
            # Half a surrogate: JSON can spell it, no encoder can take it.
            text = json.dumps(_task(path, {"prompt": "PROMPT"})).replace("PROMPT", "\\ud83d")
            headers = {"Content-Type": "application/json"}
            yield Hostile(path, body=text.encode(), headers=headers)
        elif not (isinstance(value, str) and "\x00" in value):
            yield Hostile(path, json=_task(path, {"prompt": value}), param="prompt")
    for path, name in itertools.product(ROUTES, ("model", "scheduler", "output_format", "refiner")):
        for value in (
            "../../etc/passwd",
            "x" * 10_000,
            "tiny-sd\n",
            "",
            7,
            ["tiny-sd"],
            {"a": 1},
            "' OR 1=1",
        ):
            yield Hostile(path, json=_task(path, {"prompt": CAPTION, name: value}), param=name)
    for path in ROUTES:
        yield Hostile(path, json=_task(path, {"prompt": CAPTION, "stepz": 4}), param="stepz")
        yield Hostile(
            path, json=_task(path, {"prompt": CAPTION, "loras": [{"name": "../x"}]}), param="loras.0.name"
        )
        yield Hostile(path, json=_task(path, {"prompt": CAPTION, "loras": [{"name": "none"}]}), param="loras")
        yield Hostile(path, json=_task(path, {"prompt": "<lora:../x:1> a"}), param="prompt")
        yield Hostile(path, json=_task(path, {"prompt": "<lora:none:1> a"}), param="loras")
        yield Hostile(path, json=_task(path, {"prompt": CAPTION, "embeddings": ["../x"]}), param="?")


def bad_bodies() -> Iterator[Hostile]:
    """What is no request at all."""
    deep = b"[" * 100_000
    bodies = [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe\x00",
        b'{"prompt": NaN}',
        deep,
        b'{"prompt":"a"' * 50,
    ]
    bodies += [
        b'{"prompt": "a", "prompt": "b", "width": Infinity}',
        b"\x80\x04\x95pickle",
        b"<xml/>",
        b"%PDF",
    ]
    types = (
        "application/json",
        "text/plain",
        "application/xml",
        "multipart/form-data",
        "application/x-www-form-urlencoded",
    )
    for path, body, kind in itertools.product((*ROUTES, "/v1/images/compare", "/v1/videos"), bodies, types):
        yield Hostile(path, body=body, headers={"Content-Type": kind})
    for path in ROUTES:
        yield Hostile(
            path,
            body=b"--x\r\nContent-Disposition: form-data",
            headers={"Content-Type": "multipart/form-data; boundary=x"},
        )
        yield Hostile(
            path, body=b"x=1", headers={"Content-Type": "multipart/form-data; boundary=" + "y" * 5000}
        )


def claiming(width: int, height: int) -> bytes:
    """A small PNG that says it is large."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(b"\x00" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def animated(frames: int) -> bytes:
    buffer = io.BytesIO()
    pictures = [Image.new("RGB", (16, 16), (number % 255, 0, 0)) for number in range(frames)]
    pictures[0].save(buffer, "WEBP", save_all=True, append_images=pictures[1:])
    return buffer.getvalue()


def polyglot() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("x.png", PICTURE)
    return b"GIF89a" + buffer.getvalue()


def bad_pictures() -> Iterator[Hostile]:
    """Files that are no pictures, lie about their size, or would be fetched."""
    files = {
        "text": b"not a picture",
        "empty": b"",
        "half": PICTURE[: len(PICTURE) // 2],
        "12000x12000": claiming(12_000, 12_000),
        "60000x60000": claiming(60_000, 60_000),
        "10000 frames": animated(10_000),
        "a zip": polyglot(),
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    }
    for content in files.values():
        for path in ("/img2img", "/v1/images/edits", "/v1/images/variations"):
            form = {} if path.endswith("variations") else {"prompt": CAPTION}
            yield Hostile(path, form=form, files={"image": ("../../x.png", content)}, param="image")
        task = {"task": "img2img", "prompt": CAPTION, "image": base64.b64encode(content).decode()}
        yield Hostile("/v1/jobs", json=task, param="image")
    addresses = [
        "http://127.0.0.1:1/x.png",
        "https://example.com/x.png",
        "file:///etc/passwd",
        "ftp://x/y",
        "//x/y.png",
    ]
    addresses += [
        "data:image/png;base64,!!!",
        "data:text/html,<script>",
        "gopher://x",
        "HTTP://X",
        "\\\\host\\share\\x.png",
    ]
    for address in addresses:
        yield Hostile("/img2img", json={"prompt": CAPTION, "image": address}, param="image")
        yield Hostile(
            "/inpaint",
            json={"prompt": CAPTION, "image": base64.b64encode(PICTURE).decode(), "mask": address},
            param="mask",
        )
    yield Hostile("/img2img", form={"prompt": CAPTION}, param="image")
    yield Hostile(
        "/img2img",
        form={"prompt": CAPTION},
        files=[("image", ("a", PICTURE)), ("image", ("b", PICTURE))],
        param="image",
    )
    many = [("image", (f"{n}", PICTURE)) for n in range(100)]
    yield Hostile("/img2img", form={"prompt": CAPTION}, files=many)


def bad_routes() -> Iterator[Hostile]:
    """Paths and methods that there are not, jobs of nobody, queries out of bounds."""
    for path in (
        "/nothing",
        "/v1",
        "/v1/images",
        "/v1/jobs/x/y/z",
        "/..%2f..%2fetc/passwd",
        "/%00",
        "/v1/models/none",
    ):
        yield Hostile(path, method="GET")
    for job in ("x", "0" * 32, "..%2f..", "%00", "a" * 3000, "' OR 1=1 --"):
        for suffix in ("", "/events", "/result"):
            yield Hostile(f"/v1/jobs/{job}{suffix}", method="GET")
        yield Hostile(f"/v1/jobs/{job}", method="DELETE")
        yield Hostile(f"/v1/videos/{job}", method="GET")
        yield Hostile(f"/v1/fine_tuning/jobs/{job}", method="GET")
    for query in (
        "limit=0",
        "limit=101",
        "limit=x",
        "state=none",
        "task=none",
        "after=nobody",
        "order=up",
        "colour=red",
    ):
        yield Hostile(f"/v1/jobs?{query}", method="GET", param=query.partition("=")[0])
    for method, path in itertools.product(
        ("PUT", "PATCH", "DELETE"), ("/txt2img", "/v1/images/generations", "/v1/jobs")
    ):
        yield Hostile(path, method=method, json={})
    for headers in ({"X-Priority": "x"}, {"X-Request-Deadline": "-1"}, {"Idempotency-Key": "k" * 300}):
        path = "/v1/jobs" if "Idempotency-Key" in headers else "/txt2img"
        yield Hostile(path, json=_task(path, {"prompt": CAPTION}), headers=headers, param="?")


KINDS = {
    "numbers": bad_numbers,
    "texts": bad_texts,
    "bodies": bad_bodies,
    "pictures": bad_pictures,
    "routes": bad_routes,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("target"), JUBAKO_FAMILIES="sd") as server:
        server.generate(CAPTION, num_inference_steps=1).raise_for_status()
        yield server


def memory(server: Server) -> int:
    processes = [psutil.Process(server.process.pid)]
    processes += processes[0].children(recursive=True)
    return int(sum(process.memory_info().rss for process in processes))


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kind", KINDS)
def test_each_is_refused_in_the_one_shape(target: Server, kind: str) -> None:
    before = memory(target)
    wrong: list[str] = []
    statuses = Counter[int]()
    with httpx.Client(base_url=target.url) as http:
        for number, hostile in enumerate(KINDS[kind]()):
            said = str(hostile.json or hostile.body or hostile.form)
            told = f"{number}: {hostile.method} {hostile.path[:60]} {said[:120]}"
            try:
                reply = hostile.send(http)
            except httpx.TransportError as error:
                wrong.append(f"{told}: {error!r}")
                continue
            statuses[reply.status_code] += 1
            if problem := _problem(hostile, reply):
                wrong.append(f"{told}: {reply.status_code} {problem}")
    print(f"\n{kind}: {sum(statuses.values())} requests, {dict(sorted(statuses.items()))}")
    assert not wrong, f"{len(wrong)} of {sum(statuses.values())}:\n" + "\n".join(wrong[:40])
    assert target.generate(CAPTION, num_inference_steps=1).status_code == 200
    assert memory(target) - before < 150_000_000


def _problem(hostile: Hostile, reply: httpx.Response) -> str:  # noqa: PLR0911 # one for each thing to see
    """What is wrong with a refusal; empty when nothing is."""
    if not 400 <= reply.status_code < 500:
        return f"is no refusal: {reply.text[:200]}"
    if reply.elapsed.total_seconds() > SLOW_SECONDS:
        return f"took {reply.elapsed.total_seconds():.1f} s"
    try:
        error = reply.json()["error"]
    except (ValueError, KeyError, TypeError):
        return f"is in another shape: {reply.text[:200]}"
    if set(error) != {"message", "type", "param", "code"} or not error["message"]:
        return f"is in another shape: {error}"
    if any(word in reply.text for word in ("Traceback", "site-packages", "/tmp/", "0x7f")):  # noqa: S108
        return f"tells too much: {error['message'][:200]}"
    named = error["param"]
    if hostile.param not in {"?", named} and (named or "").partition(".")[0] != hostile.param:
        return f"names {named!r}, not {hostile.param!r}: {error['message'][:120]}"
    return ""


def test_there_are_as_many_as_we_say() -> None:
    assert sum(1 for kind in KINDS.values() for _ in kind()) > 700
