"""The one way in: every route, synchronous or durable, has its request made into jobs here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from jubako.adapters.store import AdapterStore
from jubako.catalog import Catalog
from jubako.errors import FamilyUnavailable
from jubako.images import ImagesRequest, plan_images
from jubako.job import Job
from jubako.planning import AnyRequest, plan
from jubako.settings import Settings

__all__ = ["Admission"]


class Admission:
    """Turns requests into jobs that can be run here, or refuses them before anything is queued."""

    def __init__(
        self,
        catalog: Catalog,
        settings: Settings,
        adapters: AdapterStore,
        served: frozenset[str],
        require_any_room: Callable[[str], None],
    ) -> None:
        self._catalog = catalog
        self._default_model = settings.default_model
        self._adapters = adapters
        self._served = served
        self._require_any_room = require_any_room

    async def job(self, request: AnyRequest, *, durable: bool = False) -> Job:
        """The request's job; raises as :func:`jubako.planning.plan`, or FamilyUnavailable, or Overloaded.

        What is ``durable`` may wait.
        """
        if not durable:
            self._glance(request)
        # Decoding and scaling a picture would hold up everyone else on the event loop.
        job = await asyncio.to_thread(plan, request, self._catalog, self._default_model)
        self.require_served(job)
        automatic = getattr(request, "loras", ()) is None
        return await asyncio.to_thread(self._bound, job, automatic)

    async def pictures(self, request: ImagesRequest) -> list[Job]:
        """The jobs of one of OpenAI's requests for pictures."""
        self._glance(request)
        jobs = await asyncio.to_thread(plan_images, request, self._catalog, self._default_model)
        self.require_served(jobs[0])
        automatic = request.loras is None
        return await asyncio.to_thread(lambda: [self._bound(job, automatic) for job in jobs])

    def _glance(self, request: AnyRequest | ImagesRequest) -> None:
        """Refuse what could not be run anyway before a picture of it is decoded."""
        family = (
            self._catalog.model(request.model).family
            if request.model
            else self._catalog.default_model(self._default_model).family
        )
        self._require_any_room(family)

    def _bound(self, job: Job, automatic: bool) -> Job:
        """The job with its adapters, bound to what their names stand for now."""
        return self._adapters.resolved(self._adapters.with_triggered(job) if automatic else job)

    def require_served(self, job: Job) -> None:
        """Refuse a job of a family that this gateway does not reach."""
        if job.family not in self._served:
            raise FamilyUnavailable(
                f"model: the family {job.family} of {job.model} is not served here; served: "
                f"{', '.join(sorted(self._served))}",
                param="model",
            )
        if job.source is not None:
            self.require_served(job.source)
