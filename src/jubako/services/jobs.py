"""``/v1/jobs``: any request as a durable job, to be asked about, followed, cancelled and fetched."""

from __future__ import annotations

import base64
import hashlib
import json
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Annotated, Any, Literal

import bentoml
from fastapi import FastAPI, Header, Query
from pydantic import Field
from starlette.requests import Request as Body
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse

from jubako.errors import InvalidRequest, JobNotDone, ResultGone, nearest
from jubako.jobs.record import Event, JobState, Kept, Output, Record, Work, stages_of
from jubako.media import MEDIA_TYPES
from jubako.planning import REQUESTS, AnyRequest
from jubako.request import Request, Task, TextToImage
from jubako.services.access import caller
from jubako.services.bodies import read_request_of
from jubako.services.openai import similar_fields
from jubako.services.openapi import taken

__all__ = ["IdempotencyKey", "add_jobs", "file_of", "follow", "found", "page_of", "submitted", "told"]

COMMENT_SECONDS = 15
# How long a client waits before it connects again, in milliseconds.
RETRY_MS = 1000

_SUFFIXES = {media_type: suffix for suffix, media_type in MEDIA_TYPES.items()}
_FILTERS = ("state", "task", "family", "model")

IdempotencyKey = Annotated[str | None, Header(min_length=1, max_length=255)]


class _Envelope(Request):
    """What a job's body has beside the fields of its task."""

    task: Task
    n: int = Field(default=1, gt=0, description="Pictures; their seeds count up from the first")


def add_jobs(app: FastAPI) -> None:
    """Give the application the routes."""
    app.add_api_route(
        "/v1/jobs",
        _submit,
        methods=["POST"],
        response_model=None,
        openapi_extra=taken(*REQUESTS.values(), envelope=_Envelope),
    )
    app.add_api_route("/v1/jobs", _list, methods=["GET"], response_model=None)
    app.add_api_route("/v1/jobs/{job_id}", _show, methods=["GET"], response_model=None)
    app.add_api_route("/v1/jobs/{job_id}", _cancel, methods=["DELETE"], response_model=None)
    app.add_api_route("/v1/jobs/{job_id}/events", _follow, methods=["GET"], response_model=None)
    app.add_api_route("/v1/jobs/{job_id}/result", _result, methods=["GET"], response_model=None)


async def _submit(body: Body, idempotency_key: IdempotencyKey = None) -> Response:
    """Record a request of any task as a job; 202 once it can't be lost any more."""
    envelope, request = await read_request_of(body, _Envelope, _kind)
    record = await submitted(request, envelope.n, idempotency_key)
    return JSONResponse(await _shown(record), 202, {"Location": f"/v1/jobs/{record.id}"})


def _kind(envelope: _Envelope) -> type[AnyRequest]:
    return REQUESTS[envelope.task]


async def submitted(
    request: AnyRequest, n: int = 1, key: str | None = None, warnings: tuple[str, ...] = ()
) -> Record:
    """The durable job of a request; the same key gives the same job again."""
    gateway = bentoml.get_current_service()
    job = await gateway.admission.job(request, durable=True)
    job = job.model_copy(update={"warnings": (*job.warnings, *warnings)})
    limit = gateway.catalog.model(job.model).limits.max_n if isinstance(request, TextToImage) else 1
    if n > limit:
        raise InvalidRequest(f"n: {n} is past the limit of {limit} for {job.task} by {job.model}", param="n")
    jobs = job.siblings(n) if n > 1 else [job]
    record: Record = await gateway.jobs.submit(jobs, _asked(request, n), key, caller().name)
    return record


async def found(job_id: str) -> Record:
    """The job, if the caller may see it; else there is none, as if there never had been."""
    record: Record = await bentoml.get_current_service().jobs.find(job_id, caller().sees)
    return record


def _asked(request: AnyRequest, n: int) -> bytes:
    """What was asked for, in a form that is the same for the same request."""
    fields = {"task": request.task, "n": n, **request.model_dump(exclude_unset=True)}
    return json.dumps(fields, sort_keys=True, default=lambda data: hashlib.sha256(data).hexdigest()).encode()


