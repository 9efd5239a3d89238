"""OpenAI's routes: ``/v1/images/generations`` and ``/v1/models``, with our fields at top level."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncGenerator
from typing import Any

import bentoml
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jubako.errors import JubakoError, refusal
from jubako.job import Job
from jubako.planning import plan_images
from jubako.request import ImagesGenerate
from jubako.result import Result
from jubako.services.connection import answer

__all__ = ["openai_app"]


def openai_app() -> FastAPI:
    """The application that the gateway mounts at its root."""
    app = FastAPI(title="Jubako", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(JubakoError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_api_route("/v1/images/generations", _generate_images, methods=["POST"], response_model=None)
    app.add_api_route("/v1/models", _list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", _show_model, methods=["GET"])
    return app


async def _generate_images(request: ImagesGenerate) -> Response:
    """Pictures for a prompt, all at once or, with ``stream``, their steps and then each as it is done."""
    gateway = bentoml.get_current_service()
    jobs = plan_images(request, gateway.catalog, gateway.settings.default_model)
    if request.stream:
        return StreamingResponse(_stream(gateway, request, jobs), media_type="text/event-stream")
    tasks = [asyncio.ensure_future(gateway.families.run(job)) for job in jobs]
    try:
        results = await asyncio.gather(*tasks)
    finally:
        # When one fails, nobody waits for the others any more.
        for task in tasks:
            task.cancel()
    return JSONResponse(_reply(request, jobs, results))


async def _list_models() -> dict[str, Any]:
    """Every model of the catalog, with its limits, licence and state."""
    gateway = bentoml.get_current_service()
    return {"object": "list", "data": await gateway.model_list()}


async def _show_model(name: str) -> dict[str, Any]:
    """One model."""
    gateway = bentoml.get_current_service()
    gateway.catalog.model(name)
    entries: list[dict[str, Any]] = await gateway.model_list()
    return next(entry for entry in entries if entry["id"] == name)


def _reply(request: ImagesGenerate, jobs: list[Job], results: list[Result]) -> dict[str, Any]:
    job = jobs[0]
    return {
        "created": int(time.time()),
        "data": [_picture(result) for result in results],
        **_described(request, job),
    }


def _picture(result: Result) -> dict[str, Any]:
    timings = result.timings.model_dump() if result.timings else {}
    return {
        "b64_json": base64.b64encode(result.content).decode(),
        "seed": result.seed,
        "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
    }


def _described(request: ImagesGenerate, job: Job) -> dict[str, Any]:
    """What OpenAI's newer models add to a reply, and what this server adds."""
    return {
        "background": "opaque",
        "output_format": job.output_format,
        "quality": "auto",
        "size": f"{job.width}x{job.height}",
        "model": job.model,
        "warnings": request.ignored(),
    }


async def _stream(gateway: Any, request: ImagesGenerate, jobs: list[Job]) -> AsyncGenerator[str, None]:
    yield ": the picture follows\n\n"
    try:
        for job in jobs:
            async for event in gateway.families.events(job):
                if isinstance(event, Result):
                    event.checked()
                    fields = {**_picture(event), **_described(request, job), "created_at": int(time.time())}
                    yield _sse("image_generation.completed", fields)
                else:
                    yield _sse("image_generation.progress", {"step": event.step, "steps": event.steps})
    except JubakoError as error:
        yield f"data: {json.dumps(error.body())}\n\n"
        return
    yield "data: [DONE]\n\n"


def _sse(kind: str, fields: dict[str, Any]) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n"


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, JubakoError)  # noqa: S101 # registered for this type only
    return answer(error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 # registered for this type only
    return answer(refusal(error.errors()))
