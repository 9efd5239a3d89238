"""Pickles in every disguise and addresses in every field: nothing is opened, and nothing is fetched."""

from __future__ import annotations

import base64
import io
import itertools
import json
import pickle
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch
from api_keys import KEYS
from pickles import Canary, carriers
from PIL import Image
from recorder import recorded, recording
from server import ROOT, Server

from jubako.adapters.store import AdapterStore
from jubako.errors import InvalidRequest

PICKLES = ("application/vnd.bentoml+pickle", "Application/Vnd.BentoML+Pickle; x=y", "application/x-pickle")
OTHERS = ("application/octet-stream", "application/python-pickle", "multipart/form-data; boundary=x", "")


@pytest.fixture(scope="module")
def http(guarded: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, headers=KEYS["root"].headers, timeout=60) as client:
        yield client


@pytest.fixture
def canary(tmp_path: Path) -> Canary:
    return Canary(tmp_path / "sang")


def half() -> bytes:
    """A picture that is a mask as well."""
    buffer = io.BytesIO()
    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (0, 0, 32, 64))
    image.save(buffer, "PNG")
    return buffer.getvalue()


GOOD = base64.b64encode(half()).decode()
DRAWN = {"prompt": "a red circle", "steps": 2}
# Each field that takes pictures: the route, the field, and what the request needs beside.
PICTURES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("/img2img", "image", DRAWN),
    ("/inpaint", "image", {**DRAWN, "mask": GOOD}),
    ("/inpaint", "mask", {**DRAWN, "image": GOOD}),
    ("/img2vid", "image", {}),
    ("/img2mesh", "image", {}),
    ("/v1/images/edits", "image", DRAWN),
    ("/v1/images/edits", "mask", {**DRAWN, "image": GOOD}),
    ("/v1/images/variations", "image", {}),
    ("/v1/images/compare", "image", {**DRAWN, "models": ["tiny-sd"]}),
    ("/v1/images/compare", "mask", {**DRAWN, "image": GOOD, "models": ["tiny-sd"]}),
    ("/v1/jobs", "image", {**DRAWN, "task": "img2img"}),
    ("/v1/jobs", "mask", {**DRAWN, "image": GOOD, "task": "inpaint"}),
    ("/v1/jobs", "image", {"task": "img2vid"}),
    ("/v1/jobs", "image", {"task": "img2mesh"}),
    ("/v1/videos", "input_reference", {}),
    ("/v1/videos/sync", "image", {}),
    ("/v1/fine_tuning/jobs", "images", {"model": "tiny-sd", "trigger": "zog", "class_noun": "shape"}),
)


def as_form(fields: Mapping[str, Any]) -> dict[str, str]:
    """The fields of a request as text."""
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}


def test_a_carrier_that_is_opened_is_noticed(canary: Canary) -> None:
    assert not canary.sang
    files = carriers(canary)
    assert len(files) >= 30
    for name in ("protocol-0.pkl", "protocol-5.pkl", "bare.safetensors", "named.png"):
        pickle.loads(files[name])  # noqa: S301 # to see that it would
        assert canary.sang, name
    for name in ("model.pt", "model.ckpt", "zipped.safetensors"):
        torch.load(io.BytesIO(files[name]), weights_only=False)
        assert canary.sang, name


def test_no_upload_is_unpickled(http: httpx.Client, canary: Canary) -> None:
    answers: Counter[int] = Counter()
    for (name, content), (route, field, fields) in itertools.product(carriers(canary).items(), PICTURES):
        files = [(field, (name, content, "application/octet-stream"))] * (3 if field == "images" else 1)
        reply = http.post(route, data=as_form(fields), files=files)
        answers[reply.status_code] += 1
        assert reply.status_code < 500 or reply.status_code == 503, (name, route, reply.text)
    assert not canary.sang
    print(f"{answers.total()} uploads: {dict(answers)}")


def test_no_text_is_unpickled(http: httpx.Client, canary: Canary) -> None:
    for content, (route, field, fields) in zip(
        carriers(canary).values(), itertools.cycle(PICTURES), strict=False
    ):
        for prefix in ("", "data:image/png;base64,", "data:application/vnd.bentoml+pickle;base64,"):
            value = prefix + base64.b64encode(content).decode()
            reply = http.post(route, json={**fields, field: value})
            assert reply.status_code < 500 or reply.status_code == 503, (route, reply.text)
    assert not canary.sang


def test_no_body_is_unpickled(http: httpx.Client, canary: Canary) -> None:
    """Neither by its type nor by its content, on any of BentoML's own routes and of ours."""
    bare = pickle.dumps(canary)
    routes = ("/txt2img", "/img2img", "/models", "/v1/images/generations", "/v1/jobs", "/v1/models", "/")
    for route, kind in itertools.product(routes, (*PICKLES, *OTHERS)):
        for key, more in (("former", {}), ("root", {}), ("root", {"Buffer-Lengths": str(len(bare))})):
            headers = {"Content-Type": kind, **more, **KEYS[key].headers}
            reply = http.post(route, content=bare, headers=headers)
            assert 400 <= reply.status_code < 500, (route, kind, reply.text)
            if key == "root" and kind in PICKLES:
                assert reply.status_code == 415
                assert reply.json()["error"]["code"] == "unsupported_media_type"
    assert not canary.sang


