"""``/v1/fine_tuning/jobs``: pictures to an adapter as a durable job, in the shape of OpenAI's fine-tuning."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import bentoml
from fastapi import FastAPI, Header, Query
from starlette.requests import Request as Body
from starlette.responses import JSONResponse, Response

from jubako.errors import InvalidRequest, UnknownJob
from jubako.jobs.record import TRAINING, Event, Record, Training
from jubako.services.access import caller
from jubako.services.bodies import read_request
from jubako.services.jobs import IdempotencyKey, file_of, follow, found, page_of, told
from jubako.services.openapi import taken
from jubako.training.pictures import Accepted, accept
from jubako.training.plan import TrainingPlan, plan_training
from jubako.training.request import FineTuning, TrainingRequest
from jubako.weights.store import require_weights

__all__ = ["add_fine_tuning"]

Limit = Annotated[int, Query(ge=1, le=100)]
# Numbers of events, which OpenAI's client sends as text.
After = Annotated[int | None, Query(ge=0)]

_OF_THE_UPLOAD = {"images", "name", "keep_images"}


def add_fine_tuning(app: FastAPI) -> None:
    """Give the application the routes."""
    jobs = "/v1/fine_tuning/jobs"
    app.add_api_route(jobs, _create, methods=["POST"], response_model=None, openapi_extra=taken(FineTuning))
    app.add_api_route(jobs, _list, methods=["GET"], response_model=None)
    app.add_api_route(f"{jobs}/{{job_id}}", _show, methods=["GET"], response_model=None)
    app.add_api_route(f"{jobs}/{{job_id}}/cancel", _cancel, methods=["POST"], response_model=None)
    app.add_api_route(f"{jobs}/{{job_id}}/events", _events, methods=["GET"], response_model=None)
    app.add_api_route(f"{jobs}/{{job_id}}/checkpoints", _checkpoints, methods=["GET"], response_model=None)
    app.add_api_route(f"{jobs}/{{job_id}}/result", _result, methods=["GET"], response_model=None)


async def _create(body: Body, idempotency_key: IdempotencyKey = None) -> Response:
    """Train a model on pictures; 202 once the job can't be lost any more."""
    gateway = bentoml.get_current_service()
    asked = await read_request(body, FineTuning)
    plan, pictures, warnings = await asyncio.to_thread(_planned, asked)
    name = await asyncio.to_thread(gateway.trainings.free_name, asked.name or asked.trigger)
    training = Training(
        name=name, plan=plan.model_dump(mode="json"), keep_images=asked.keep_images, warnings=warnings
    )
    prepare = partial(gateway.trainings.prepare, plan=plan, pictures=pictures)
    record = await gateway.jobs.submit_training(
        training, _asked(asked), prepare, idempotency_key, caller().name
    )
    return JSONResponse(await _shown(record), 202, {"Location": f"/v1/fine_tuning/jobs/{record.id}"})


def _planned(asked: FineTuning) -> tuple[TrainingPlan, Sequence[Accepted], tuple[str, ...]]:
    """Whatever may stand in the way of a training is found here, before there is a job."""
    gateway = bentoml.get_current_service()
    fields = asked.model_dump(exclude=_OF_THE_UPLOAD, exclude_unset=True)
    request = TrainingRequest.model_validate(fields)
    resolution = plan_training(request, gateway.catalog).resolution
    gateway.admission.require_accepted(request.model)
    require_weights(gateway.settings.home, gateway.catalog.model(request.model))
    pictures, warnings = accept(asked.images, resolution)
    return plan_training(request, gateway.catalog, len(pictures)), pictures, warnings


def _asked(asked: FineTuning) -> bytes:
    """What was asked for, in a form that is the same for the same request."""
    fields = asked.model_dump(exclude_unset=True)
    return json.dumps(fields, sort_keys=True, default=lambda data: hashlib.sha256(data).hexdigest()).encode()


async def _list(after: str | None = None, limit: Limit = 20) -> Response:
    """Trainings, the newest first; ``after`` is the last one of the page before."""
    desk = bentoml.get_current_service().jobs
    records = await desk.page({"task": (TRAINING,)}, after, limit + 1, caller().sees)
    return page_of([await _shown(record) for record in records], limit)


async def _show(job_id: str) -> Response:
    """One training: its state, its progress, and the adapter that it has become."""
    return JSONResponse(await _shown(await _found(job_id)))


async def _cancel(job_id: str) -> Response:
    """Stop a training; nothing is left of it."""
    record = await _found(job_id)
    return JSONResponse(await _shown(await bentoml.get_current_service().jobs.cancel(record.id)))


