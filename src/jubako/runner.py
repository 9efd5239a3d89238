"""The common runner: one per family process. Leases models, feeds the step batcher, returns results.

Five kinds of threads: the residency's ``loader``, ``adapters`` (reads them), ``prepare`` (one: tokenizers and
schedulers are not shared), the batcher's ``denoiser``, and ``encode`` (picture files). The event loop waits.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from functools import partial
from time import perf_counter
from typing import Any

import torch
from PIL import Image

from jubako import metrics, tracing
from jubako.catalog import Family
from jubako.engine.batcher import StepBatcher
from jubako.engine.fingerprint import fingerprint
from jubako.engine.samples import Sample
from jubako.engine.soundness import sound
from jubako.engine.ticket import Ticket, failure_of
from jubako.errors import Cancelled, JubakoError, TimedOut
from jubako.families.acceleration import Acceleration, acceleration_for, in_effect
from jubako.families.latent import LatentModel
from jubako.families.loaded import Finished, LoadedModel
from jubako.hardware import machine, require_device
from jubako.job import Job
from jubako.loader import FamilyLoader
from jubako.memory import default_budget, freeze, out_of_memory, tried_twice
from jubako.probe import own_signals
from jubako.residency import Lease, Residence, Residency, located
from jubako.result import Progress, Result, Timings
from jubako.safety import screen_for
from jubako.settings import Settings, SettingsError
from jubako.weights.selection import Choice
from jubako.weights.store import read_record

__all__ = ["Runner"]

logger = logging.getLogger(__name__)

OnProgress = Callable[[Progress], None]

PREVIEW_SIDE = 256


class _Meter:
    """Tells Prometheus, and traces, of the batcher's work."""

    def __init__(self, family: str) -> None:
        self._family = family

    def ran(self, batch: Sequence[tuple[Sample, Ticket]], rows: int, live: int, seconds: float) -> None:
        positions = batch[0][0].latents[0, 0].numel()
        size = 1 << max(0, positions - 1).bit_length()
        metrics.FORWARD_SECONDS.observe(seconds, family=self._family, size=str(size))
        metrics.FORWARD_ROWS.observe(rows, family=self._family)
        metrics.LIVE_ROWS.set(live, family=self._family)
        if tracing.enabled():
            links = [ticket.link for _, ticket in batch if ticket.link is not None]
            facts: tracing.Attributes = {
                "family": self._family,
                "size": size,
                "rows": rows,
                "live_rows": live,
            }
            tracing.linked("forward", seconds, links, facts)

    def dropped(self, sample: Sample) -> None:
        metrics.WASTED_STEPS.add(sample.progress[0], family=self._family)

    def rested(self) -> None:
        metrics.LIVE_ROWS.set(0, family=self._family)