def test_no_adapter_is_unpickled(http: httpx.Client, guarded: Server, canary: Canary, tmp_path: Path) -> None:
    """Neither one that is taken in, by command or by upload, nor one that lies where adapters lie."""
    store = AdapterStore(tmp_path / "home")
    lying = guarded.log.parent / "jubako" / "adapters"
    lying.mkdir(exist_ok=True)
    for number, (name, content) in enumerate(carriers(canary).items()):
        file = tmp_path / name
        file.write_bytes(content)
        taken = name == "within.safetensors"
        if taken:
            # Numbers under a name that LoRAs have, which is all that can be asked of them.
            store.add(f"carrier-{number}", file)
        else:
            with pytest.raises(InvalidRequest):
                store.add(f"carrier-{number}", file)
        uploaded = http.post("/v1/adapters", data={"name": f"sent-{number}"}, files={"file": (name, content)})
        assert uploaded.status_code == 201 if taken else 400 <= uploaded.status_code < 500, (
            name,
            uploaded.text,
        )
        (lying / f"lying-{number}.safetensors").write_bytes(content)
        used = http.post("/txt2img", json={**DRAWN, "loras": [{"name": f"lying-{number}", "weight": 1}]})
        assert used.status_code in {400, 500}, (name, used.text)
        assert used.json()["error"]["code"] in {"invalid_value", "unusable_weights"}, (name, used.text)
    assert not canary.sang


@contextmanager
def listening() -> Iterator[tuple[int, Counter[str]]]:
    """A port at which somebody listens, and what has been asked for there."""
    hits: Counter[str] = Counter()

    class Listener(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hits[self.path] += 1
            self.send_response(302)
            self.send_header("Location", "/again")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Listener)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port, hits
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def addresses(port: int) -> list[str]:
    """Ways to name what a server might fetch, the listener first."""
    here = f"127.0.0.1:{port}"
    svg = f'<svg xmlns="http://www.w3.org/2000/svg"><image href="http://{here}/svg"/></svg>'
    xxe = f'<!DOCTYPE s [<!ENTITY x SYSTEM "http://{here}/xxe">]><svg>&x;</svg>'
    hosts = (
        here,
        f"localhost:{port}",
        f"[::1]:{port}",
        f"[::ffff:127.0.0.1]:{port}",
        f"2130706433:{port}",
        f"0x7f000001:{port}",
        f"0x7f.1:{port}",
        f"0177.0.0.1:{port}",
        f"017700000001:{port}",
        f"127.1:{port}",
        f"0:{port}",
        f"0.0.0.0:{port}",
        f"127.0.0.1.:{port}",
        f"user:password@{here}",
        f"example.invalid@{here}",
        f"example.invalid\\@{here}",
        f"{here}\\@example.invalid",
        f"example.invalid#@{here}",
        f"example.invalid%23@{here}",
        f"127\u30020\u30020\u30021:{port}",
        f"\u2460\u2461\u2466.0.0.1:{port}",
        f"{here}%2f@example.invalid",
        "169.254.169.254/latest/meta-data",
        "metadata.google.internal/computeMetadata/v1",
        "[fe80::1%25eth0]",
        "10.0.0.1",
        "100.64.0.1",
        "[64:ff9b::7f00:1]",
        "localtest.me",
    )
    schemes = (
        "https",
        "HTTP",
        "ftp",
        "gopher",
        "dict",
        "ldap",
        "tftp",
        "s3",
        "gs",
        "hf",
        "smb",
        "ws",
        "jar:http",
    )
    return [
        *(f"http://{host}/x.png" for host in hosts),
        *(f"{scheme}://{here}/x.png" for scheme in schemes),
        f" http://{here}/blank",
        f"\thttp://{here}/tab",
        f"http:/{here}/one",
        f"http:{here}/none",
        f"//{here}/relative",
        f"http://{here}/redirect?to=http://169.254.169.254/",
        f"url:http://{here}/",
        f"view-source:http://{here}/",
        f"blob:http://{here}/x",
        f'"http://{here}/quoted"',
        "file:///etc/passwd",
        "file://localhost/etc/passwd",
        "file:/etc/passwd",
        "/etc/passwd",
        "../../../../etc/passwd",
        "~/.ssh/id_rsa",
        "\\\\127.0.0.1\\share\\x.png",
        "unix:///var/run/docker.sock",
        f"data:text/html,<img src=http://{here}/html>",
        f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}",
        f"data:image/svg+xml;base64,{base64.b64encode(xxe.encode()).decode()}",
        f"data:image/svg+xml,{svg}",
        f"data:image/png;base64,http://{here}/data",
        f"data:http://{here}/x.png;base64,AAAA",
        f"data:,http://{here}/plain",
        base64.b64encode(svg.encode()).decode(),
        base64.b64encode(xxe.encode()).decode(),
        base64.b64encode(f"http://{here}/base64".encode()).decode(),
    ]