async def _events(
    job_id: str,
    *,
    accept: Annotated[str, Header()] = "",
    last_event_id: Annotated[int, Header(ge=0)] = 0,
    after: After = None,
    limit: Limit = 20,
    order: Literal["asc", "desc"] = "desc",
) -> Response:
    """What has happened, the newest first; as it happens for who accepts ``text/event-stream``."""
    record = await _found(job_id)
    if "text/event-stream" in accept:
        return await follow(record, max(last_event_id, after or 0))
    desk = bentoml.get_current_service().jobs
    events = await desk.history(record.id, after, limit + 1, newest_first=order == "desc")
    return page_of([_event(event) for event in events], limit)


async def _checkpoints(job_id: str, after: After = None, limit: Limit = 10) -> Response:
    """The checkpoints from which it goes on, or went on, after a crash; the newest first."""
    record = await _found(job_id)
    desk = bentoml.get_current_service().jobs
    events = await desk.history(record.id, after, limit + 1, ("checkpoint",))
    return page_of([_checkpoint(event) for event in events], limit)


async def _result(job_id: str, variant: Literal["card", "sheet"] | None = None) -> Response:
    """The adapter's file, its card, or its sheet of samples."""
    return await file_of(await _found(job_id), variant=variant)


async def _found(job_id: str) -> Record:
    record = await found(job_id)
    if record.task != TRAINING:
        raise UnknownJob(f"job {record.id} is no training")
    return record


async def _shown(record: Record) -> dict[str, Any]:
    """The job in OpenAI's shape, with ours beside."""
    gateway = bentoml.get_current_service()
    training = record.work.training
    if training is None:
        raise InvalidRequest(f"job {record.id} is no training")
    position, seconds = await gateway.jobs.forecast(record)
    (last, *_) = await gateway.jobs.history(record.id, None, 1, ("progress",)) or [None]
    adapter = await asyncio.to_thread(gateway.trainings.registered, record.id)
    plan, here = training.plan, f"/v1/fine_tuning/jobs/{record.id}"
    progress: Mapping[str, Any] = last.data if last else {}
    seconds = progress.get("seconds_left", seconds) if record.state == "running" else seconds
    return {
        "id": record.id,
        "object": "fine_tuning.job",
        "status": record.state,
        "model": record.model,
        "fine_tuned_model": adapter,
        "created_at": int(record.created),
        "started_at": record.started,
        "finished_at": int(record.ended) if record.ended else None,
        "error": record.error["error"] if record.error else None,
        "hyperparameters": {"batch_size": plan["batch_size"], "n_epochs": "auto"},
        "organization_id": "",
        "result_files": [output.digest for output in record.outputs],
        "seed": plan["seed"],
        "trained_tokens": None,
        "training_file": "images",
        "validation_file": None,
        "name": training.name,
        "trigger": plan["trigger"],
        "position": position,
        "progress": round(record.progress, 4),
        "phase": progress.get("phase") if record.state == "running" else None,
        "step": plan["steps"] if record.state == "succeeded" else record.step,
        "steps": plan["steps"],
        "loss": progress.get("loss"),
        "seconds_left": None if seconds is None else round(seconds, 1),
        "settings": plan,
        "warnings": list(training.warnings),
        "links": {
            "self": here,
            "events": f"{here}/events",
            "checkpoints": f"{here}/checkpoints",
            **({"result": f"{here}/result"} if record.outputs else {}),
        },
    }


def _event(event: Event) -> dict[str, Any]:
    data = told(event)
    return {
        "id": str(event.id),
        "object": "fine_tuning.job.event",
        "created_at": int(event.at),
        "level": "error" if event.kind == "failed" else "info",
        "type": "metrics" if "loss" in data else "message",
        "message": _sentence(event.kind, data),
        "data": data,
    }


def _sentence(kind: str, data: Mapping[str, Any]) -> str:
    if kind == "failed":
        return str(data["error"]["message"])
    if kind == "progress" and data.get("phase") != "training":
        return str(data.get("message") or f"{data.get('phase')}: {data.get('done')} of {data.get('of')}")
    if "step" in data:
        return f"{kind}: step {data['step']} of {data.get('steps')}"
    return kind


def _checkpoint(event: Event) -> dict[str, Any]:
    step = event.data["step"]
    return {
        "id": str(event.id),
        "object": "fine_tuning.job.checkpoint",
        "created_at": int(event.at),
        "fine_tuned_model_checkpoint": f"{event.job_id}:{step}",
        "fine_tuning_job_id": event.job_id,
        "metrics": {"step": step, "train_loss": event.data.get("loss")},
        "step_number": step,
    }
