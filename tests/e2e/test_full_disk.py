"""A server whose disk is full and whose files are torn: it says so, goes on, and is in order later."""

from __future__ import annotations

import base64
import io
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from lora_files import lora_file
from PIL import Image
from plus import FIVE, draw
from server import Server, serving
from small_disk import SmallDisk, small_disk

from jubako.catalog import shipped_folder
from jubako.pictures import png

EMBEDDED = shipped_folder() / "embedded" / "tiny-sd"
UNET = "unet/diffusion_pytorch_model.safetensors"
PICTURE = png(draw(FIVE[0]))
DRAWN = {"prompt": "a large red circle", "seed": 7, "num_inference_steps": 2}
LONG = {**DRAWN, "task": "txt2img", "num_inference_steps": 40}


@dataclass(frozen=True)
class Crammed:
    """A server whose home and temporary files are on a small disk."""

    server: Server
    disk: SmallDisk

    @property
    def home(self) -> Path:
        return self.disk.here / "home"

    def send(self, method: str, path: str, **body: Any) -> httpx.Response:
        return httpx.request(method, f"{self.server.url}{path}", timeout=30, **body)

    def submit(self, fields: dict[str, Any]) -> str:
        reply = self.send("POST", "/v1/jobs", json=fields)
        assert reply.status_code == 202, reply.text
        return str(reply.json()["id"])

    def job(self, job_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.send("GET", f"/v1/jobs/{job_id}").raise_for_status().json()
        return found

    def wait(self, job_id: str, state: str) -> dict[str, Any]:
        deadline = time.monotonic() + 60
        while (found := self.job(job_id))["state"] != state:
            assert found["state"] in {"queued", "running"}, found
            assert time.monotonic() < deadline, found
            time.sleep(0.1)
        return found

    def files(self) -> set[str]:
        """All files of the home, but those of the database."""
        found = (path.relative_to(self.home).as_posix() for path in self.home.rglob("*") if path.is_file())
        return {name for name in found if not name.startswith("jobs.sqlite")}


@pytest.fixture(scope="module")
def crammed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crammed]:
    folder = tmp_path_factory.mktemp("crammed")
    shutil.copytree(EMBEDDED, folder / "copy")
    catalog = {"family": "sd", "models": {"sd1.5": {"weights": {"repo": None, "folder": "copy"}}}}
    (folder / "sd.yaml").write_text(json.dumps(catalog))
    content = bytearray((folder / "copy" / UNET).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "copy" / UNET).write_bytes(content)
    with small_disk(folder, 8) as disk:
        home: dict[str, Any] = {"JUBAKO_HOME": str(disk.place / "home"), "TMPDIR": str(disk.place)}
        own: dict[str, Any] = {"JUBAKO_FAMILIES": "sd", "JUBAKO_CATALOG": str(folder)}
        with serving(folder, python=disk.python, **home, **own) as server:
            yield Crammed(server, disk)


def pixels(crammed: Crammed) -> np.ndarray[Any, Any]:
    """The picture that a request waits for, which is kept nowhere."""
    reply = crammed.send("POST", "/txt2img", json=DRAWN).raise_for_status()
    with Image.open(io.BytesIO(reply.content)) as image:
        return np.asarray(image, dtype=np.int16)


def adapter(folder: Path, name: str, width: int) -> dict[str, Any]:
    layer = {"x.lora_A.weight": torch.ones(4, width), "x.lora_B.weight": torch.zeros(width, 4)}
    lora_file(folder / f"{name}.safetensors", unet=layer)
    files = {"file": ("x", (folder / f"{name}.safetensors").read_bytes())}
    return {"data": {"name": name}, "files": files}


