"""``/v1/videos``: OpenAI's video jobs over the durable jobs of clips, and clips at once under ``/sync``."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

import bentoml
from fastapi import FastAPI, Query
from pydantic import AliasChoices, Field
from starlette.requests import Request as Body
from starlette.responses import JSONResponse, Response

from jubako.clip import ClipRequest, ImageToVideo, TextToVideo
from jubako.errors import InvalidRequest, UnknownJob
from jubako.jobs.record import JobState, Record
from jubako.planning.bounds import model_of
from jubako.request import PictureBytes
from jubako.services.bodies import read_request
from jubako.services.jobs import IdempotencyKey, file_of, submitted

__all__ = ["add_videos"]

_STATUS: dict[JobState, str] = {
    "queued": "queued",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "failed",
}
_TASKS = ("img2vid", "txt2vid")
_SIZE = re.compile(r"(\d{1,5})[xX](\d{1,5})")


class VideoCreate(ClipRequest):
    """OpenAI's ``POST /v1/videos`` with our fields at top level."""

    prompt: str | None = Field(default=None, description="What the clip shows; not needed with a picture")
    input_reference: PictureBytes | None = Field(
        default=None,
        description="The first frame: an upload, base64 or a data: URL",
        validation_alias=AliasChoices("input_reference", "image"),
    )
    seconds: float | None = Field(
        default=None, gt=0, le=60, description="How long the clip plays: sets its frames a second"
    )
    size: str | None = Field(default=None, description="'auto' or WIDTHxHEIGHT")
    negative_prompt: str | None = Field(default=None, description="What it should not show")
    image_model: str | None = Field(default=None, description="The model that draws the first frame")


def add_videos(app: FastAPI) -> None:
    """Give the application the routes."""
    app.add_api_route("/v1/videos/sync", _sync, methods=["POST"], response_model=None)
    app.add_api_route("/v1/videos", _create, methods=["POST"], response_model=None)
    app.add_api_route("/v1/videos", _list, methods=["GET"], response_model=None)
    app.add_api_route("/v1/videos/{job_id}", _show, methods=["GET"], response_model=None)
    app.add_api_route("/v1/videos/{job_id}", _remove, methods=["DELETE"], response_model=None)
    app.add_api_route("/v1/videos/{job_id}/content", _content, methods=["GET"], response_model=None)


async def _create(body: Body, idempotency_key: IdempotencyKey = None) -> Response:
    """Film a prompt or a picture, as a durable job."""
    request = _clip_of(await read_request(body, VideoCreate))
    record = await submitted(request, key=idempotency_key)
    return JSONResponse(_video(record), headers=_poll_after())


async def _sync(body: Body) -> Response:
    """The clip itself, as soon as it is made."""
    request = _clip_of(await read_request(body, VideoCreate))
    response: Response = await bentoml.get_current_service().answered(request)
    return response


async def _show(job_id: str) -> Response:
    """One video."""
    return JSONResponse(_video(await _found(job_id)), headers=_poll_after())


async def _list(
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """Videos, the newest first; ``after`` is the last one of the page before."""
    desk = bentoml.get_current_service().jobs
    records = await desk.page({"task": _TASKS}, after, limit + 1, newest_first=order == "desc")
    page = [_video(record) for record in records[:limit]]
    return JSONResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(records) > limit,
        }
    )


async def _remove(job_id: str) -> Response:
    """Cancel the video if it is not done, and remove it."""
    record = await _found(job_id)
    await bentoml.get_current_service().jobs.forget(record.id)
    return JSONResponse({"id": record.id, "object": "video.deleted", "deleted": True})


async def _content(job_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video") -> Response:
    """The clip, its first frame, or all of its frames on one sheet."""
    return file_of(await _found(job_id), variant=None if variant == "video" else variant)


async def _found(job_id: str) -> Record:
    record: Record = await bentoml.get_current_service().jobs.find(job_id)
    if record.task not in _TASKS:
        raise UnknownJob(f"job {record.id} is no video")
    return record


def _clip_of(asked: VideoCreate) -> ClipRequest:
    """The native request; what is only OpenAI's is said in its fields."""
    fields = {name: getattr(asked, name) for name in ClipRequest.model_fields.keys() & asked.model_fields_set}
    fields |= _sized(asked) | _timed(asked)
    if asked.input_reference is not None:
        return ImageToVideo(image=asked.input_reference, **fields)
    if asked.prompt is None:
        raise InvalidRequest("prompt: give a prompt, or a picture as input_reference", param="prompt")
    more = {"negative_prompt": asked.negative_prompt, "image_model": asked.image_model}
    return TextToVideo(prompt=asked.prompt, **fields, **{k: v for k, v in more.items() if v is not None})


def _sized(asked: VideoCreate) -> dict[str, int]:
    if asked.size is None or asked.size == "auto":
        return {}
    if asked.width or asked.height:
        raise InvalidRequest("size: give either size or width and height", param="size")
    if not (match := _SIZE.fullmatch(asked.size)):
        raise InvalidRequest(
            f"size: {asked.size!r} is not a size; use auto or WIDTHxHEIGHT, as in 1024x576", param="size"
        )
    return {"width": int(match[1]), "height": int(match[2])}


def _timed(asked: VideoCreate) -> dict[str, int]:
    """Models make as many frames as they were trained on; how long those play is a matter of the rate."""
    if asked.seconds is None:
        return {}
    if asked.fps is not None:
        raise InvalidRequest("seconds: give either seconds or fps", param="seconds")
    catalog = bentoml.get_current_service().catalog
    own = model_of(asked.model, ("img2vid", "txt2vid"), catalog).defaults.clip
    frames = asked.num_frames or (own.num_frames if own else 1)
    return {"fps": max(1, round(frames / asked.seconds))}


def _poll_after() -> dict[str, str]:
    return {"openai-poll-after-ms": "1000"}


def _video(record: Record) -> dict[str, Any]:
    job = record.work.jobs[0]
    error = record.error["error"] if record.error else None
    if record.state == "cancelled":
        error = {"code": "cancelled", "message": "the video was cancelled"}
    clip = job.clip
    return {
        "id": record.id,
        "object": "video",
        "status": _STATUS[record.state],
        "progress": int(100 * record.progress),
        "created_at": int(record.created),
        "completed_at": int(record.ended) if record.ended else None,
        "expires_at": None,
        "model": record.model,
        "prompt": job.source.prompt if job.source else job.prompt,
        "seconds": f"{clip.num_frames / clip.fps:g}" if clip else None,
        "size": f"{job.width}x{job.height}",
        "remixed_from_video_id": None,
        "error": error and {"code": error["code"], "message": error["message"]},
        "seed": job.seed,
        "warnings": list(job.warnings),
    }
