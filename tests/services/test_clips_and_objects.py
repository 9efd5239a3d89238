"""Clips and objects over HTTP: native routes, jobs of two stages, OpenAI's videos, workers."""

from __future__ import annotations

import base64
import io
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
import trimesh
import yaml
from mesh_pipelines import shap_e_img2img_pipeline, shap_e_pipeline
from PIL import Image
from server import ROOT, Server, free_port, serving

from jubako.miniatures.reader import shows
from jubako.miniatures.world import arrange, parse, render
from jubako.pictures import png

CAPTION = "a large red circle on the left of a blue background"
OBJECT = "a large red circle on the left of a white background"
FRAMES, FPS = 8, 7


@pytest.fixture(scope="module")
def worker() -> Iterator[str]:
    """A program that makes cubes, as a model that can't share our environment would run in."""
    port = free_port()
    process = subprocess.Popen([sys.executable, str(ROOT / "tests" / "e2e" / "worker.py"), str(port)])
    try:
        for _ in range(200):
            with closing(socket.socket()) as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, worker: str) -> Iterator[Server]:
    """Embedded miniatures for pictures and clips; small random Shap-Es and a worker for objects."""
    folder = tmp_path_factory.mktemp("clips")
    models: dict[str, Any] = {"sf3d": {"weights": {"worker": {"url": worker}}}}
    for name, make in (("shap-e", shap_e_pipeline), ("shap-e-img2img", shap_e_img2img_pipeline)):
        make().save_pretrained(folder / name)
        small = {"num_inference_steps": 4, "solid": {"grid_size": 16, "frame_size": 64, "turntable": False}}
        models[name] = {"weights": {"repo": None, "folder": str(folder / name)}, "defaults": small}
    catalog = folder / "catalog"
    catalog.mkdir()
    (catalog / "mesh.yaml").write_text(yaml.safe_dump({"family": "mesh", "models": models}))
    own: dict[str, Any] = {"JUBAKO_FAMILIES": "sd,video,mesh", "JUBAKO_CATALOG": str(catalog)}
    with serving(folder / "server", JUBAKO_ACCEPTED_LICENCES="stabilityai-community", **own) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def picture(caption: str = CAPTION) -> bytes:
    return png(render(arrange(parse(caption), np.random.default_rng(1))))