class Runner:
    """Runs the jobs of one family. Its methods belong to one event loop, except ``cancel`` and ``close``."""

    def __init__(self, family: Family, settings: Settings) -> None:
        _quiet_libraries()
        self.family = family
        self.settings = settings
        here = machine(own_signals())
        self.device = torch.device(require_device(here, settings.device))
        # Before it is measured what memory is free for models.
        self._screen = screen_for(family, settings, self.device)
        self.batcher = StepBatcher(_Meter(family.name))
        acceleration = _acceleration(settings, self.device)
        self._effects = ExitStack()
        self._effects.enter_context(in_effect(acceleration, self.device, settings.home / "compiled"))
        self._loader = FamilyLoader(family, settings, self.device, here, acceleration)
        freeze()
        budget = settings.memory_budget
        self.residency: Residency[LoadedModel] = Residency(
            self._loader, default_budget(self.device) if budget == "auto" else budget
        )
        self._running: dict[str, Callable[[], object]] = {}
        self._prepare = ThreadPoolExecutor(1, "prepare")
        self._adapters = ThreadPoolExecutor(1, "adapters")
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
        here, broken = self.residency.states(), self._loader.broken
        return located(self.family.models, self.settings.home, here, broken)

    def choices(self) -> Mapping[str, Choice]:
        """What each model in memory is served from."""
        return self._loader.choices

    @property
    def jobs(self) -> int:
        """Jobs that are here and not done."""
        return len(self._running)

    async def generate(
        self,
        job: Job,
        on_progress: OnProgress | None = None,
        *,
        durable: bool = False,
    ) -> Result:
        """Run one job. Failures come back as results too; only the caller's own cancelling is raised.

        A durable job may take longer, and tells of its progress with previews.
        """
        run = self._run_in_worker if self.family.models[job.model].weights.worker else self._run
        # A preview of what is not to be seen would show it.
        shown = durable and not (self._screen and self._screen.hides)
        ticket = self._ticket(job, on_progress, self.settings.preview_steps if shown else 0)
        seconds = self.settings.job_timeout if durable else self.settings.timeout
        failure: JubakoError
        try:
            result = await asyncio.wait_for(run(job, ticket), seconds)
        except JubakoError as error:
            failure = error
        except TimeoutError:
            failure = TimedOut(f"no result after {seconds:g} s; cancelled")
        except Exception as error:
            if not out_of_memory(error):
                logger.exception("job %s failed", job.id)
            failure = failure_of(error)
        else:
            if durable:
                logger.info("job %s ended", job.id)
            _count(job, result)
            return result
        finally:
            ticket.cancel()
            self._running.pop(job.id, None)
        metrics.RESULTS.add(model=job.model, outcome=failure.code)
        return Result.failed(job.id, job.seed, failure)

    def cancel(self, job_id: str) -> bool:
        """Stop a job before its next step, or its wait for a model; False when it is not here (any more)."""
        stop = self._running.get(job_id)
        if stop is not None:
            stop()
        return stop is not None

    def close(self) -> None:
        """Let running jobs finish, refuse those that wait for a model, then end the threads."""
        self.residency.close()
        self._adapters.shutdown()
        self._prepare.shutdown()
        self.batcher.close()
        self._encode.shutdown()
        self._effects.close()

    def _ticket(self, job: Job, on_progress: OnProgress | None, preview_every: int) -> Ticket:
        """The job's place in the batcher, whose listener is called on the event loop of whoever asks here."""
        if on_progress is None:
            return Ticket(link=tracing.link())
        loop = asyncio.get_running_loop()
        reached = (0, 0)

        def told(progress: Progress) -> None:
            loop.call_soon_threadsafe(on_progress, progress)

        def stepped(step: int, steps: int) -> None:
            nonlocal reached
            reached = step, steps
            told(Progress(job_id=job.id, step=step, steps=steps))

        def previewed(picture: torch.Tensor) -> None:
            # Off the denoiser's thread, which is the last that may wait for a file.
            self._encode.submit(_tell_preview, picture, job.id, reached, told)

        return Ticket(stepped, on_preview=previewed, preview_every=preview_every, link=tracing.link())

    async def _run_in_worker(self, job: Job, ticket: Ticket) -> Result:
        """Have another program do it; the only step is that it is done."""
        # What reads objects is for the one family that has some.
        from jubako import workers

        worker = self.family.models[job.model].weights.worker
        assert worker is not None  # noqa: S101 # asked before
        began = perf_counter()
        work = asyncio.ensure_future(workers.generate(worker, job))
        self._running[job.id] = partial(asyncio.get_running_loop().call_soon_threadsafe, work.cancel)
        try:
            await asyncio.wait({work})
        finally:
            work.cancel()
        if work.cancelled():
            raise Cancelled("the job was cancelled")
        file, variants = work.result()
        ticket.stepped(1, 1)
        tracing.past("denoised", began, ended := perf_counter())
        spent = Timings(queued=0, prepared=0, denoised=ended - began, decoded=0, encoded=0)
        return _result(job, Finished(file, variants), spent)

    async def _run(self, job: Job, ticket: Ticket) -> Result:
        lease = self.residency.use(*_models_of(job))
        self._running[job.id] = partial(_stop, ticket, lease)
        arrived = perf_counter()
        async with lease as models:
            if job.loras and isinstance(models[0], LatentModel):
                # Read on a thread of their own: others are prepared and denoised meanwhile.
                await lease.during(self._adapters.submit(models[0].take, job))
            preparing = self._prepare.submit(copy_context().run, _prepared, models, job, ticket)
            sample, began = await lease.during(preparing)
            prepared = perf_counter()
            tracing.past("queued", arrived, began)
            tracing.past("prepared", began, prepared)
            self.batcher.submit(sample, ticket)
            decoded = await lease.during(ticket.decoded)
            tracing.past("denoised", prepared, ticket.denoised_at)
            tracing.past("decoded", ticket.denoised_at, ticket.decoded_at)
            timings = Timings(
                queued=began - arrived,
                prepared=prepared - began,
                denoised=ticket.denoised_at - prepared,
                decoded=ticket.decoded_at - ticket.denoised_at,
                encoded=0.0,
            )
            finished = partial(self._finished, models[0], sample.last, decoded, job, timings)
            finishing = self._encode.submit(copy_context().run, finished)
            return await lease.during(finishing)

    def _finished(
        self, model: LoadedModel, sample: Sample, decoded: torch.Tensor, job: Job, timings: Timings
    ) -> Result:
        began = perf_counter()
        record = read_record(self.settings.home, self.family.models[job.model])
        facts = {"commit": record.commit if record else None}

        def finish() -> tuple[Finished, dict[str, Any]]:
            drawn, flagged = sound(sample, decoded, job.model), None
            if self._screen is not None:
                drawn, flagged = self._screen.screened(drawn)
            compared = self.settings.similar_distance != "off"
            looks = {"fingerprint": fingerprint(drawn) if compared else "", "flagged": flagged}
            return model.finish(drawn, job, facts), looks

        finished, looks = tried_twice(finish)
        tracing.past("encoded", began, ended := perf_counter())
        spent = timings.model_copy(update={"encoded": ended - began})
        return _result(job, finished, spent).model_copy(update=looks)


