"""The one way in: every route, synchronous or durable, has its request made into jobs here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar

from jubako.adapters.store import KINDS, AdapterStore
from jubako.catalog import Catalog
from jubako.compare import Cell, Comparison, plan_comparison
from jubako.errors import FamilyUnavailable, InvalidRequest
from jubako.images import ImagesRequest, plan_images
from jubako.job import Job
from jubako.licences import require_accepted
from jubako.planning import AnyRequest, plan
from jubako.settings import Settings

__all__ = ["Admission", "Room"]

R = TypeVar("R", bound=AnyRequest | ImagesRequest)
P = TypeVar("P")


class Room(Protocol):
    """Who knows how much waits already; both raise Overloaded."""

    def require_room(self, jobs: Sequence[Job]) -> object:
        """Refuse jobs that would be done too late."""

    def require_any_room(self, family: str) -> None:
        """Refuse when not even the smallest job would be done in time."""


class Admission:
    """Turns requests into jobs that can be run here, or refuses them before anything is queued."""

    def __init__(
        self,
        catalog: Catalog,
        settings: Settings,
        adapters: AdapterStore,
        served: frozenset[str],
        room: Room,
        *,
        known: Catalog,
    ) -> None:
        """``catalog`` is what is served here; ``known`` has the other families too."""
        self._catalog, self._known = catalog, known
        self._settings = settings
        self._default_model = settings.default_model
        self._adapters = adapters
        self._served = served
        self._room = room

    async def job(self, request: AnyRequest, *, durable: bool = False) -> Job:
        """The request's job; raises as :func:`jubako.planning.plan`, or FamilyUnavailable, or Overloaded.

        What is ``durable`` may wait.
        """
        if not durable:
            self._glance(request)
        job = await self._planned(plan, request)
        self._require_allowed(job)
        if not durable:
            self._room.require_room([job])
        return await asyncio.to_thread(self._bound, job, request)

    async def pictures(self, request: ImagesRequest) -> list[Job]:
        """The jobs of one of OpenAI's requests for pictures."""
        self._glance(request)
        jobs = await self._planned(plan_images, request)
        self._require_allowed(jobs[0])
        self._room.require_room(jobs)
        return await asyncio.to_thread(lambda: [self._bound(job, request) for job in jobs])

    async def comparison(self, request: Comparison) -> list[list[Cell]]:
        """The jobs of a comparison, a row a model."""
        rows = await asyncio.to_thread(plan_comparison, request, self._catalog)
        for row in rows:
            self._require_allowed(row[0].job)
        self._room.require_room([cell.job for row in rows for cell in row])
        return await asyncio.to_thread(
            lambda: [[replace(cell, job=self._bound(cell.job, request)) for cell in row] for row in rows]
        )

    def require_accepted(self, model: str) -> None:
        """Refuse a model whose licence nobody has accepted here."""
        require_accepted(model, self._catalog.model(model).licence, self._settings)

    def _require_allowed(self, job: Job) -> None:
        """Refuse a job of a family that this gateway does not reach, or of a model that it may not serve."""
        if job.family not in self._served:
            raise FamilyUnavailable(
                f"model: the family {job.family} of {job.model} is not served here; served: "
                f"{', '.join(sorted(self._served))}",
                param="model",
            )
        self.require_accepted(job.model)
        if job.refinement is not None:
            self.require_accepted(job.refinement.model)
        if job.source is not None:
            self._require_allowed(job.source)

    def _glance(self, request: AnyRequest | ImagesRequest) -> None:
        """Refuse what could not be run anyway before a picture of it is decoded."""
        family = (
            self._catalog.model(request.model).family
            if request.model
            else self._catalog.default_model(self._default_model).family
        )
        self._room.require_any_room(family)

    async def _planned(self, planned: Callable[[R, Catalog, str | None], P], request: R) -> P:
        if not request.holds_files:
            # A refusal must be cheap, and a thread costs more than this.
            return planned(request, self._catalog, self._default_model)
        # Decoding and scaling a picture would hold up everyone else on the event loop.
        return await asyncio.to_thread(planned, request, self._catalog, self._default_model)

    def _bound(self, job: Job, request: AnyRequest | ImagesRequest | Comparison) -> Job:
        """The job with its adapters bound to the content that their names stand for now.

        Of a kind of which none is asked for, and none refused, it has those whose trigger is in its prompt.
        """
        if automatic := [kind for kind in KINDS if getattr(request, f"{kind}s", ()) is None]:
            job = self._adapters.with_triggered(job, automatic)
        for each in filter(None, (job, job.source)):
            for use in each.loras:
                self._require_fitting(use.name, each)
        return self._adapters.resolved(job)

    def _require_fitting(self, name: str, job: Job) -> None:
        """Refuse an adapter that is for another family as far as its card says, or was not fetched."""
        here, entry = self._adapters.named(name), self._known.adapters.get(name)
        base = here.base if here else entry.base[0] if entry else None
        family = self._known.model(base).family if base in self._known.names else job.family
        if family != job.family:
            raise InvalidRequest(
                f"loras: {name} was made for {base} of the family {family}; {job.model} is of {job.family}",
                param="loras",
            )
        if here is None and entry is not None:
            raise InvalidRequest(
                f"loras: {name} is not on this machine; fetch it with: jubako pull {name}", param="loras"
            )
