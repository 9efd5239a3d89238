"""The client of external workers against a real server that is well, slow, broken, or talks nonsense."""

from __future__ import annotations

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import trimesh
import uvicorn
from PIL import Image
from server import free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from jubako import workers
from jubako.errors import (
    FamilyUnavailable,
    GenerationFailed,
    InvalidRequest,
    JubakoError,
    ModelNotOnDisk,
    TimedOut,
)
from jubako.job import Job, Solid
from jubako.pictures import png
from jubako.result import File
from jubako.sources import Worker

ORANGE = (245, 140, 30)


class StandIn:
    """A server with a worker of each kind under a path of its own; it notes what it was sent."""

    def __init__(self) -> None:
        self.form: dict[str, Any] = {}
        self.arrived, self.left = threading.Event(), threading.Event()
        self.url = f"http://127.0.0.1:{free_port()}"
        answers = {
            "refusing": _error(422, "image: no object can be seen", "image"),
            "failing": _error(500, "out of memory", None),
            "busy": _error(429, "two jobs are waiting already", None),
            "wordless": PlainTextResponse("Traceback (most recent call last): …", 500),
            "elsewhere": PlainTextResponse("Not Found", 404),
            "redirecting": RedirectResponse("http://127.0.0.1:1/generate"),
            "garbage": Response(b"glTF" + b"\0" * 100, media_type="model/gltf-binary"),
            "torn": Response(cube(ORANGE)[:-10], media_type="model/gltf-binary"),
            "empty": Response(b"", media_type="model/gltf-binary"),
            "pointless": Response(_pointless(), media_type="model/gltf-binary"),
        }
        routes = [_answering(name, answer) for name, answer in answers.items()]
        for name, handler in (("noting", self.note), ("slow", self.wait), ("long", self.stream)):
            routes.append(Mount(f"/{name}", routes=[Route("/generate", handler, methods=["POST"])]))
        self.app = Starlette(routes=routes)

    def worker(self, name: str, **fields: Any) -> Worker:
        return Worker(url=f"{self.url}/{name}", **fields)

    async def note(self, request: Request) -> Response:
        async with request.form() as form:
            self.form = {
                name: value if isinstance(value, str) else await value.read() for name, value in form.items()
            }
        return Response(cube(ORANGE), media_type="model/gltf-binary")

    async def wait(self, request: Request) -> Response:
        await request.body()
        self.arrived.set()
        while not await request.is_disconnected():
            await asyncio.sleep(0.01)
        self.left.set()
        return Response()

    async def stream(self, request: Request) -> Response:
        async def zeros() -> AsyncIterator[bytes]:
            for _ in range(64):
                yield b"\0" * 2**20
                await asyncio.sleep(0)

        return StreamingResponse(zeros(), media_type="model/gltf-binary")


def _error(status: int, message: str, param: str | None) -> Response:
    return JSONResponse({"error": {"message": message, "type": "x", "param": param, "code": "y"}}, status)


def _answering(name: str, answer: Response) -> Mount:
    async def handler(_: Request) -> Response:
        return answer

    return Mount(f"/{name}", routes=[Route("/generate", handler, methods=["POST"])])


def _pointless() -> bytes:
    """A sound GLB file in which there is nothing but a line."""
    scene: Any = trimesh.Scene([trimesh.load_path([[[0, 0, 0], [1, 1, 1]]])])
    return bytes(scene.export(file_type="glb"))


