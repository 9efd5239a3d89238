"""The service of one family, made from its catalog entry. Internal: the gateway is its only client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import bentoml
from pydantic import BaseModel, ConfigDict

from jubako.catalog import load_catalog
from jubako.job import Job
from jubako.result import Progress, Result
from jubako.settings import load_settings
from jubako.weights.store import find_weights

if TYPE_CHECKING:
    from jubako.runner import Runner

__all__ = ["KEEP_CONNECTIONS", "ModelState", "family_service"]

logger = logging.getLogger(__name__)

# BentoML's proxy closes its connection pool after 100 requests or 300 s without waiting for the requests in
# flight, which then fail. The callee's setting counts, so every family carries this one.
KEEP_CONNECTIONS = {"max_requests": 10**9, "max_age": 1e9}

# BentoML's own timeout must never fire before ours: it answers, but stops nothing.
TIMEOUT_MARGIN = 60


class ModelState(BaseModel):
    """Where a model stands in its family's process; ``bytes`` is what its components take in memory."""

    model_config = ConfigDict(frozen=True)

    state: Literal["missing", "on_disk", "loading", "resident"]
    loading_fraction: float | None = None
    bytes: int = 0

    @property
    def on_disk(self) -> bool:
        """Whether its weights are here, in memory or not."""
        return self.state != "missing"

    @property
    def loaded(self) -> bool:
        """Whether it can begin with a picture at once."""
        return self.state == "resident"


def family_service(name: str) -> Any:
    """The BentoML service of a family of the catalog: its resources, its batching, its runner."""
    settings = load_settings()
    catalog = load_catalog(settings.catalog)
    family = catalog.families[name]

    @bentoml.service(
        name=family.service,
        resources=family.resources.model_dump(exclude_none=True),
        traffic={"timeout": settings.timeout + TIMEOUT_MARGIN},
        runner_connection=KEEP_CONNECTIONS,
    )
    class FamilyService:
        """Runs jobs on this family's models."""

        def __init__(self) -> None:
            # Torch comes in here, in this family's own process, and nowhere above.
            from jubako.runner import Runner

            self.runner: Runner = Runner(family, settings)
            default = catalog.default_model(settings.default_model)
            names = settings.preload or (default.name,)
            models = family.models
            on_disk = [n for n in names if n in models and find_weights(settings.home, models[n], models)]
            self.runner.preload(tuple(on_disk))

        @bentoml.api
        async def generate(self, job: Job) -> Result:
            """Run one job."""
            return await self.runner.generate(job)

        @bentoml.api(
            batchable=True,
            max_batch_size=family.batching.max_batch_size,
            max_latency_ms=family.batching.max_latency_ms,
        )
        async def generate_batch(self, jobs: list[Job]) -> list[Result]:
            """Run the jobs that BentoML's dispatcher collected; all are answered when the last is done."""
            return list(await asyncio.gather(*(self.runner.generate(job) for job in jobs)))

        @bentoml.api
        async def generate_events(self, job: Job) -> AsyncGenerator[str, None]:
            """Run one job; a line of JSON a step, then one with the result."""
            async for event in _events(self.runner, job):
                # In ASCII: the proxy decodes chunks that may end within a letter of several bytes.
                yield event.model_dump_json(ensure_ascii=True) + "\n"

        @bentoml.api
        async def cancel_job(self, job_id: str) -> bool:
            """Stop a job before its next step; false when it is not here."""
            return self.runner.cancel(job_id)

        @bentoml.api
        async def describe(self) -> dict[str, ModelState]:
            """The state of each model of this family."""
            states = self.runner.states()
            return {name: ModelState.model_validate(asdict(state)) for name, state in states.items()}

        async def __is_ready__(self) -> bool:
            return self.runner.preloaded

        @bentoml.on_shutdown
        def finish(self) -> None:
            """Let running jobs end before the process does."""
            self.runner.close()

    return FamilyService


async def _events(runner: Runner, job: Job) -> AsyncGenerator[Progress | Result, None]:
    events: asyncio.Queue[Progress | Result] = asyncio.Queue()
    work = asyncio.create_task(runner.generate(job, events.put_nowait))
    work.add_done_callback(lambda task: None if task.cancelled() else events.put_nowait(task.result()))
    try:
        while not isinstance(event := await events.get(), Result):
            yield event
        yield event
    finally:
        work.cancel()
