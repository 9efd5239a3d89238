"""The service of one family, made from its catalog entry. Internal: the gateway is its only client."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextvars import Context
from dataclasses import asdict
from importlib import import_module
from typing import Any, Literal

import bentoml
from pydantic import BaseModel, ConfigDict

from jubako import logs, tracing
from jubako.catalog import Model, load_catalog
from jubako.errors import Cancelled, FamilyUnavailable
from jubako.job import Job
from jubako.result import Progress, Result
from jubako.runs import Runs
from jubako.services.access import FamilyAccess
from jubako.services.connection import ErrorShape
from jubako.services.headers import BrowserHeaders
from jubako.services.ignition import Ignition
from jubako.services.stopping import Stopping
from jubako.services.supervision import supervise
from jubako.services.telemetry import observe
from jubako.settings import forbid_remote_code, load_settings
from jubako.weights.selection import Choice

__all__ = ["GRACE", "KEEP_CONNECTIONS", "ModelState", "family_service"]

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
    """Where a model stands in its family's process; ``bytes`` is what its components take in memory.

    The ``reason`` is that of one whose files are ``broken``. Of one that was loaded, ``weights`` and
    ``precision`` say of which weight set, and ``rejected`` has a sentence for each one that was not taken.
    """

    model_config = ConfigDict(frozen=True)

    state: Literal["missing", "on_disk", "broken", "loading", "resident"]
    loading_fraction: float | None = None
    bytes: int = 0
    weights: Literal["standard", "nvidia", "amd"] | None = None
    reason: str | None = None
    precision: str | None = None
    rejected: tuple[str, ...] = ()

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
    supervise()
    forbid_remote_code()
    settings = load_settings()
    observe(settings)
    catalog = load_catalog(settings.catalog)
    family = catalog.families[name]
    stopping = Stopping(settings.stop_delay, settings.stop_grace)

    @bentoml.service(
        name=family.service,
        resources=family.resources.model_dump(exclude_none=True),
        traffic={"timeout": max(settings.timeout, settings.job_timeout) + TIMEOUT_MARGIN},
        runner_connection=KEEP_CONNECTIONS,
    )
    class FamilyService:
        """Runs jobs on this family's models."""

        def __init__(self) -> None:
            _speak()
            self.ignition = Ignition(family, settings)
            self.runs = Runs(self.run_durable, GRACE * settings.job_lease)
            # Jobs that wait for the runner to be there; cancelling takes them out.
            self.waiting: set[str] = set()
            self.at_work = 0

        @bentoml.api
        async def generate(self, job: Job) -> Result:
            """Run one job."""
            return await self.run(job)

        @bentoml.api(
            batchable=True,
            max_batch_size=family.batching.max_batch_size,
            max_latency_ms=family.batching.max_latency_ms,
        )
        async def generate_batch(self, jobs: list[Job]) -> list[Result]:
            """Run the jobs that BentoML's dispatcher collected; all are answered when the last is done."""
            # The dispatcher has the context of whichever request was its first.
            tasks = [asyncio.create_task(self.run(job), context=Context()) for job in jobs]
            return list(await asyncio.gather(*tasks))

        @bentoml.api
        async def generate_events(self, job: Job, durable: bool = False) -> AsyncGenerator[str, None]:
            """Run one job; a line of JSON a step, then one with the result.

            An empty line comes first, so that nobody waits for the first step to hear that the job is here.
            """
            yield "\n"
            events = self.runs.follow(job) if durable else _events(self.run, job)
            async for event in events:
                # In ASCII: the proxy decodes chunks that may end within a letter of several bytes.
                yield event.model_dump_json(ensure_ascii=True) + "\n"

        @bentoml.api
        async def cancel_job(self, job_id: str) -> bool:
            """Stop a job before its next step; false when it is not here."""
            if self.runs.give_up(job_id):
                return True
            if job_id in self.waiting:
                self.waiting.remove(job_id)
                return True
            runner = self.ignition.started
            return runner is not None and runner.cancel(job_id)

        @bentoml.api
        async def has_job(self, job_id: str) -> bool:
            """Whether a durable job is at work here, or has just ended with a result."""
            return self.runs.has(job_id)

        @bentoml.api
        async def describe(self) -> dict[str, ModelState]:
            """The state of each model of this family."""
            choices = self.ignition.choices()
            states = {
                name: ModelState.model_validate(asdict(state) | _of_choice(choices.get(name)))
                for name, state in self.ignition.states().items()
            }
            return states | await _worker_states(family.models)

        async def __is_ready__(self) -> bool:
            return self.ignition.ready and not stopping.begun

        async def run(
            self, job: Job, on_progress: Callable[[Progress], None] | None = None, *, durable: bool = False
        ) -> Result:
            """Run one job as soon as the runner is there."""
            _announce(job, prompts=settings.log_prompts)
            self.at_work += 1
            try:
                with tracing.span("job", _described(job, durable=durable)) as span:
                    result = await self._run(job, on_progress, durable=durable)
                    if result.error is not None:
                        tracing.fail(span, result.error["error"]["code"])
                return result
            finally:
                self.at_work -= 1

        async def _run(
            self, job: Job, on_progress: Callable[[Progress], None] | None, *, durable: bool
        ) -> Result:
            self.waiting.add(job.id)
            try:
                runner = await self.ignition.runner()
                if job.id not in self.waiting:
                    return Result.failed(job.id, job.seed, Cancelled("the job was cancelled"))
            except FamilyUnavailable as error:
                return Result.failed(job.id, job.seed, error)
            finally:
                self.waiting.discard(job.id)
            return await runner.generate(job, on_progress, durable=durable)

        async def run_durable(self, job: Job, on_progress: Callable[[Progress], None]) -> Result:
            """Run one job that may outlive whoever asked for it."""
            return await self.run(job, on_progress, durable=True)

        @bentoml.on_startup
        async def stop_when_told(self) -> None:
            """Let jobs end first where this family is served alone; beside its gateway that sees to it."""
            if bentoml.server_context.service_type == "entry_service":
                stopping.heed(lambda: self.at_work > 0)

        @bentoml.on_shutdown
        def finish(self) -> None:
            """Let running jobs end before the process does."""
            self.ignition.close()

    service: Any = FamilyService
    service.add_asgi_middleware(BrowserHeaders)
    service.add_asgi_middleware(ErrorShape)
    service.add_asgi_middleware(
        FamilyAccess,
        key=settings.family_key,
        public=settings.public_without_keys,
        hosts=settings.allowed_hosts,
    )
    return service