def frames_of(content: bytes) -> tuple[list[Image.Image], float, av.VideoStream]:
    """A clip's frames, its frames a second, and its stream."""
    with av.open(io.BytesIO(content), "r") as container:
        stream = container.streams.video[0]
        frames = [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        rate = float(stream.average_rate or 0)
    return frames, rate, stream


def moved(frames: list[Image.Image]) -> float:
    """How far the red object moves between the first and the last frame, in pixels."""
    centres = []
    for frame in (frames[0], frames[-1]):
        pixels = np.asarray(frame.convert("RGB"), np.int16)
        ys, xs = np.nonzero((pixels[..., 0] > 140) & (pixels[..., 2] < 120))
        centres.append((xs.mean(), ys.mean()))
    return float(np.hypot(centres[1][0] - centres[0][0], centres[1][1] - centres[0][1]))


def done(server: Server, job: dict[str, Any]) -> dict[str, Any]:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        found: dict[str, Any] = httpx.get(f"{server.url}{job['links']['self']}", timeout=30).json()
        if found["state"] in {"succeeded", "failed", "cancelled"}:
            return found
        time.sleep(0.1)
    raise AssertionError(server.tail())


def error(reply: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = reply.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def test_a_picture_is_set_in_motion(server: Server) -> None:
    fields = {"image": base64.b64encode(picture()).decode(), "seed": 7, "motion_bucket_id": 255}
    reply = server.post("/img2vid", fields, timeout=120)
    assert reply.status_code == 200, reply.text
    assert reply.headers["content-type"] == "video/mp4"
    assert reply.headers["x-seed"] == "7"
    frames, rate, stream = frames_of(reply.content)
    assert (len(frames), rate) == (FRAMES, FPS)
    assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
    assert {frame.size for frame in frames} == {(64, 64)}
    assert shows(frames[0], CAPTION).ok
    assert shows(frames[-1], "a large red circle on a blue background").colour
    # Of the six pixels that the miniature moves things at most.
    assert moved(frames) > 3


def test_more_motion_moves_it_farther(server: Server) -> None:
    image = base64.b64encode(picture()).decode()
    distances = []
    for bucket in (10, 240):
        fields = {"image": image, "seed": 3, "motion_bucket_id": bucket}
        frames, _, _ = frames_of(server.post("/img2vid", fields, timeout=120).content)
        distances.append(moved(frames))
    assert distances[1] > distances[0] + 2


@pytest.mark.parametrize(
    ("kind", "media_type"),
    [("webp", "image/webp"), ("gif", "image/gif"), ("zip", "application/zip")],
)
def test_clips_come_in_other_formats(server: Server, kind: str, media_type: str) -> None:
    fields = {"image": base64.b64encode(picture()).decode(), "steps": 4, "output_format": kind, "fps": 5}
    reply = server.post("/img2vid", fields, timeout=120)
    assert reply.headers["content-type"] == media_type
    if kind == "zip":
        with zipfile.ZipFile(io.BytesIO(reply.content)) as archive:
            assert len(archive.namelist()) == FRAMES
            with Image.open(archive.open(archive.namelist()[0])) as frame:
                assert frame.size == (64, 64)
                assert "Seed: " in frame.info["parameters"]
        return
    with Image.open(io.BytesIO(reply.content)) as image:
        assert image.size == (64, 64)
        # Frames that equal the one before are one in a GIF; their time is not lost.
        total = 0
        for number in range(image.n_frames):  # type: ignore[attr-defined] # animated formats have it
            image.seek(number)
            image.load()
            total += image.info["duration"]
        assert total == pytest.approx(1000 * FRAMES / 5, abs=10)


def test_a_prompt_is_drawn_and_then_filmed_in_one_job_with_two_stages(server: Server) -> None:
    job = server.post("/v1/jobs", {"task": "txt2vid", "prompt": CAPTION, "seed": 7}).json()
    assert job["task"] == "txt2vid"
    assert job["stage"] == {"number": 1, "of": 2, "task": "txt2img", "model": "tiny-sd"}
    assert job["request"]["source"]["prompt"] == CAPTION
    events = httpx.get(f"{server.url}{job['links']['events']}", timeout=120).text
    lines = [line.removeprefix("data: ") for line in events.splitlines() if line.startswith("data: ")]
    told = [yaml.safe_load(line) for line in lines]
    stages = [event["stage"] for event in told if event["type"] == "progress"]
    assert set(stages) == {1, 2}
    assert stages == sorted(stages)
    progress = [event["progress"] for event in told]
    assert progress == sorted(progress)
    assert progress[-1] == 1.0
    finished = done(server, job)
    assert finished["state"] == "succeeded"
    assert finished["stage"] == {"number": 2, "of": 2, "task": "img2vid", "model": "tiny-svd"}
    result = httpx.get(f"{server.url}{finished['links']['result']}", timeout=30)
    frames, _, _ = frames_of(result.content)
    assert shows(frames[0], CAPTION).ok
    variants = finished["outputs"][0]["variants"]
    assert set(variants) == {"thumbnail", "spritesheet"}
    for name, variant in variants.items():
        file = httpx.get(f"{server.url}{variant['url']}", timeout=30)
        assert file.headers["content-type"] == variant["content_type"]
        with Image.open(io.BytesIO(file.content)) as image:
            assert image.size == ((64, 64) if name == "thumbnail" else (192, 192))


def test_the_synchronous_route_films_a_prompt_as_well(server: Server) -> None:
    reply = server.post("/txt2vid", {"prompt": CAPTION, "seed": 7, "image_model": "tiny-sd"}, timeout=120)
    assert reply.status_code == 200, reply.text
    assert shows(frames_of(reply.content)[0][0], CAPTION).ok


def test_openai_s_client_makes_waits_for_and_removes_a_video(client: openai.OpenAI) -> None:
    video = client.videos.create_and_poll(
        prompt=CAPTION, model="tiny-svd", extra_body={"seed": 7}, poll_interval_ms=200
    )
    assert (video.status, video.progress, video.model, video.size) == ("completed", 100, "tiny-svd", "64x64")
    assert video.completed_at
    frames, rate, _ = frames_of(client.videos.download_content(video.id).read())
    assert (len(frames), rate) == (FRAMES, FPS)
    for variant in ("thumbnail", "spritesheet"):
        content = client.videos.download_content(video.id, variant=variant).read()
        with Image.open(io.BytesIO(content)) as image:
            image.load()
    assert video.id in {each.id for each in client.videos.list(limit=5)}
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(video.id)


def test_openai_s_client_films_a_picture_in_so_many_seconds(client: openai.OpenAI) -> None:
    extra: dict[str, Any] = {"num_frames": 8, "motion_bucket_id": 150}
    video = client.videos.create(
        prompt="", input_reference=("x.png", picture()), model="tiny-svd", seconds="4", extra_body=extra
    )
    assert (video.seconds, video.status) in {("4", "queued"), ("4", "in_progress")}
    while (video := client.videos.retrieve(video.id)).status not in {"completed", "failed"}:
        time.sleep(0.2)
    frames, rate, _ = frames_of(client.videos.download_content(video.id).read())
    assert (len(frames), rate) == (8, 2)
    assert shows(frames[0], CAPTION).ok


def test_a_video_at_once(server: Server) -> None:
    reply = httpx.post(
        f"{server.url}/v1/videos/sync",
        data={"model": "tiny-svd", "num_inference_steps": "4"},
        files={"input_reference": ("x.png", picture())},
        timeout=120,
    )
    assert reply.status_code == 200, reply.text
    assert len(frames_of(reply.content)[0]) == FRAMES


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"num_frames": 99}, "num_frames", "2 to 8"),
        ({"fps": 500}, "fps", "1 to 30"),
        ({"motion_bucket_id": 256}, "motion_bucket_id", "0 to 255"),
        ({"min_guidance_scale": 5}, "min_guidance_scale", "more than max_guidance_scale"),
        ({"width": 65}, "width", "64 and 72"),
        ({"model": "tiny-sd"}, "model", "does not do img2vid"),
        ({"output_format": "avi"}, "output_format", "mp4"),
        ({"strength": 0.5}, "strength", "unknown field"),
        ({"image": "aGVsbG8="}, "image", "not a picture"),
    ],
)
def test_odd_clips_are_refused_by_field(
    server: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    body = {"task": "img2vid", "image": base64.b64encode(picture()).decode(), **fields}
    reply = server.post("/v1/jobs", body)
    assert reply.status_code == 400, reply.text
    assert error(reply)["param"] == param
    assert words in error(reply)["message"]


def test_odd_videos_are_refused_by_field(server: Server) -> None:
    for fields, param in (
        ({}, "prompt"),
        ({"prompt": "x", "size": "big"}, "size"),
        ({"prompt": "x", "seconds": "4", "fps": 7}, "seconds"),
        ({"prompt": "x", "image_model": "tiny-svd"}, "image_model"),
        ({"prompt": "x", "sparkle": 1}, "sparkle"),
    ):
        reply = server.post("/v1/videos", fields)
        assert (reply.status_code, error(reply)["param"]) == (400, param), reply.text
    picture_job = server.post("/v1/jobs", {"task": "txt2img", "prompt": "x", "steps": 1}).json()
    assert httpx.get(f"{server.url}/v1/videos/{picture_job['id']}", timeout=30).status_code == 404


def test_a_running_clip_is_cancelled(server: Server) -> None:
    fields = {"task": "img2vid", "image": base64.b64encode(picture()).decode(), "steps": 150}
    job = server.post("/v1/jobs", fields).json()
    here = f"{server.url}{job['links']['self']}"
    while httpx.get(here, timeout=30).json()["state"] == "queued":
        time.sleep(0.05)
    assert httpx.delete(here, timeout=30).json()["state"] == "cancelled"
    again = server.post("/img2vid", {**fields, "steps": 1} | {"task": None}, timeout=120)
    assert again.status_code == 400, "task is no field of the native route"
    fields.pop("task")
    assert server.post("/img2vid", {**fields, "steps": 1}, timeout=120).status_code == 200


def loaded(content: bytes) -> trimesh.Trimesh:
    """The one mesh of a GLB."""
    scene = trimesh.load(io.BytesIO(content), file_type="glb")
    mesh = scene.to_mesh() if isinstance(scene, trimesh.Scene) else scene
    assert isinstance(mesh, trimesh.Trimesh)
    return mesh


def test_a_prompt_becomes_an_object_with_a_turntable(server: Server) -> None:
    fields = {"task": "txt2mesh", "prompt": "a red ball", "seed": 1, "turntable": True}
    finished = done(server, server.post("/v1/jobs", fields).json())
    assert finished["state"] == "succeeded", finished["error"]
    assert finished["model"] == "shap-e"
    result = httpx.get(f"{server.url}{finished['links']['result']}", timeout=30)
    assert result.headers["content-type"] == "model/gltf-binary"
    assert len(loaded(result.content).faces) > 10
    url = finished["outputs"][0]["variants"]["turntable"]["url"]
    frames, _, _ = frames_of(httpx.get(f"{server.url}{url}", timeout=30).content)
    assert len(frames) == 20
    assert {frame.size for frame in frames} == {(64, 64)}


def test_a_picture_becomes_an_object(server: Server) -> None:
    fields = {"image": base64.b64encode(picture(OBJECT)).decode(), "model": "shap-e-img2img", "seed": 1}
    reply = server.post("/img2mesh", fields, timeout=120)
    assert reply.status_code == 200, reply.text
    assert len(loaded(reply.content).faces) > 10


def test_a_prompt_is_drawn_and_then_modelled_in_one_job(server: Server) -> None:
    fields = {
        "task": "txt2mesh",
        "prompt": "a large red circle in the center",
        "image_model": "tiny-sd",
        "model": "sf3d",
    }
    job = server.post("/v1/jobs", fields).json()
    assert job["stage"]["of"] == 2
    assert job["request"]["source"]["prompt"].endswith("on a white background")
    finished = done(server, job)
    assert finished["state"] == "succeeded", finished["error"]
    result = httpx.get(f"{server.url}{finished['links']['result']}", timeout=30)
    assert len(loaded(result.content).faces) == 12


def test_a_worker_s_model_is_listed_with_its_health(server: Server) -> None:
    listed = httpx.get(f"{server.url}/v1/models", timeout=30).json()["data"]
    states = {entry["id"]: entry["state"] for entry in listed}
    assert states["sf3d"] == "resident"
    assert states["spar3d"] == "missing"
    reply = server.post("/img2mesh", {"image": base64.b64encode(picture()).decode(), "model": "spar3d"})
    assert (reply.status_code, error(reply)["code"]) == (503, "model_not_on_disk")
    assert "weights.worker.url" in error(reply)["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"grid_size": 4000}, "grid_size"),
        ({"frame_size": 65}, "frame_size"),
        ({"output_format": "stl"}, "output_format"),
        ({"model": "shap-e", "image_model": "tiny-sd"}, "image_model"),
        ({"model": "shap-e", "negative_prompt": "x"}, "negative_prompt"),
    ],
)
def test_odd_objects_are_refused_by_field(server: Server, fields: dict[str, Any], param: str) -> None:
    reply = server.post("/txt2mesh", {"prompt": "a ball", **fields})
    assert reply.status_code == 400, reply.text
    assert error(reply)["param"] == param


def test_files_of_clips_reach_bentoml_s_own_client(server: Server, tmp_path: Path) -> None:
    import bentoml

    (tmp_path / "x.png").write_bytes(picture())
    with bentoml.SyncHTTPClient(server.url, timeout=120) as own:
        clip = own.img2vid(image=tmp_path / "x.png", num_inference_steps=4, seed=7)
    assert len(frames_of(Path(clip).read_bytes())[0]) == FRAMES
