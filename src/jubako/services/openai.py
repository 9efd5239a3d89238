"""OpenAI's routes with our fields: images to generate, to edit and to vary, and the models."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import bentoml
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from jubako.errors import JubakoError, refusal
from jubako.images import ImagesEdit, ImagesGenerate, ImagesRequest, ImagesVariation
from jubako.job import Job
from jubako.jobs.record import Similar
from jubako.result import Result
from jubako.services.access import owner
from jubako.services.bodies import read_request
from jubako.services.connection import answer
from jubako.services.openapi import taken

__all__ = ["openai_app", "picture_fields", "similar_fields"]


def openai_app() -> FastAPI:
    """The application that the gateway mounts at its root."""
    app = FastAPI(title="Jubako", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_exception_handler(JubakoError, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    images = "/v1/images"
    app.add_api_route(f"{images}/generations", _generate_images, methods=["POST"], response_model=None)
    for path, route, kind in (
        (f"{images}/edits", _edit_images, ImagesEdit),
        (f"{images}/variations", _vary_images, ImagesVariation),
    ):
        app.add_api_route(path, route, methods=["POST"], response_model=None, openapi_extra=taken(kind))
    app.add_api_route("/v1/models", _list_models, methods=["GET"])
    app.add_api_route("/v1/models/{name}", _show_model, methods=["GET"])
    return app


async def _generate_images(request: ImagesGenerate) -> Response:
    """Pictures for a prompt, all at once or, with ``stream``, their steps and then each as it is done."""
    return await _made(request, "image_generation")


async def _edit_images(body: Request) -> Response:
    """Pictures made from another one, by a mask or by what is transparent in it only in part."""
    return await _made(await read_request(body, ImagesEdit), "image_edit")


async def _vary_images(body: Request) -> Response:
    """Pictures like another one."""
    return await _made(await read_request(body, ImagesVariation), "image_variation")


async def _made(request: ImagesRequest, kind: str) -> Response:
    gateway = bentoml.get_current_service()
    jobs = await gateway.admission.pictures(request)
    if request.stream:
        return StreamingResponse(_stream(gateway, request, jobs, kind), media_type="text/event-stream")
    results = await gateway.families.run_all(jobs)
    alike = await gateway.jobs.alike(results, owner())
    return JSONResponse(_reply(request, jobs, results, alike))


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


def _reply(
    request: ImagesRequest,
    jobs: list[Job],
    results: Sequence[Result],
    alike: Sequence[Sequence[Similar]],
) -> dict[str, Any]:
    job = jobs[0]
    return {
        "created": int(time.time()),
        "data": [
            picture_fields(result) | {"similar_to": similar_fields(similar)}
            for result, similar in zip(results, alike, strict=True)
        ],
        **_described(request, job),
    }


def picture_fields(result: Result) -> dict[str, Any]:
    """A picture as an entry of a reply's ``data``."""
    timings = result.timings.model_dump() if result.timings else {}
    return {
        "id": result.job_id,
        "b64_json": base64.b64encode(result.content).decode(),
        "seed": result.seed,
        "timings": {name: round(seconds, 4) for name, seconds in timings.items()},
        "flagged": result.flagged,
    }


def similar_fields(similar: Sequence[Similar]) -> list[dict[str, Any]]:
    """Earlier results that one is very like, the nearest first."""
    return [each.model_dump() for each in similar]


def _described(request: ImagesRequest, job: Job) -> dict[str, Any]:
    """What OpenAI's newer models add to a reply, and what this server adds."""
    return {
        "background": "opaque",
        "output_format": job.output_format,
        "quality": "auto",
        "size": f"{job.width}x{job.height}",
        "model": job.model,
        "warnings": [*request.ignored(), *job.warnings],
    }


async def _stream(
    gateway: Any, request: ImagesRequest, jobs: list[Job], kind: str
) -> AsyncGenerator[str, None]:
    yield ": the picture follows\n\n"
    try:
        for job in jobs:
            async for event in gateway.families.events(job):
                if isinstance(event, Result):
                    event.checked()
                    (alike,) = await gateway.jobs.alike([event], owner())
                    fields = {
                        **picture_fields(event),
                        "similar_to": similar_fields(alike),
                        **_described(request, job),
                        "created_at": int(time.time()),
                    }
                    yield _sse(f"{kind}.completed", fields)
                else:
                    yield _sse(f"{kind}.progress", {"step": event.step, "steps": event.steps})
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
