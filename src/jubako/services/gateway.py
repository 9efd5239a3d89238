"""The gateway: plans requests, routes jobs to families by model name. No torch in this process."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import bentoml
from PIL import Image
from starlette.responses import Response

from jubako.adapters.store import AdapterStore
from jubako.catalog import Model, load_catalog
from jubako.errors import JubakoError
from jubako.job import Job
from jubako.jobs.record import Similar
from jubako.licences import is_accepted, require_known_licences
from jubako.planning import REQUESTS
from jubako.result import Result
from jubako.schedulers import scheduler_names
from jubako.services.access import Access, owner
from jubako.services.adapters import add_adapters
from jubako.services.admission import Admission
from jubako.services.bodies import (
    EmptyBody,
    ImageToImageBody,
    ImageToMeshBody,
    ImageToVideoBody,
    InpaintBody,
    Received,
    TextToImageBody,
    TextToMeshBody,
    TextToVideoBody,
)
from jubako.services.comparing import add_comparison
from jubako.services.connection import ErrorShape, answer
from jubako.services.families import Families
from jubako.services.family import GRACE, KEEP_CONNECTIONS, TIMEOUT_MARGIN
from jubako.services.fine_tuning import add_fine_tuning
from jubako.services.headers import BrowserHeaders
from jubako.services.jobs import add_jobs
from jubako.services.openai import openai_app, similar_fields
from jubako.services.openapi import add_document
from jubako.services.remote_replicas import RemoteReplicas
from jubako.services.replicas import Replicas, beside
from jubako.services.stopping import Farewell, Stopping
from jubako.services.supervision import supervise
from jubako.services.telemetry import RequestId, observe
from jubako.services.videos import add_videos
from jubako.settings import load_settings

__all__ = ["gateway_service"]


def gateway_service(**services: Any) -> Any:
    """The gateway over these family services, by family name; those in ``family_urls`` run elsewhere."""
    supervise()
    settings = load_settings()
    observe(settings)
    known = load_catalog(settings.catalog)
    require_known_licences(settings, known)
    catalog = known.only(settings.families)
    served = {name: service for name, service in services.items() if name in catalog.families}

    stopping = Stopping(settings.stop_delay, settings.stop_grace)

    class Gateway:
        """Routes requests to the service of their model's family."""

        def __init__(self) -> None:
            # Each family's process imports this module as well, and has no use for a database.
            from jubako.jobs.desk import JobDesk
            from jubako.training.trainings import Trainings

            self.settings = settings
            self.catalog = catalog
            self.families = Families({name: self._replicas(name) for name in served}, catalog, settings)
            self.adapters = AdapterStore(settings.home)
            self.admission = Admission(
                catalog,
                settings,
                self.adapters,
                frozenset(served),
                self.families,
                known=known,
            )
            self.trainings = Trainings(settings, self.adapters, lambda: self.families.busy)
            self.jobs = JobDesk(settings, catalog, self.families, self.trainings)
            self.started = False

        def _replicas(self, family: str) -> Replicas:
            key = settings.family_key
            if urls := settings.family_urls.get(family):
                grace = GRACE * settings.job_lease
                return RemoteReplicas(family, urls, served[family], key, grace)
            return beside(family, getattr(self, family), getattr(self, _control(family)), key)

        @bentoml.api(input_spec=TextToImageBody)
        async def txt2img(self, request: Received) -> Image.Image:
            """A prompt's picture. Its seed and timings are in the headers and in the file."""
            return await self._picture(request)

        @bentoml.api(input_spec=ImageToImageBody)
        async def img2img(self, request: Received) -> Image.Image:
            """A picture made from another one and a prompt."""
            return await self._picture(request)

        @bentoml.api(input_spec=InpaintBody)
        async def inpaint(self, request: Received) -> Image.Image:
            """A picture of which the masked area is made anew."""
            return await self._picture(request)

        @bentoml.api(input_spec=ImageToVideoBody)
        async def img2vid(self, request: Received) -> Path:
            """A clip made from a picture."""
            return await self._file(request)

        @bentoml.api(input_spec=TextToVideoBody)
        async def txt2vid(self, request: Received) -> Path:
            """A clip made from a prompt, by way of a picture where the model reads no text."""
            return await self._file(request)

        @bentoml.api(input_spec=ImageToMeshBody)
        async def img2mesh(self, request: Received) -> Path:
            """A 3D object made from a picture."""
            return await self._file(request)

        @bentoml.api(input_spec=TextToMeshBody)
        async def txt2mesh(self, request: Received) -> Path:
            """A 3D object made from a prompt."""
            return await self._file(request)

        @bentoml.api(input_spec=EmptyBody)
        async def models(self, request: Received) -> list[dict[str, Any]]:
            """Every model of the catalog, with its limits, licence and state."""
            if isinstance(request, JubakoError):
                return cast("list[dict[str, Any]]", answer(request))
            return await self.model_list()

        async def model_list(self) -> list[dict[str, Any]]:
            """The models in OpenAI's shape with our keys beside."""
            states = await self.families.states()
            return [
                _listed(model, is_accepted(model.licence, settings), states.get(model.name))
                for model in catalog
            ]

        async def _picture(self, request: Received) -> Image.Image:
            # BentoML passes a Response on as it is; the annotations are what its clients go by.
            return cast("Image.Image", await self._response(request))

        async def _file(self, request: Received) -> Path:
            return cast("Path", await self._response(request))

        async def _response(self, request: Received) -> Response:
            try:
                return await self.answered(request)
            except JubakoError as error:
                return answer(error)

        async def answered(self, request: Received, warnings: tuple[str, ...] = ()) -> Response:
            """The file that was asked for, as soon as it is made; raises what stands in the way."""
            if isinstance(request, JubakoError):
                raise request
            job = _alone(await self.admission.job(request))
            job = job.model_copy(update={"warnings": (*job.warnings, *warnings)})
            promise = self.families.require_room([job])
            result = await self.families.run(job)
            (alike,) = await self.jobs.alike([result], owner())
            headers = _headers(job, result, promise, alike)
            return Response(result.content, 200, headers, result.content_type)

        @bentoml.on_startup
        async def open_jobs(self) -> None:
            """Begin to run durable jobs, on the event loop that the families are reached from."""
            await self.families.open()
            await self.jobs.open()
            stopping.heed(lambda: self.families.busy, refuse=self._refuse, abort=self._abort)

        def _refuse(self) -> None:
            self.families.refuse()
            self.jobs.pause()

        def _abort(self) -> None:
            self.families.abort()
            self.jobs.end_streams()

        @bentoml.on_shutdown
        async def close_jobs(self) -> None:
            """Leave what runs as begun."""
            await self.jobs.close()
            await self.families.close()

        async def __is_ready__(self) -> bool:
            if stopping.begun:
                return False
            ready = await self.families.ready()
            default = catalog.default_model(settings.default_model).family
            # The first time with the model that most requests mean. From then on one family that loads or is
            # down must not take the others away.
            self.started = self.started or ready.get(default, any(ready.values()))
            return self.started and any(ready.values())

    for name, service in served.items():
        if name not in settings.family_urls:
            setattr(Gateway, name, bentoml.depends(service))
            setattr(Gateway, _control(name), bentoml.depends(service))
    gateway = bentoml.service(
        name="Gateway",
        traffic={"timeout": settings.timeout + 2 * TIMEOUT_MARGIN},
        runner_probe={"enabled": False},
        runner_connection=KEEP_CONNECTIONS,
    )(Gateway)
    app = openai_app()
    add_comparison(app)
    add_jobs(app)
    add_fine_tuning(app)
    add_videos(app)
    add_adapters(app)
    add_document(app, {f"/{task}": kind for task, kind in REQUESTS.items()})
    gateway.mount_asgi_app(app, path="/", name="openai")
    gateway.add_asgi_middleware(RequestId)
    gateway.add_asgi_middleware(Farewell, stopping=stopping)
    gateway.add_asgi_middleware(BrowserHeaders)
    gateway.add_asgi_middleware(ErrorShape)
    gateway.add_asgi_middleware(
        Access, keys=settings.keys, public=settings.public_without_keys, hosts=settings.allowed_hosts
    )
    return gateway


