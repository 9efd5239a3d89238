"""The gateway: plans requests, routes jobs to families by model name. No torch in this process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import bentoml
from PIL import Image
from starlette.responses import Response

from jubako.catalog import Model, load_catalog
from jubako.errors import JubakoError
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.schedulers import scheduler_names
from jubako.services.connection import ErrorShape, answer
from jubako.services.families import Families
from jubako.services.family import KEEP_CONNECTIONS, TIMEOUT_MARGIN
from jubako.services.openai import openai_app
from jubako.settings import load_settings

__all__ = ["gateway_service"]


class _TextToImageInput(TextToImage, bentoml.IODescriptor):
    """The request as BentoML's flat body, so that its clients take the fields as keyword arguments."""


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

        @bentoml.api(input_spec=_TextToImageInput)
        async def txt2img(self, **fields: Any) -> Image.Image:
            """A prompt's picture. Its seed and timings are in the headers and in the file."""
            try:
                response = await self._txt2img(fields)
            except JubakoError as error:
                response = answer(error)
            # BentoML passes a Response on as it is; the annotation is what its clients go by.
            return cast("Image.Image", response)

        @bentoml.api
        async def models(self) -> list[dict[str, Any]]:
            """Every model of the catalog, with its limits, licence and state."""
            return await self.model_list()

        async def model_list(self) -> list[dict[str, Any]]:
            """The models in OpenAI's shape with our keys beside."""
            states = await self.families.states()
            return [_listed(model, states.get(model.name)) for model in catalog]

        async def _txt2img(self, fields: Mapping[str, Any]) -> Response:
            given = {name: value for name, value in fields.items() if value is not None}
            job = plan(TextToImage.model_validate(given), catalog, settings.default_model)
            result = await self.families.run(job)
            timings = result.timings.model_dump() if result.timings else {}
            measured = ", ".join(f"{name};dur={1000 * seconds:.1f}" for name, seconds in timings.items())
            headers = {
                "X-Seed": str(result.seed),
                "X-Job-Id": result.job_id,
                "Server-Timing": measured,
                "Content-Disposition": f'inline; filename="{result.job_id}.{job.output_format}"',
            }
            return Response(result.content, 200, headers, result.content_type)

        async def __is_ready__(self) -> bool:
            # One family that loads or is down must not take the others away.
            return any((await self.families.ready()).values())

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
    gateway.mount_asgi_app(openai_app(), path="/", name="openai")
    gateway.add_asgi_middleware(ErrorShape)
    return gateway


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
        "licence": model.licence.model_dump(),
        "gated": model.gated,
        "schedulers": scheduler_names(),
        "on_disk": state.on_disk if state else None,
        "loaded": state.loaded if state else None,
    }
