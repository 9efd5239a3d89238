"""The common runner: one per family process. Loads models, feeds the step batcher, returns results.

Three kinds of threads: ``prepare`` (one: tokenizers and schedulers are not shared), the batcher's denoiser,
and ``encode`` (picture files). The event loop only waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import import_module
from time import perf_counter

import torch
from PIL import Image

from jubako.catalog import Family, Model
from jubako.engine.batcher import StepBatcher, Ticket
from jubako.engine.samples import Sample
from jubako.errors import Cancelled, GenerationFailed, JubakoError, TimedOut
from jubako.families.loaded import LoadedModel
from jubako.job import Job
from jubako.media import MEDIA_TYPES, encode_image
from jubako.result import Progress, Result, Timings
from jubako.settings import Settings
from jubako.weights.standard import resolve_device, resolve_dtype
from jubako.weights.store import read_record, require_weights

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
        self._module = import_module(f"jubako.families.{family.name}")
        self._models: dict[str, LoadedModel] = {}
        self._tickets: dict[str, Ticket] = {}
        self._prepare = ThreadPoolExecutor(1, "prepare")
        self._encode = ThreadPoolExecutor(2, "encode")
        self._preloads: list[Future[LoadedModel]] = []

    def preload(self, names: tuple[str, ...]) -> None:
        """Begin to load these models now."""
        for name in names:
            self._preloads.append(self._prepare.submit(self.load, self.family.models[name]))

    @property
    def preloaded(self) -> bool:
        """Whether all that was begun is loaded; a load that failed is never ready."""
        return all(load.done() and load.exception() is None for load in self._preloads)

    @property
    def loaded(self) -> tuple[str, ...]:
        """The models in memory."""
        return tuple(self._models)

    @property
    def jobs(self) -> int:
        """Jobs that are here and not done."""
        return len(self._tickets)

    def load(self, model: Model) -> LoadedModel:
        """The model in memory, read from disk on first use; ModelNotOnDisk when it was not fetched."""
        if model.name not in self._models:
            folder = require_weights(self.settings.home, model)
            started = perf_counter()
            dtype = resolve_dtype(self.settings.dtype, model, self.device)
            try:
                self._models[model.name] = self._module.load(folder, model, self.device, dtype)
            except Exception as error:
                logger.exception("loading %s failed", model.name)
                raise GenerationFailed(f"the weights of {model.name} could not be loaded") from error
            logger.info("loaded %s in %.1f s on %s", model.name, perf_counter() - started, self.device)
        return self._models[model.name]

    async def generate(self, job: Job, on_progress: OnProgress | None = None) -> Result:
        """Run one job. Failures come back as results too; only the caller's own cancelling is raised."""
        ticket = Ticket(_on_loop(job.id, on_progress))
        self._tickets[job.id] = ticket
        try:
            return await asyncio.wait_for(self._run(job, ticket), self.settings.timeout)
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
            del self._tickets[job.id]

    def cancel(self, job_id: str) -> bool:
        """Stop a job before its next step; False when it is not here (any more)."""
        if ticket := self._tickets.get(job_id):
            ticket.cancel()
        return ticket is not None

    def close(self) -> None:
        """Let running jobs finish, then end the threads."""
        self._prepare.shutdown()
        self.batcher.close()
        self._encode.shutdown()

    async def _run(self, job: Job, ticket: Ticket) -> Result:
        loop = asyncio.get_running_loop()
        arrived = perf_counter()
        model, sample, began = await loop.run_in_executor(self._prepare, self._prepared, job, ticket)
        prepared = perf_counter()
        self.batcher.submit(sample, ticket)
        picture = await asyncio.wrap_future(ticket.picture)
        timings = Timings(
            queued=began - arrived,
            prepared=prepared - began,
            denoised=ticket.denoised_at - prepared,
            decoded=ticket.decoded_at - ticket.denoised_at,
            encoded=0.0,
        )
        return await loop.run_in_executor(self._encode, self._encoded, model, picture, job, timings)

    def _prepared(self, job: Job, ticket: Ticket) -> tuple[LoadedModel, Sample, float]:
        if ticket.cancelled:
            raise Cancelled("the job was cancelled")
        began = perf_counter()
        model = self.load(self.family.models[job.model])
        return model, model.prepare(job), began

    def _encoded(self, model: LoadedModel, picture: torch.Tensor, job: Job, timings: Timings) -> Result:
        began = perf_counter()
        image: Image.Image = model.to_image(picture)
        record = read_record(self.settings.home, self.family.models[job.model])
        content = encode_image(image, job, {"commit": record.commit if record else None})
        return Result(
            job_id=job.id,
            seed=job.seed,
            content_type=MEDIA_TYPES[job.output_format],
            content=content,
            timings=timings.model_copy(update={"encoded": perf_counter() - began}),
        )


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