@pytest.fixture(scope="module")
def stand_in() -> Iterator[StandIn]:
    stand_in = StandIn()
    port = int(stand_in.url.rpartition(":")[2])
    server = uvicorn.Server(uvicorn.Config(stand_in.app, host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield stand_in
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def well() -> Iterator[Worker]:
    """The smallest worker there is, in a process of its own."""
    port = free_port()
    script = Path(__file__).parent / "e2e" / "worker.py"
    worker = Worker(url=f"http://127.0.0.1:{port}")
    with subprocess.Popen([sys.executable, str(script), str(port)]) as process:
        while not asyncio.run(workers.healthy(worker)):
            assert process.poll() is None
            time.sleep(0.05)
        yield worker
        process.terminate()


def cube(colour: tuple[int, int, int]) -> bytes:
    """The object that the smallest worker makes of a picture in that colour."""
    mesh = trimesh.creation.box((1, 1, 1))
    mesh.visual.vertex_colors = [*colour, 255]
    return bytes(mesh.export(file_type="glb"))


def job(**fields: Any) -> Job:
    given: dict[str, Any] = {
        "id": "abc",
        "task": "img2mesh",
        "family": "mesh",
        "model": "sf3d",
        "prompt": "",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 1,
        "guidance_scale": 0.0,
        "scheduler": "EulerDiscreteScheduler",
        "seed": 7,
        "image": png(Image.new("RGB", (64, 64), ORANGE)),
        "solid": Solid(grid_size=160, frame_size=32, turntable=False),
        "output_format": "glb",
        "output_compression": 90,
    }
    return Job.model_validate(given | fields)


def generated(worker: Worker, one: Job | None = None) -> tuple[File, Any]:
    return asyncio.run(workers.generate(worker, one or job()))


def test_a_well_worker_makes_an_object_that_is_passed_on_as_it_is(well: Worker) -> None:
    file, variants = generated(well)
    assert file.content_type == "model/gltf-binary"
    assert file.content == cube(ORANGE)
    assert variants == {}


def test_it_is_sent_the_picture_and_what_the_job_says(stand_in: StandIn) -> None:
    one = job()
    generated(stand_in.worker("noting"), one)
    assert stand_in.form == {
        "id": "abc",
        "model": "sf3d",
        "task": "img2mesh",
        "prompt": "",
        "negative_prompt": "",
        "seed": "7",
        "num_inference_steps": "1",
        "guidance_scale": "0.0",
        "grid_size": "160",
        "image": one.image,
    }


def test_a_job_of_a_prompt_alone_has_no_picture(stand_in: StandIn) -> None:
    generated(stand_in.worker("noting"), job(task="txt2mesh", prompt="a chair, größer", image=None))
    assert stand_in.form["prompt"] == "a chair, größer"
    assert "image" not in stand_in.form


def test_other_formats_are_made_of_the_worker_s_object(well: Worker) -> None:
    solid = Solid(grid_size=160, frame_size=32, turntable=True)
    file, variants = generated(well, job(output_format="obj", solid=solid))
    assert file.content_type == "model/obj"
    assert len(trimesh.load_mesh(io.BytesIO(file.content), file_type="obj").faces) == 12
    assert set(variants) == {"turntable"}
    file, variants = generated(well, job(output_format="gif", solid=solid))
    assert Image.open(io.BytesIO(file.content)).size == (32, 32)
    assert variants["mesh"].content == cube(ORANGE)


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("refusing", InvalidRequest, "image: no object can be seen"),
        ("failing", GenerationFailed, "out of memory"),
        ("busy", FamilyUnavailable, "two jobs are waiting already"),
        ("wordless", GenerationFailed, "the worker of sf3d answered 500"),
        ("elsewhere", GenerationFailed, "the worker of sf3d answered 404"),
        ("redirecting", GenerationFailed, "the worker of sf3d answered 307"),
        ("garbage", GenerationFailed, "no object that can be read"),
        ("torn", GenerationFailed, "no object that can be read"),
        ("empty", GenerationFailed, "no object that can be read"),
        ("pointless", GenerationFailed, "no object that can be read"),
    ],
)
def test_whatever_else_it_answers_is_an_error_of_ours(
    stand_in: StandIn, name: str, error: type[JubakoError], words: str
) -> None:
    with pytest.raises(error, match=words):
        generated(stand_in.worker(name))


def test_a_refusal_names_the_field(stand_in: StandIn) -> None:
    with pytest.raises(InvalidRequest) as refused:
        generated(stand_in.worker("refusing"))
    assert refused.value.param == "image"


def test_an_object_past_the_bound_is_not_read_to_its_end(
    stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "MAX_BYTES", 5 * 2**20)
    with pytest.raises(GenerationFailed, match="more than 5 MB"):
        generated(stand_in.worker("long"))


def test_a_slow_one_is_left_after_its_time(stand_in: StandIn) -> None:
    stand_in.left.clear()
    with pytest.raises(TimedOut, match=r"no object after 0\.3 s"):
        generated(stand_in.worker("slow", timeout=0.3))
    assert stand_in.left.wait(10)


def test_cancelling_closes_the_connection(stand_in: StandIn) -> None:
    stand_in.arrived.clear()
    stand_in.left.clear()

    async def cancel() -> None:
        task = asyncio.create_task(workers.generate(stand_in.worker("slow"), job()))
        assert await asyncio.to_thread(stand_in.arrived.wait, 10)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await asyncio.to_thread(stand_in.left.wait, 10)

    asyncio.run(cancel())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://[broken", "worker:80"])
def test_one_that_is_not_there_is_unavailable(url: str) -> None:
    with pytest.raises(FamilyUnavailable, match="does not answer"):
        generated(Worker(url=url))
    assert not asyncio.run(workers.healthy(Worker(url=url)))


def test_a_model_without_a_worker_says_where_its_address_goes() -> None:
    with pytest.raises(ModelNotOnDisk, match=r"weights\.worker\.url"):
        generated(Worker())
    assert not asyncio.run(workers.healthy(Worker()))


def test_health_is_an_answer_of_200(well: Worker, stand_in: StandIn) -> None:
    assert asyncio.run(workers.healthy(well))
    assert asyncio.run(workers.healthy(Worker(url=f"{well.url}/")))
    assert not asyncio.run(workers.healthy(Worker(url=well.url, health_path="/healthy")))
    assert not asyncio.run(workers.healthy(stand_in.worker("failing")))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"error": "x"}',
        b'{"error": {}}',
        b"\xff",
        b"[" * 60_000,
        json.dumps({"error": None}).encode(),
    ],
)
def test_an_error_in_any_other_shape_has_no_words(body: bytes) -> None:
    assert workers._told(body) == ("", None)