def _count(job: Job, result: Result) -> None:
    metrics.RESULTS.add(model=job.model, outcome="succeeded")
    for stage, seconds in result.timings.model_dump().items() if result.timings else ():
        metrics.STAGE_SECONDS.observe(seconds, model=job.model, stage=stage)


def _acceleration(settings: Settings, device: torch.device) -> Acceleration:
    try:
        return acceleration_for("cpu" if device.type == "cpu" else "cuda", settings.accelerations)
    except ValueError as error:
        raise SettingsError(f"JUBAKO_ACCELERATIONS: {error}") from error


def _result(job: Job, finished: Finished, timings: Timings) -> Result:
    return Result(
        job_id=job.id,
        seed=job.seed,
        content_type=finished.file.content_type,
        content=finished.file.content,
        variants=finished.variants,
        timings=timings,
    )


def _stop(ticket: Ticket, lease: Lease[LoadedModel]) -> None:
    ticket.cancel()
    lease.withdraw()


def _models_of(job: Job) -> tuple[str, ...]:
    """The models that a job needs at the same time."""
    return (job.model,) if job.refinement is None else (job.model, job.refinement.model)


def _prepared(models: tuple[LoadedModel, ...], job: Job, ticket: Ticket) -> tuple[Sample, float]:
    """The job's sample, with that of its refiner to follow, and when this began."""
    if ticket.cancelled:
        raise Cancelled("the job was cancelled")
    began = perf_counter()
    return tried_twice(partial(_sample, models, job)), began


def _sample(models: tuple[LoadedModel, ...], job: Job) -> Sample:
    sample = models[0].prepare(job)
    if job.refinement is not None:
        sample.successor = models[1].prepare_refinement(job)
    return sample


def _tell_preview(
    picture: torch.Tensor, job_id: str, reached: tuple[int, int], told: Callable[[Progress], object]
) -> None:
    """A preview [3, h, w] as a small JPEG, with the step that it shows."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(pixels)
    image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    told(Progress(job_id=job_id, step=reached[0], steps=reached[1], preview=file.getvalue()))


def _quiet_libraries() -> None:
    """Progress bars and per-request hints of the libraries are noise in a server's log."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
        # What is left goes the way of the server's own lines.
        library.disable_default_handler()
        library.enable_propagation()