def test_a_full_disk_refuses_what_must_be_kept_and_loses_nothing(crammed: Crammed, tmp_path: Path) -> None:
    picture = pixels(crammed)
    running, waiting = crammed.submit(LONG), crammed.submit({**LONG, "num_inference_steps": 3})
    crammed.wait(running, "running")
    image = base64.b64encode(PICTURE).decode()
    fields = {
        "model": "tiny-sd",
        "trigger": "zog",
        "class_noun": "shape",
        "steps": "10",
        "class_pictures": "2",
    }
    pictures = [("images", (f"{n}.png", png(draw(each)))) for n, each in enumerate(FIVE)]
    asked: dict[str, tuple[str, str, str, dict[str, Any]]] = {
        "a job": ("JUBAKO_HOME", "POST", "/v1/jobs", {"json": {**LONG, "seed": 8}}),
        "a job's picture": (
            "JUBAKO_HOME",
            "POST",
            "/v1/jobs",
            {"json": {**DRAWN, "task": "img2img", "image": image}},
        ),
        "an adapter": ("JUBAKO_HOME", "POST", "/v1/adapters", adapter(tmp_path, "small", 64)),
        "a large upload": ("TMPDIR", "POST", "/v1/adapters", adapter(tmp_path, "large", 40_000)),
        "a training": (
            "JUBAKO_HOME",
            "POST",
            "/v1/fine_tuning/jobs",
            {"data": fields, "files": pictures},
        ),
        "a cancel": ("JUBAKO_HOME", "DELETE", f"/v1/jobs/{waiting}", {}),
    }
    with crammed.disk.filled():
        before = crammed.files()
        for name, (setting, method, path, body) in asked.items():
            reply = crammed.send(method, path, **body)
            assert reply.status_code == 507, f"{name}: {reply.text}"
            error = reply.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert error["code"] == "disk_full"
            assert f"the disk of {setting} is full" in error["message"], name
        assert np.abs(pixels(crammed) - picture).max() <= 1
        assert crammed.server.ready()
        deadline = time.monotonic() + 60
        while f"job {running} ended" not in crammed.server.log.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        time.sleep(1)
        assert crammed.job(running)["state"] == "running", "its result finds no room yet"
        assert crammed.files() == before
    done = crammed.wait(running, "succeeded")
    result = crammed.send("GET", done["links"]["result"])
    assert len(result.content) == done["outputs"][0]["bytes"]
    for name, (_, method, path, body) in list(asked.items())[:-1]:
        reply = crammed.send(method, path, **body)
        assert reply.status_code in {201, 202}, f"{name}: {reply.text}"
        if name == "a training":
            crammed.send("POST", f"{path}/{reply.json()['id']}/cancel").raise_for_status()


def test_a_torn_result_is_told_and_not_given_out(crammed: Crammed) -> None:
    done = crammed.wait(crammed.submit({**DRAWN, "task": "txt2img", "seed": 11}), "succeeded")
    digest, link = done["outputs"][0]["sha256"], done["links"]["result"]
    whole = crammed.send("GET", link).content
    file = crammed.home / "files" / digest[:2] / digest
    for torn in (whole[: len(whole) // 2], b"", whole[:-1] + b"x"):
        file.write_bytes(torn)
        reply = crammed.send("GET", link)
        assert (reply.status_code, reply.json()["error"]["code"]) == (410, "result_expired")
        assert "damaged on the server's disk" in reply.json()["error"]["message"]
    file.write_bytes(whole)
    assert crammed.send("GET", link).content == whole


def test_a_model_with_a_flipped_bit_is_broken_and_the_others_serve(crammed: Crammed) -> None:
    for _ in range(2):
        reply = crammed.send("POST", "/txt2img", json={**DRAWN, "model": "sd1.5"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (503, "unusable_weights")
        assert f"copy/{UNET} is damaged" in reply.json()["error"]["message"]
    shown = crammed.send("GET", "/v1/models/sd1.5").json()
    assert shown["state"] == "broken"
    assert f"copy/{UNET} is damaged" in shown["reason"]
    assert crammed.send("POST", "/txt2img", json=DRAWN).status_code == 200
    others = {each["id"]: each for each in crammed.send("GET", "/v1/models").json()["data"]}
    assert (others["tiny-sd"]["state"], others["tiny-sd"]["reason"]) == ("resident", None)
