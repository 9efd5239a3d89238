"""The four systems under the same load: the server batching by step and by request, the engine without HTTP,
and the stock pipeline one request at a time. Each has processes of its own.
"""

from __future__ import annotations

import asyncio
import base64
import tempfile
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx

from benchmarks.processes import in_a_process
from benchmarks.server import served
from benchmarks.traffic import Answer, Request, System
from jubako.catalog import Model, load_catalog
from jubako.job import Job
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.settings import load_settings

__all__ = ["SYSTEMS"]


def _served(batching: str) -> System:
    @asynccontextmanager
    async def system(model: str, threads: int) -> AsyncIterator[Answer]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        with served(JUBAKO_BATCHING=batching, OMP_NUM_THREADS=str(threads)) as server:
            async with httpx.AsyncClient(base_url=server.url, timeout=600, limits=limits) as client:
                yield _over_http(client, model)

    return system


def _over_http(client: httpx.AsyncClient, model: str) -> Answer:
    async def answer(request: Request) -> bytes:
        reply = await client.post("/v1/images/generations", json={"model": model, **request.fields()})
        if reply.status_code != 200:
            raise RuntimeError(f"{reply.status_code}: {reply.text[:200]}")
        return base64.b64decode(reply.json()["data"][0]["b64_json"])

    return answer


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
