"""The four systems under the same load: the server batching by step and by request, the engine without HTTP,
and the stock pipeline one request at a time. Each has processes of its own.
"""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import httpx

from benchmarks.processes import in_a_process
from benchmarks.traffic import Answer, Request, System
from jubako.catalog import Model, load_catalog
from jubako.job import Job
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.settings import load_settings

__all__ = ["SYSTEMS"]

ROOT = Path(__file__).resolve().parent.parent
START_SECONDS = 180
STOP_SECONDS = 30


def _served(batching: str) -> System:
    @asynccontextmanager
    async def system(model: str, threads: int) -> AsyncIterator[Answer]:
        with tempfile.TemporaryDirectory(prefix="jubako-benchmark-") as home:
            port = _free_port()
            server = _start(Path(home), port, {"JUBAKO_BATCHING": batching, "OMP_NUM_THREADS": str(threads)})
            limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
            url = f"http://127.0.0.1:{port}"
            try:
                async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
                    await _until_ready(client, server, Path(home) / "log")
                    yield _over_http(client, model)
            finally:
                _stop(server)

    return system


def _over_http(client: httpx.AsyncClient, model: str) -> Answer:
    async def answer(request: Request) -> bytes:
        reply = await client.post("/v1/images/generations", json={"model": model, **request.fields()})
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code}: {reply.text[:200]}")
        return base64.b64decode(reply.json()["data"][0]["b64_json"])

    return answer


def _start(home: Path, port: int, settings: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """The server in a session of its own, so that it can be ended with all its workers."""
    environment = {
        **os.environ,
        "BENTOML_HOME": str(home / "bentoml"),
        "BENTOML_DO_NOT_TRACK": "1",
        "JUBAKO_HOME": str(home / "jubako"),
        "JUBAKO_FAMILIES": "sd",
        **settings,
    }
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "bentoml", "serve", "service:Gateway", *address]
    with (home / "log").open("wb") as log:
        return subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )


async def _until_ready(client: httpx.AsyncClient, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = perf_counter() + START_SECONDS
    while server.poll() is None and perf_counter() < deadline:
        try:
            if (await client.get("/readyz", timeout=5)).status_code == 200:
                return
        except httpx.TransportError:
            pass
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the server did not start:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-3000:]


def _stop(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def _engine(model: str, threads: int) -> AsyncIterator[Answer]:
    """The common runner: the step batcher with everything around it but HTTP."""
    import torch

    from jubako.runner import Runner

    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory(prefix="jubako-benchmark-") as home:
        settings = load_settings()
        catalog = load_catalog(settings.catalog)
        family = catalog.families[catalog.model(model).family]
        runner = Runner(family, settings.model_copy(update={"home": Path(home)}))

        async def answer(request: Request) -> bytes:
            job = plan(TextToImage.model_validate({"model": model, **request.fields()}), catalog)
            return (await runner.generate(job)).checked().content

        try:
            yield answer
        finally:
            runner.close()


@asynccontextmanager
async def _one_at_a_time(model: str, threads: int) -> AsyncIterator[Answer]:
    """The stock pipeline's own call, one request after the other; files are encoded beside the next call.

    One thread does all that torch does, loading too, so that one pool of OpenMP threads is all there is.
    """
    from jubako.media import encode_image

    catalog = load_catalog(load_settings().catalog)
    call, encode = ThreadPoolExecutor(1, "call"), ThreadPoolExecutor(2, "encode")
    loop = asyncio.get_running_loop()
    pipeline = await loop.run_in_executor(call, _stock_pipeline, catalog.model(model), threads)

    async def answer(request: Request) -> bytes:
        job = plan(TextToImage.model_validate({"model": model, **request.fields()}), catalog)
        image = await loop.run_in_executor(call, _called, pipeline, job)
        return await loop.run_in_executor(encode, encode_image, image, job, {})

    try:
        yield answer
    finally:
        call.shutdown()
        encode.shutdown()


def _stock_pipeline(model: Model, threads: int) -> Any:
    import torch

    from benchmarks.architectures import served_pipeline
    from jubako.engine.schedule import make_scheduler

    torch.set_num_threads(threads)
    pipeline = served_pipeline(model)
    pipeline.scheduler = make_scheduler(pipeline.scheduler.config, model.defaults.scheduler, model.flow)
    return pipeline


def _called(pipeline: Any, job: Job) -> Any:
    import torch

    return pipeline(
        job.prompt,
        negative_prompt=job.negative_prompt or None,
        width=job.width,
        height=job.height,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(job.seed),
    ).images[0]


SYSTEMS: Mapping[str, System] = {
    "step": _served("step"),
    "request": _served("request"),
    "one_at_a_time": in_a_process(_one_at_a_time),
    "engine": in_a_process(_engine),
}
"""By name: the server batching by step and by request, the stock pipeline, the engine without HTTP."""