async def _list(
    body: Body,
    *,
    state: JobState | None = None,
    task: Task | Literal["training"] | None = None,
    family: str | None = None,
    model: str | None = None,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """Jobs, the newest first; ``after`` is the last one of the page before."""
    known = (*_FILTERS, "after", "limit", "order")
    for name in body.query_params:
        if name not in known:
            raise InvalidRequest(
                f"unknown parameter {name!r}.{nearest(name, known)} Known: {', '.join(known)}", param=name
            )
    asked = dict(zip(_FILTERS, (state, task, family, model), strict=True))
    filters = {name: (value,) for name, value in asked.items() if value is not None}
    desk = bentoml.get_current_service().jobs
    records = await desk.page(filters, after, limit + 1, caller().sees, newest_first=order == "desc")
    return page_of([await _shown(record) for record in records], limit)


def page_of(entries: Sequence[Mapping[str, Any]], limit: int) -> Response:
    """A page in OpenAI's shape, of entries of which one more than the page has was asked for."""
    page = entries[:limit]
    return JSONResponse(
        {
            "object": "list",
            "data": page,
            "first_id": page[0]["id"] if page else None,
            "last_id": page[-1]["id"] if page else None,
            "has_more": len(entries) > limit,
        }
    )


async def _show(job_id: str) -> Response:
    """One job: its state, its place in the queue, its progress, its result."""
    record = await found(job_id)
    return JSONResponse(await _shown(record), headers={"openai-poll-after-ms": str(RETRY_MS)})


async def _cancel(job_id: str) -> Response:
    """Cancel a job that waits or runs."""
    record = await bentoml.get_current_service().jobs.cancel((await found(job_id)).id)
    return JSONResponse(await _shown(record))


async def _follow(
    job_id: str, last_event_id: Annotated[int, Header(ge=0)] = 0, after: Annotated[int, Query(ge=0)] = 0
) -> Response:
    """The job's events as they happen; with ``Last-Event-ID``, those that came after."""
    record = await found(job_id)
    return await follow(record, max(last_event_id, after))


async def follow(record: Record, seen: int) -> Response:
    """A job's events behind the one of that number, as server-sent events."""
    desk = bentoml.get_current_service().jobs
    if record.is_over and seen and not await desk.missed(record.id, seen):
        # To an EventSource, which would connect again and again, this says that there is no more to come.
        return Response(status_code=204)
    return StreamingResponse(
        _stream(desk.events(record.id, seen)),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
    )


async def _stream(events: AsyncGenerator[Event | None, None]) -> AsyncGenerator[str, None]:
    yield ": events follow\n\n"
    spoken, retry = time.monotonic(), f"retry: {RETRY_MS}\n"
    async for event in events:
        if event is not None:
            spoken = time.monotonic()
            yield f"{retry}id: {event.id}\nevent: {event.kind}\ndata: {json.dumps(told(event))}\n\n"
            retry = ""
        elif time.monotonic() - spoken > COMMENT_SECONDS:
            spoken = time.monotonic()
            yield ": still there\n\n"


def told(event: Event) -> dict[str, Any]:
    """An event as clients see it."""
    data = dict(event.data)
    if "stage" in data:
        data["stage"] += 1
    if preview := data.pop("preview", None):
        data["preview"] = {"content_type": "image/jpeg", "b64_json": preview}
    if event.kind == "completed":
        data["result"] = f"/v1/jobs/{event.job_id}/result"
    return {"type": event.kind, "job_id": event.job_id, "at": event.at, **data}


async def _result(
    job_id: str, index: Annotated[int | None, Query(ge=0)] = None, variant: str | None = None
) -> Response:
    """The picture, clip or object itself; of several pictures OpenAI's JSON, or one by its index."""
    desk = bentoml.get_current_service().jobs
    record = await found(job_id)
    if index is None and variant is None and len(record.outputs) > 1:
        _require_result(record)
        data = [_entry(output, await desk.content(output)) for output in record.outputs]
        return JSONResponse({"created": int(record.ended or 0), "data": data, "model": record.model})
    return await file_of(record, index or 0, variant)


def _entry(output: Output, content: bytes) -> dict[str, Any]:
    return {
        "b64_json": base64.b64encode(content).decode(),
        "seed": output.seed,
        "similar_to": similar_fields(output.similar_to),
        "flagged": output.flagged,
    }


async def file_of(record: Record, index: int = 0, variant: str | None = None) -> Response:
    """One file of a job's result; raises what stands in the way."""
    _require_result(record)
    if index >= len(record.outputs):
        raise InvalidRequest(f"index: the result has {len(record.outputs)} files, from 0", param="index")
    output = record.outputs[index]
    kept: Kept = output
    if variant is not None:
        if variant not in output.variants:
            there = ", ".join(output.variants) or "none"
            raise InvalidRequest(f"variant: there is no {variant!r}; there are: {there}", param="variant")
        kept = output.variants[variant]
    path = await bentoml.get_current_service().jobs.file(kept)
    name = "-".join(filter(None, (record.id, str(index) if index else None, variant)))
    headers = {"X-Seed": str(output.seed), "X-Job-Id": record.id}
    return FileResponse(
        path,
        headers=headers,
        media_type=kept.content_type,
        filename=f"{name}.{_SUFFIXES[kept.content_type]}",
        content_disposition_type="inline",
    )


def _require_result(record: Record) -> None:
    if record.state != "succeeded":
        raise JobNotDone(f"the job is {record.state}; only one that has succeeded has a result")
    if record.expired:
        raise ResultGone("the result was removed to make room for newer ones")


async def _shown(record: Record) -> dict[str, Any]:
    """The job as clients see it."""
    position, seconds = await bentoml.get_current_service().jobs.forecast(record)
    stages = stages_of(record.work)
    stage = stages[record.stage]
    steps = record.steps or stage.steps
    here = f"/v1/jobs/{record.id}"
    return {
        "id": record.id,
        "object": "job",
        "state": record.state,
        "task": record.task,
        "model": record.model,
        "family": record.family,
        "created_at": record.created,
        "started_at": record.started,
        "ended_at": record.ended,
        "position": position,
        "progress": round(record.progress, 4),
        # The last steps are not written down on their own: the result comes with them.
        "step": steps if record.state == "succeeded" else record.step,
        "steps": steps,
        "stage": {"number": record.stage + 1, "of": len(stages), "task": stage.task, "model": stage.model},
        "seconds_left": None if seconds is None else round(seconds, 1),
        **_asked_for(record.work),
        "outputs": [_described(output, i, here) for i, output in enumerate(record.outputs)],
        "links": _links(record, here),
        "error": record.error["error"] if record.error else None,
    }


def _asked_for(work: Work) -> dict[str, Any]:
    """What is set of its first job; its id and its source's are nobody's business but the families'."""
    if work.training is not None:
        plan = work.training.plan
        return {"request": plan, "seeds": [plan["seed"]], "warnings": list(work.training.warnings)}
    first = work.jobs[0]
    fields = first.described()
    del fields["id"]
    fields.get("source", {}).pop("id", None)
    fields |= {f"{name}_sha256": digest for name, digest in work.pictures.items()}
    return {
        "request": fields,
        "seeds": [job.seed for job in work.jobs],
        "warnings": list(first.warnings),
    }


def _described(output: Output, index: int, here: str) -> dict[str, Any]:
    where = f"{here}/result?index={index}"
    return {
        "index": index,
        "seed": output.seed,
        "content_type": output.content_type,
        "bytes": output.bytes,
        "sha256": output.digest,
        "url": where,
        "variants": {
            name: {
                "content_type": kept.content_type,
                "bytes": kept.bytes,
                "url": f"{where}&variant={name}",
            }
            for name, kept in output.variants.items()
        },
        "timings": output.timings.model_dump() if output.timings else None,
        "similar_to": similar_fields(output.similar_to),
        "flagged": output.flagged,
    }


def _links(record: Record, here: str) -> Mapping[str, str]:
    done = {"result": f"{here}/result"} if record.state == "succeeded" and not record.expired else {}
    return {"self": here, "events": f"{here}/events", **done}
