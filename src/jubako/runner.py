"""The common runner: one per family process. Leases models, feeds the step batcher, returns results.

Four kinds of threads: the residency's ``loader``, ``prepare`` (one: tokenizers and schedulers are not
shared), the batcher's ``denoiser``, and ``encode`` (picture files). The event loop only waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from time import perf_counter

import torch
from PIL import Image

from jubako.catalog import Family
from jubako.engine.batcher import StepBatcher, Ticket
from jubako.engine.samples import Sample
from jubako.errors import Cancelled, GenerationFailed, JubakoError, TimedOut
from jubako.families.loaded import LoadedModel
from jubako.job import Job
from jubako.loader import FamilyLoader
from jubako.media import MEDIA_TYPES, encode_image
from jubako.memory import default_budget, freeze
from jubako.pictures import composited
from jubako.residency import Lease, Residence, Residency
from jubako.result import Progress, Result, Timings
from jubako.settings import Settings
from jubako.weights.placement import resolve_device
from jubako.weights.store import find_weights, read_record

__all__ = ["Runner"]

logger = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]


class Runner:
    """Runs the jobs of one family. Its methods belong to one event loop, except ``cancel`` and ``close``."""

    def __init__(self, family: Family, settings: Settings) -> None:
        _quiet_libraries()
        self.family = family
        self.settings = settings
        self.device = resolve_device(settings.device)
        self.batcher = StepBatcher()
        loader = FamilyLoader(family, settings, self.device)
        freeze()
        budget = settings.memory_budget
        self.residency: Residency[LoadedModel] = Residency(
            loader, default_budget(self.device) if budget == "auto" else budget
        )
        self._running: dict[str, tuple[Ticket, Lease[LoadedModel]]] = {}
        self._prepare = ThreadPoolExecutor(1, "prepare")
        self._encode = ThreadPoolExecutor(2, "encode")
        self._preloads: list[Future[None]] = []

    def preload(self, names: tuple[str, ...]) -> list[Future[None]]:
        """Begin to load these models now, one after the other."""
        self._preloads += (begun := [self.residency.preload(name) for name in names])
        return begun

    @property
    def preloaded(self) -> bool:
        """Whether all that was begun has been loaded; a load that failed is never ready."""
        return all(load.done() and load.exception() is None for load in self._preloads)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The models in memory, the least recently used first."""
        states = self.residency.states()
        return tuple(name for name, residence in states.items() if residence.state == "resident")

    def states(self) -> dict[str, Residence]:
        """Where each model of the family is."""
        here, home, models = self.residency.states(), self.settings.home, self.family.models
        return {
            name: here.get(name)
            or Residence("on_disk" if find_weights(home, model, models) is not None else "missing")
            for name, model in models.items()
        }

    @property
    def jobs(self) -> int:
        """Jobs that are here and not done."""
        return len(self._running)

    async def generate(self, job: Job, on_progress: OnProgress | None = None) -> Result:
        """Run one job. Failures come back as results too; only the caller's own cancelling is raised."""
        ticket = Ticket(_on_loop(job.id, on_progress))
        lease = self.residency.use(*_models_of(job))
        self._running[job.id] = ticket, lease
        try:
            return await asyncio.wait_for(self._run(job, ticket, lease), self.settings.timeout)
        except JubakoError as error:
            return Result.failed(job.id, job.seed, error)
        except TimeoutError:
            seconds = self.settings.timeout
            return Result.failed(job.id, job.seed, TimedOut(f"no picture after {seconds:g} s; cancelled"))
        except Exception:
            logger.exception("job %s failed", job.id)
            failure = GenerationFailed("the model failed on this job; the server's log says why")
            return Result.failed(job.id, job.seed, failure)
        finally:
            ticket.cancel()
            del self._running[job.id]

    def cancel(self, job_id: str) -> bool:
        """Stop a job before its next step, or its wait for a model; False when it is not here (any more)."""
        running = self._running.get(job_id)
        if running is not None:
            ticket, lease = running
            ticket.cancel()
            lease.withdraw()
        return running is not None

    def close(self) -> None:
        """Let running jobs finish, refuse those that wait for a model, then end the threads."""
        self.residency.close()
        self._prepare.shutdown()
        self.batcher.close()
        self._encode.shutdown()

    async def _run(self, job: Job, ticket: Ticket, lease: Lease[LoadedModel]) -> Result:
        arrived = perf_counter()
        async with lease as models:
            preparing = self._prepare.submit(_prepared, models, job, ticket)
            sample, began = await lease.during(preparing)
            prepared = perf_counter()
            self.batcher.submit(sample, ticket)
            picture = await lease.during(ticket.picture)
            timings = Timings(
                queued=began - arrived,
                prepared=prepared - began,
                denoised=ticket.denoised_at - prepared,
                decoded=ticket.decoded_at - ticket.denoised_at,
                encoded=0.0,
            )
            return await lease.during(self._encode.submit(self._encoded, models[0], picture, job, timings))

    def _encoded(self, model: LoadedModel, picture: torch.Tensor, job: Job, timings: Timings) -> Result:
        began = perf_counter()
        image: Image.Image = composited(model.to_image(picture), job)
        record = read_record(self.settings.home, self.family.models[job.model])
        content = encode_image(image, job, {"commit": record.commit if record else None})
        return Result(
            job_id=job.id,
            seed=job.seed,
            content_type=MEDIA_TYPES[job.output_format],
            content=content,
            timings=timings.model_copy(update={"encoded": perf_counter() - began}),
        )


def _models_of(job: Job) -> tuple[str, ...]:
    """The models that a job needs at the same time."""
    return (job.model,) if job.refinement is None else (job.model, job.refinement.model)


def _prepared(models: tuple[LoadedModel, ...], job: Job, ticket: Ticket) -> tuple[Sample, float]:
    """The job's sample, with that of its refiner to follow, and when this began."""
    if ticket.cancelled:
        raise Cancelled("the job was cancelled")
    began = perf_counter()
    sample = models[0].prepare(job)
    if job.refinement is not None:
        sample.successor = models[1].prepare_refinement(job)
    return sample, began


def _on_loop(job_id: str, on_progress: OnProgress | None) -> Callable[[int, int], None] | None:
    """A listener for the denoiser's thread that calls on the event loop of whoever asks here."""
    if on_progress is None:
        return None
    loop = asyncio.get_running_loop()

    def tell(step: int, steps: int) -> None:
        loop.call_soon_threadsafe(on_progress, Progress(job_id=job_id, step=step, steps=steps))

    return tell


def _quiet_libraries() -> None:
    """Progress bars and per-request hints of the libraries are noise in a server's log."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
