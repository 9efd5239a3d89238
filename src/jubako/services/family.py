"""The service of one family, made from its catalog entry. Internal: the gateway is its only client."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

import bentoml
from pydantic import BaseModel, ConfigDict

from jubako.catalog import Family, load_catalog
from jubako.job import Job
from jubako.result import Progress, Result
from jubako.runs import Runs
from jubako.settings import Settings, load_settings
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


# For so many leases a durable job goes on without anybody who follows it: until another gateway has noticed
# that its own is dead, or the same has started again.
GRACE = 4


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
        traffic={"timeout": max(settings.timeout, settings.job_timeout) + TIMEOUT_MARGIN},
        runner_connection=KEEP_CONNECTIONS,
    )
    class FamilyService:
        """Runs jobs on this family's models."""

        def __init__(self) -> None:
            # The service answers at once, and takes jobs, while torch is imported: that takes seconds.
            self.starting: Future[Runner] = ThreadPoolExecutor(1, "start").submit(_started, family, settings)
            self.runs = Runs(self.generate_durable, GRACE * settings.job_lease)

        @bentoml.api
        async def generate(self, job: Job) -> Result:
            """Run one job."""
            return await (await self.runner()).generate(job)

        @bentoml.api(
            batchable=True,
            max_batch_size=family.batching.max_batch_size,
            max_latency_ms=family.batching.max_latency_ms,
        )
        async def generate_batch(self, jobs: list[Job]) -> list[Result]:
            """Run the jobs that BentoML's dispatcher collected; all are answered when the last is done."""
            runner = await self.runner()
            return list(await asyncio.gather(*(runner.generate(job) for job in jobs)))

        @bentoml.api
        async def generate_events(self, job: Job, durable: bool = False) -> AsyncGenerator[str, None]:
            """Run one job; a line of JSON a step, then one with the result.

            An empty line comes first, so that nobody waits for the first step to hear that the job is here.
            """
            yield "\n"
            events = self.runs.follow(job) if durable else _events(await self.runner(), job)
            async for event in events:
                # In ASCII: the proxy decodes chunks that may end within a letter of several bytes.
                yield event.model_dump_json(ensure_ascii=True) + "\n"

        @bentoml.api
        async def cancel_job(self, job_id: str) -> bool:
            """Stop a job before its next step; false when it is not here."""
            here = self.starting.done() and self.starting.result().cancel(job_id)
            return here or self.runs.give_up(job_id)

        @bentoml.api
        async def describe(self) -> dict[str, ModelState]:
            """The state of each model of this family."""
            runner = await self.runner()
            states = runner.states() | await runner.worker_states()
            return {name: ModelState.model_validate(asdict(state)) for name, state in states.items()}

        async def __is_ready__(self) -> bool:
            return self.starting.done() and self.starting.result().preloaded

        async def runner(self) -> Runner:
            """The runner, as soon as it is there."""
            return await asyncio.wrap_future(self.starting)

        async def generate_durable(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
            """Run one job that may outlive whoever asked for it."""
            return await (await self.runner()).generate(job, on_progress, durable=True)

        @bentoml.on_shutdown
        def finish(self) -> None:
            """Let running jobs end before the process does."""
            self.starting.result().close()

    return FamilyService


def _started(family: Family, settings: Settings) -> Runner:
    """The family's runner, with the loading of its first models begun."""
    # The libraries make half a million objects that stay: looking through them again and again costs a tenth
    # of the start. The runner looks once, and takes them for good.
    gc.disable()
    # Torch comes in here, in this family's own process, and nowhere above.
    from jubako.runner import Runner

    runner = Runner(family, settings)
    gc.enable()
    default = load_catalog(settings.catalog).default_model(settings.default_model)
    names, models = settings.preload or (default.name,), family.models
    on_disk = [n for n in names if n in models and find_weights(settings.home, models[n], models)]
    runner.preload(tuple(on_disk))
    return runner


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
