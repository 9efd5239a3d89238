"""Models that run in programs of their own, because they can't share this environment, reached over HTTP.

``docs/workers.md`` is the contract: a picture or a prompt in, a GLB file out. A worker is trusted to be the
one that the catalog names, not to be well: it may be slow, down, or answer with anything.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from typing import Any

import httpx

from jubako.catalog import Model
from jubako.errors import (
    FamilyUnavailable,
    GenerationFailed,
    InvalidRequest,
    JubakoError,
    ModelNotOnDisk,
    TimedOut,
)
from jubako.job import Job
from jubako.result import File
from jubako.solids import solid_files
from jubako.sources import Worker
from jubako.surface import read_glb

__all__ = ["MAX_BYTES", "generate", "healthy", "healthy_of"]

logger = logging.getLogger(__name__)

MAX_BYTES = 200 * 2**20
MAX_ERROR_BYTES = 64 * 2**10
MAX_MESSAGE = 500
CONNECT_SECONDS = 5.0
HEALTH_SECONDS = 2.0

# What says that the request is at fault; other 4xx (no such path, no right to it) say that the catalog is.
REFUSALS = (400, 413, 415, 422)
BUSY = (429, 503)


async def healthy(worker: Worker) -> bool:
    """Whether the worker answers its health path with 200 within two seconds."""
    if worker.url is None:
        return False
    try:
        async with asyncio.timeout(HEALTH_SECONDS), _client() as client:
            reply = await client.get(worker.url.rstrip("/") + worker.health_path)
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
        return False
    return reply.status_code == 200


async def healthy_of(models: Mapping[str, Model]) -> dict[str, bool]:
    """Of the models that run in workers, whether theirs is well."""
    named = {name: model.weights.worker for name, model in models.items() if model.weights.worker}
    answers = await asyncio.gather(*(healthy(worker) for worker in named.values()))
    return dict(zip(named, answers, strict=True))


async def generate(worker: Worker, job: Job) -> tuple[File, Mapping[str, File]]:
    """The job's file and further ones by name. Being cancelled closes the connection to the worker.

    Raises ModelNotOnDisk without a worker, FamilyUnavailable when it is down or busy, TimedOut when it takes
    longer than its ``timeout``, InvalidRequest with its words when it refuses the job, and GenerationFailed
    when it fails or sends no object.
    """
    glb = await _generated(worker, job)
    # Off the event loop: reading a big object takes a second, the views of a turntable several.
    return await asyncio.to_thread(_files, glb, job)


def _files(glb: bytes, job: Job) -> tuple[File, Mapping[str, File]]:
    try:
        surface = read_glb(glb)
    except ValueError as error:
        logger.warning("the worker of %s: %s", job.model, error)
        raise GenerationFailed(f"the worker of {job.model} sent no object that can be read") from error
    return solid_files(surface, job, {}, glb)


async def _generated(worker: Worker, job: Job) -> bytes:
    """The GLB file that the worker makes of the job."""
    if worker.url is None:
        raise ModelNotOnDisk(
            f"model: {job.model} runs in a worker of its own, and none is set up here: weights.worker.url of "
            "its entry names it",
            param="model",
        )
    try:
        async with (
            asyncio.timeout(worker.timeout),
            _client() as client,
            client.stream("POST", worker.url.rstrip("/") + "/generate", files=_form(job)) as reply,
        ):
            if reply.status_code != 200:
                raise _failure(reply.status_code, await _body(reply, MAX_ERROR_BYTES), job.model)
            content = await _body(reply, MAX_BYTES + 1)
    except TimeoutError as error:
        raise TimedOut(f"the worker of {job.model} had no object after {worker.timeout:g} s") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        logger.warning("the worker of %s at %s: %r", job.model, worker.url, error)
        raise FamilyUnavailable(f"the worker of {job.model} does not answer; try again later") from error
    if len(content) > MAX_BYTES:
        raise GenerationFailed(
            f"the worker of {job.model} sent an object of more than {MAX_BYTES // 2**20} MB"
        )
    return content


def _client() -> httpx.AsyncClient:
    # The proxies of the environment are for the world outside. How long a job may take is the worker's own.
    return httpx.AsyncClient(timeout=httpx.Timeout(None, connect=CONNECT_SECONDS), trust_env=False)


def _form(job: Job) -> dict[str, Any]:
    """The job as multipart/form-data: fields without a file name, and the picture as a file."""
    fields = {
        "id": job.id,
        "model": job.model,
        "task": job.task,
        "prompt": job.prompt,
        "negative_prompt": job.negative_prompt,
        "seed": job.seed,
        "num_inference_steps": job.num_inference_steps,
        "guidance_scale": job.guidance_scale,
        "grid_size": job.solid.grid_size if job.solid else None,
    }
    form: dict[str, Any] = {name: (None, str(value)) for name, value in fields.items() if value is not None}
    if job.image is not None:
        form["image"] = ("image.png", job.image, "image/png")
    return form


async def _body(reply: httpx.Response, limit: int) -> bytes:
    """The reply's content, at most ``limit`` bytes of it."""
    content = bytearray()
    async for some in reply.aiter_bytes():
        content += some
        if len(content) >= limit:
            break
    return bytes(content[:limit])


def _failure(status: int, body: bytes, model: str) -> JubakoError:
    """The error that a worker's answer stands for; its own words where it has the one shape for them."""
    message, param = _told(body)
    # Without its words, which may quote the prompt: the client hears them.
    logger.warning(
        "the worker of %s answered %d, %s", model, status, "with its reason" if message else "with none"
    )
    text = message or f"the worker of {model} answered {status}"
    if status in REFUSALS:
        return InvalidRequest(text, param=param)
    if status in BUSY:
        return FamilyUnavailable(text)
    return GenerationFailed(text)


def _told(body: bytes) -> tuple[str, str | None]:
    """Message and field of ``{"error": {"message": …, "param": …}}``, empty and None for anything else."""
    try:
        error = json.loads(body)["error"]
        message, param = error["message"], error.get("param")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", None
    return str(message)[:MAX_MESSAGE], param if isinstance(param, str) else None