def require_refusal(reply: httpx.Response, field: str) -> None:
    """It says of the field what is wrong with it, or of a family that is not here that it is not."""
    error = reply.json()["error"]
    assert error["code"] in {"invalid_value", "model_not_found"}, (str(reply.request.url), reply.text)
    if error["code"] == "invalid_value":
        assert reply.status_code == 400
        assert error["param"].startswith(field), (str(reply.request.url), reply.text)


def test_a_connection_is_noticed(tmp_path: Path) -> None:
    with listening() as (port, hits):
        code = f"import urllib.request; urllib.request.urlopen('http://localhost:{port}/planted')"
        subprocess.run(
            [sys.executable, "-c", code],
            env=recording(tmp_path),
            stderr=subprocess.DEVNULL,
            check=False,
            timeout=60,
        )
        lines = recorded(tmp_path)
        assert lines[0] == "started"
        assert "look up localhost" in lines
        assert f"connect 127.0.0.1:{port}" in lines
        assert hits["/planted"] == 1


def test_no_address_in_any_field_is_connected_to(http: httpx.Client, guarded: Server) -> None:
    folder = guarded.log.parent
    before = recorded(folder)
    assert before.count("started") >= 3, "not all processes are watched"
    answers: Counter[int] = Counter()
    with listening() as (port, hits):
        urls = addresses(port)
        assert len(urls) >= 60
        for url, (route, field, fields) in itertools.product(urls, PICTURES):
            reply = http.post(route, json={**fields, field: url})
            answers[reply.status_code] += 1
            require_refusal(reply, field)
        for url, (route, field, fields) in zip(urls, itertools.cycle(PICTURES), strict=False):
            form = as_form({**fields, field: url})
            parts = {name: (None, value) for name, value in form.items()}
            for reply in (http.post(route, data=form), http.post(route, files=parts)):
                answers[reply.status_code] += 1
                require_refusal(reply, field)
        for url in urls:
            for fields in ({"model": url}, {"loras": [{"name": url, "weight": 1}]}, {"scheduler": url}):
                reply = http.post("/v1/images/generations", json={**DRAWN, **fields})
                answers[reply.status_code] += 1
                assert reply.status_code in {400, 404}, (fields, reply.text)
        print(f"{len(urls)} addresses, {answers.total()} requests: {dict(answers)}")
        assert not hits
    assert [line for line in recorded(folder)[len(before) :] if line != "started"] == []


def test_the_log_has_neither_keys_nor_prompts(http: httpx.Client, guarded: Server) -> None:
    mark = "zanzibar-lighthouse"
    asked = {"prompt": f"{mark} a red circle", "negative_prompt": f"no {mark}", "steps": 2}
    for route, fields in (
        ("/txt2img", asked),
        ("/txt2img", {**asked, "width": 65}),
        ("/txt2img", {**asked, mark: 1}),
        ("/txt2img", {"prompt": mark * 500}),
        ("/txt2img", {"prompt": [mark]}),
        ("/txt2img", {**asked, "model": "sd1.5"}),
        ("/v1/images/generations", {**asked, "stream": True}),
        ("/v1/images/generations", {"prompt": {"x": mark}}),
        ("/v1/images/compare", {**asked, "models": ["tiny-sd"]}),
        ("/v1/jobs", {**asked, "task": "txt2img"}),
        ("/v1/jobs", {**asked, "task": "txt2img", "model": "sd1.5"}),
    ):
        http.post(route, json=fields)
        http.post(route, json=fields, headers={"Authorization": f"Bearer {KEYS['root'].secret}x"})
    log = guarded.log.read_text(encoding="utf-8", errors="replace")
    assert "/v1/images/generations" in log
    assert mark not in log
    assert not [key.name for key in KEYS.values() if key.secret in log]


def test_no_process_takes_code_from_elsewhere_or_tells_what_it_does(guarded: Server) -> None:
    workers = [
        process
        for process in psutil.Process(guarded.process.pid).children(recursive=True)
        if "_bentoml_impl.worker.service" in process.cmdline()
    ]
    assert len(workers) == 2
    for process in workers:
        environment = process.environ()
        assert environment["DIFFUSERS_DISABLE_REMOTE_CODE"] == "1"
        assert environment["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_nowhere_is_code_of_others_trusted() -> None:
    sources = [ROOT / "service.py", *(ROOT / "src").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert len(sources) > 150
    for source in sources:
        text = source.read_text(encoding="utf-8")
        for word in ("trust_remote_code", "custom_pipeline", "allow_pickle", "pickle.load", "import pickle"):
            assert word not in text, f"{source.name} has {word}"
        assert text.count("torch.load(") == text.count("weights_only=True"), source.name