def _alone(job: Job) -> Job:
    """The job without what would come beside its one file."""
    if job.solid is None or not job.solid.turntable or job.output_format not in {"glb", "obj"}:
        return job
    told = "turntable is ignored: one file is answered with; submit a job, or ask for mp4 or gif"
    solid = job.solid.model_copy(update={"turntable": False})
    return job.model_copy(update={"solid": solid, "warnings": (*job.warnings, told)})


def _headers(job: Job, result: Result, promise: float | None, alike: Sequence[Similar]) -> dict[str, str]:
    timings = result.timings.model_dump() if result.timings else {}
    headers = {
        "X-Seed": str(result.seed),
        "X-Job-Id": result.job_id,
        "Server-Timing": ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in timings.items()),
        "Content-Disposition": f'inline; filename="{result.job_id}.{job.output_format}"',
    }
    if promise is not None:
        headers["X-Promised-Seconds"] = f"{promise:.1f}"
    if result.flagged is not None:
        headers["X-Flagged"] = str(result.flagged).lower()
    if alike:
        headers["X-Similar-To"] = json.dumps(similar_fields(alike))
    if job.warnings:
        headers["X-Warnings"] = json.dumps(job.warnings)
    return headers


def _control(family: str) -> str:
    return f"{family}_control"


def _listed(model: Model, accepted: bool, state: Any) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": 0,
        "owned_by": model.weights.repo.split("/")[0] if model.weights.repo else "jubako",
        "title": model.title,
        "family": model.family,
        "tasks": model.tasks,
        "defaults": model.defaults.model_dump(),
        "limits": model.limits.model_dump(),
        "parameters": model.parameters,
        "memory_gb": model.memory_gb,
        "licence": model.licence.model_dump() | {"accepted": accepted},
        "gated": model.gated,
        "schedulers": scheduler_names(model.flow),
        "state": state.state if state else None,
        "loading_fraction": state.loading_fraction if state else None,
        "bytes": state.bytes if state else None,
        "on_disk": state.on_disk if state else None,
        "loaded": state.loaded if state else None,
        "weights": state.weights if state else None,
        "precision": state.precision if state else None,
        "rejected": state.rejected if state else (),
        "reason": state.reason if state else None,
    }