def _speak() -> None:
    """Let our own messages through to BentoML's log, which shows warnings only, unless it is to be quiet."""
    if logging.getLogger().level <= logging.WARNING:
        logging.getLogger("jubako").setLevel(logging.INFO)


def _announce(job: Job, *, prompts: bool) -> None:
    logs.about(job_id=job.id, model=job.model)
    if prompts:
        logger.info(
            "job %s: prompt %r, negative prompt %r, seed %d",
            job.id,
            job.prompt,
            job.negative_prompt,
            job.seed,
        )


def _described(job: Job, *, durable: bool) -> tracing.Attributes:
    """What a job's span says of it."""
    return {
        **job.model_dump(include={"task", "family", "model", "width", "height", "scheduler"}),
        "job_id": job.id,
        "steps": job.num_inference_steps,
        "durable": durable,
    }


def _of_choice(choice: Choice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    rejected = [str(rung) for rung in choice.rejected]
    return {"weights": choice.vendor, "precision": choice.precision, "rejected": rejected}


async def _worker_states(models: Mapping[str, Model]) -> dict[str, ModelState]:
    if not any(model.weights.worker and model.weights.worker.url for model in models.values()):
        return {}
    # What reads objects is for the one family that has some, and takes a second to import.
    workers = await asyncio.to_thread(import_module, "jubako.workers")
    well = await workers.healthy_of(models)
    return {name: ModelState(state="resident" if good else "missing") for name, good in well.items()}


async def _events(
    run: Callable[[Job, Callable[[Progress], None]], Coroutine[Any, Any, Result]], job: Job
) -> AsyncGenerator[Progress | Result, None]:
    events: asyncio.Queue[Progress | Result] = asyncio.Queue()
    work = asyncio.create_task(run(job, events.put_nowait))
    work.add_done_callback(lambda task: None if task.cancelled() else events.put_nowait(task.result()))
    try:
        while not isinstance(event := await events.get(), Result):
            yield event
        yield event
    finally:
        work.cancel()
