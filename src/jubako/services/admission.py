"""The one way in: every route, synchronous or durable, has its request made into jobs here."""

from __future__ import annotations

import asyncio

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

    def __init__(self, catalog: Catalog, settings: Settings, served: frozenset[str]) -> None:
        self._catalog = catalog
        self._default_model = settings.default_model
        self._adapters = AdapterStore(settings.home)
        self._served = served

    async def job(self, request: AnyRequest) -> Job:
        """The request's job; raises as :func:`jubako.planning.plan` does, or FamilyUnavailable."""
        # Decoding and scaling a picture would hold up everyone else on the event loop.
        job = await asyncio.to_thread(plan, request, self._catalog, self._default_model)
        self.require_served(job)
        automatic = getattr(request, "loras", ()) is None
        return await asyncio.to_thread(self._bound, job, automatic)

    async def pictures(self, request: ImagesRequest) -> list[Job]:
        """The jobs of one of OpenAI's requests for pictures."""
        jobs = await asyncio.to_thread(plan_images, request, self._catalog, self._default_model)
        self.require_served(jobs[0])
        automatic = request.loras is None
        return await asyncio.to_thread(lambda: [self._bound(job, automatic) for job in jobs])

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
