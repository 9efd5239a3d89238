"""``/v1/videos``: OpenAI's video jobs over the durable jobs of clips, and clips at once under ``/sync``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import bentoml
from fastapi import FastAPI, Query
from pydantic import AliasChoices, Field
from starlette.requests import Request as Body
from starlette.responses import JSONResponse, Response

from jubako.clip import ClipRequest, ImageToVideo, TextToVideo
from jubako.errors import InvalidRequest, UnknownJob
from jubako.images import sides_of
from jubako.jobs.record import JobState, Record
from jubako.planning.bounds import model_of
from jubako.request import PictureBytes, ResizeMode
from jubako.services.access import caller
from jubako.services.bodies import read_request
from jubako.services.jobs import IdempotencyKey, file_of, found, page_of, submitted
from jubako.services.openai import similar_fields
from jubako.services.openapi import taken

__all__ = ["VideoCreate", "add_videos"]

_STATUS: dict[JobState, str] = {
    "queued": "queued",
    "running": "in_progress",
    "succeeded": "completed",
    "failed": "failed",
    "cancelled": "failed",
}
_TASKS = ("img2vid", "txt2vid")
_OF_PROMPTS = (
    "prompt",
    "negative_prompt",
    "image_model",
    "image_num_inference_steps",
    "image_guidance_scale",
)
NEAR_ENOUGH = 0.1


class VideoCreate(TextToVideo):
    """OpenAI's ``POST /v1/videos`` with our fields at top level."""

    prompt: str | None = Field(  # type: ignore[assignment] # a picture does without
        default=None, description="What the clip shows; not needed with a picture"
    )
    input_reference: PictureBytes | None = Field(
        default=None,
        description="The first frame: an upload, base64 or a data: URL",
        validation_alias=AliasChoices("input_reference", "image"),
    )
    resize_mode: ResizeMode = Field(
        default="cover",
        description="When sizes differ: cover fills and crops, fit changes the asked size, exact distorts",
    )
    seconds: float | None = Field(
        default=None, gt=0, le=60, description="How long the clip plays: sets its frames a second"
    )
    size: str | None = Field(default=None, description="'auto' or WIDTHxHEIGHT")


def add_videos(app: FastAPI) -> None:
    """Give the application the routes."""
    app.add_api_route(
        "/v1/videos/sync", _sync, methods=["POST"], response_model=None, openapi_extra=taken(VideoCreate)
    )
    app.add_api_route(
        "/v1/videos", _create, methods=["POST"], response_model=None, openapi_extra=taken(VideoCreate)
    )
    app.add_api_route("/v1/videos", _list, methods=["GET"], response_model=None)
    app.add_api_route("/v1/videos/{job_id}", _show, methods=["GET"], response_model=None)
    app.add_api_route("/v1/videos/{job_id}", _remove, methods=["DELETE"], response_model=None)
    app.add_api_route("/v1/videos/{job_id}/content", _content, methods=["GET"], response_model=None)


async def _create(body: Body, idempotency_key: IdempotencyKey = None) -> Response:
    """Film a prompt or a picture, as a durable job."""
    request, warnings = _clip_of(await read_request(body, VideoCreate))
    record = await submitted(request, key=idempotency_key, warnings=warnings)
    return JSONResponse(_video(record), headers=_poll_after())


async def _sync(body: Body) -> Response:
    """The clip itself, as soon as it is made."""
    request, warnings = _clip_of(await read_request(body, VideoCreate))
    response: Response = await bentoml.get_current_service().answered(request, warnings)
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
    records = await desk.page({"task": _TASKS}, after, limit + 1, caller().sees, newest_first=order == "desc")
    return page_of([_video(record) for record in records], limit)


async def _remove(job_id: str) -> Response:
    """Cancel the video if it is not done, and remove it."""
    record = await _found(job_id)
    await bentoml.get_current_service().jobs.forget(record.id)
    return JSONResponse({"id": record.id, "object": "video.deleted", "deleted": True})


async def _content(job_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video") -> Response:
    """The clip, its first frame, or all of its frames on one sheet."""
    return await file_of(await _found(job_id), variant=None if variant == "video" else variant)


async def _found(job_id: str) -> Record:
    record = await found(job_id)
    if record.task not in _TASKS:
        raise UnknownJob(f"job {record.id} is no video")
    return record


def _clip_of(asked: VideoCreate) -> tuple[ClipRequest, tuple[str, ...]]:
    """The native request, and warnings of what has no effect in it or comes out otherwise."""
    kind: type[ClipRequest] = TextToVideo if asked.input_reference is None else ImageToVideo
    fields = {name: getattr(asked, name) for name in kind.model_fields.keys() & asked.model_fields_set}
    fields |= sides_of(asked.size, asked.width, asked.height)
    rate, warnings = _timed(asked)
    fields |= rate
    if asked.input_reference is None:
        if not asked.prompt:
            raise InvalidRequest("prompt: give a prompt, or a picture as input_reference", param="prompt")
        return TextToVideo.model_validate(fields), warnings
    fields["image"] = asked.input_reference
    ignored = [name for name in _OF_PROMPTS if getattr(asked, name)]
    told = [f"{name} is ignored: the clip is made from the picture alone" for name in ignored]
    return ImageToVideo.model_validate(fields), (*warnings, *told)


def _timed(asked: VideoCreate) -> tuple[dict[str, int], tuple[str, ...]]:
    """The rate at which the clip takes so long, and a warning where it comes out clearly otherwise.

    Models make as many frames as they were trained on; how long those play is a matter of the rate.
    """
    if asked.seconds is None:
        return {}, ()
    if asked.fps is not None:
        raise InvalidRequest("seconds: give either seconds or fps", param="seconds")
    catalog = bentoml.get_current_service().catalog
    model = model_of(asked.model, ("txt2vid", "img2vid"), catalog)
    frames = asked.num_frames or (model.defaults.clip.num_frames if model.defaults.clip else 1)
    rate = max(1, round(frames / asked.seconds))
    if rate > model.limits.max_fps:
        raise InvalidRequest(
            f"seconds: {frames} frames in {asked.seconds:g} s are more than {model.limits.max_fps} a second; "
            f"take at least {frames / model.limits.max_fps:.2g} s",
            param="seconds",
        )
    plays = frames / rate
    if abs(plays - asked.seconds) <= NEAR_ENOUGH * asked.seconds:
        return {"fps": rate}, ()
    return {"fps": rate}, (f"seconds: {frames} frames at {rate} a second play for {plays:.3g} s",)


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
        "similar_to": similar_fields(record.outputs[0].similar_to) if record.outputs else [],
        "flagged": record.outputs[0].flagged if record.outputs else None,
        "warnings": list(job.warnings),
    }
