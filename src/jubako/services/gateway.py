"""The gateway: plans requests, routes jobs to families by model name. No torch in this process."""

from __future__ import annotations

import asyncio
import json
from typing import Any, cast

import bentoml
from PIL import Image
from starlette.responses import Response

from jubako.catalog import Model, load_catalog
from jubako.errors import JubakoError
from jubako.job import Job
from jubako.planning import plan
from jubako.result import Result
from jubako.schedulers import scheduler_names
from jubako.services.bodies import ImageToImageBody, InpaintBody, Received, TextToImageBody
from jubako.services.comparing import add_comparison
from jubako.services.connection import ErrorShape, answer
from jubako.services.families import Families
from jubako.services.family import KEEP_CONNECTIONS, TIMEOUT_MARGIN
from jubako.services.openai import openai_app
from jubako.settings import load_settings

__all__ = ["gateway_service"]


def gateway_service(**services: Any) -> Any:
    """The gateway over these family services, by family name; those in ``family_urls`` run elsewhere."""
    settings = load_settings()
    catalog = load_catalog(settings.catalog).only(settings.families)
    served = {name: service for name, service in services.items() if name in catalog.families}

    class Gateway:
        """Routes requests to the service of their model's family."""

        def __init__(self) -> None:
            self.settings = settings
            self.catalog = catalog
            work = {name: getattr(self, name) for name in served}
            control = {name: getattr(self, _control(name)) for name in served}
            self.families = Families(work, control, catalog, settings)
            self.started = False

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

        @bentoml.api
        async def models(self) -> list[dict[str, Any]]:
            """Every model of the catalog, with its limits, licence and state."""
            return await self.model_list()

        async def model_list(self) -> list[dict[str, Any]]:
            """The models in OpenAI's shape with our keys beside."""
            states = await self.families.states()
            return [_listed(model, states.get(model.name)) for model in catalog]

        async def _picture(self, request: Received) -> Image.Image:
            try:
                response = await self._response(request)
            except JubakoError as error:
                response = answer(error)
            # BentoML passes a Response on as it is; the annotations are what its clients go by.
            return cast("Image.Image", response)

        async def _response(self, request: Received) -> Response:
            if isinstance(request, JubakoError):
                raise request
            # Decoding and scaling a picture would hold up everyone else on the event loop.
            job = await asyncio.to_thread(plan, request, catalog, settings.default_model)
            result = await self.families.run(job)
            return Response(result.content, 200, _headers(job, result), result.content_type)

        async def __is_ready__(self) -> bool:
            ready = await self.families.ready()
            default = catalog.default_model(settings.default_model).family
            # The first time with the model that most requests mean. From then on one family that loads or is
            # down must not take the others away.
            self.started = self.started or ready.get(default, any(ready.values()))
            return self.started and any(ready.values())

    for name, service in served.items():
        url = settings.family_urls.get(name)
        # A proxy holds 100 connections. Cancels and probes have a proxy of their own: when that many pictures
        # are waited for, they must not wait as well.
        setattr(Gateway, name, bentoml.depends(service, url=url))
        setattr(Gateway, _control(name), bentoml.depends(service, url=url))
    gateway = bentoml.service(
        name="Gateway",
        traffic={"timeout": settings.timeout + 2 * TIMEOUT_MARGIN},
        runner_probe={"enabled": False},
        runner_connection=KEEP_CONNECTIONS,
    )(Gateway)
    app = openai_app()
    add_comparison(app)
    gateway.mount_asgi_app(app, path="/", name="openai")
    gateway.add_asgi_middleware(ErrorShape)
    return gateway


def _headers(job: Job, result: Result) -> dict[str, str]:
    timings = result.timings.model_dump() if result.timings else {}
    headers = {
        "X-Seed": str(result.seed),
        "X-Job-Id": result.job_id,
        "Server-Timing": ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in timings.items()),
        "Content-Disposition": f'inline; filename="{result.job_id}.{job.output_format}"',
    }
    if job.warnings:
        headers["X-Warnings"] = json.dumps(job.warnings)
    return headers


def _control(family: str) -> str:
    return f"{family}_control"


def _listed(model: Model, state: Any) -> dict[str, Any]:
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
        "licence": model.licence.model_dump(),
        "gated": model.gated,
        "schedulers": scheduler_names(model.flow),
        "state": state.state if state else None,
        "loading_fraction": state.loading_fraction if state else None,
        "bytes": state.bytes if state else None,
        "on_disk": state.on_disk if state else None,
        "loaded": state.loaded if state else None,
    }
