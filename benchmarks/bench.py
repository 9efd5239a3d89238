"""Whole pictures in one recipe, timed: by the stock pipeline's own call, or by the step batcher."""

from __future__ import annotations

import argparse
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter
from typing import Any, Self

import torch

from benchmarks.architectures import Architecture, random_pipeline
from benchmarks.rates import flops_of
from benchmarks.recipes import STOCK, Recipe
from benchmarks.traffic import Mix, Traffic
from jubako.catalog import Model, load_catalog
from jubako.job import Job

__all__ = ["DTYPES", "Bench", "Run", "reason"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Run:
    """One timed way to some pictures: seconds for all, the UNet's forwards and rows, latents by seed."""

    pictures: int
    seconds: float
    forwards: int
    rows: int
    latents: Mapping[int, torch.Tensor]


class Bench:
    """A pipeline in one recipe, taken apart for the step batcher where that is it, and the jobs to do.

    A context, for what holds for the whole process.
    """

    def __init__(self, architecture: Architecture, options: argparse.Namespace, recipe: Recipe) -> None:
        self._options, self._recipe = options, recipe
        self._entry = load_catalog().model(architecture.model)
        self._entry = self._entry.model_copy(update={"max_rows": 2 * max(options.batches)})
        self._architecture = architecture
        self.device = torch.device(options.device)
        self._jobs = _jobs(self._entry, options, 2 * max(options.batches))
        self._effects = ExitStack()
        self.failed: dict[int, str] = {}

    def __enter__(self) -> Self:
        from jubako.engine.schedule import make_scheduler
        from jubako.families.acceleration import Acceleration, in_effect
        from jubako.families.row_buckets import fast_predict

        began = perf_counter()
        acceleration = self._recipe.acceleration
        if acceleration is not None:
            folder = self._options.compiled or self._effects.enter_context(tempfile.TemporaryDirectory())
            self._effects.enter_context(in_effect(acceleration, self.device, Path(folder)))
        dtype = DTYPES[self._options.dtype]
        self._pipeline = random_pipeline(self._architecture, self.device, dtype, self._options.seed)
        config = self._pipeline.scheduler.config
        self._pipeline.scheduler = make_scheduler(config, self._options.scheduler, self._entry.flow)
        self._recipe.apply(self._pipeline)
        self._model = import_module(f"jubako.families.{self._entry.family}").wrap(self._pipeline, self._entry)
        rows = self._model.max_rows
        self._model.predict = fast_predict(self._model.predict, acceleration or Acceleration(), rows)
        self.parameters = sum(parameter.numel() for parameter in self._model.denoiser.parameters())
        self._synchronize()
        self.made_seconds = perf_counter() - began
        return self

    def __exit__(self, *_: object) -> None:
        self._effects.close()

    def ways(self) -> dict[tuple[str, int], Callable[[], Run]]:
        """What to time, by name and batch; not the batches that failed while they warmed up."""
        name = self._recipe.name
        sizes = [size for size in self._options.batches if size not in self.failed]
        if self._recipe.acceleration is not None:
            return {(name, size): partial(self.by_step, size) for size in sizes}
        ways: dict[tuple[str, int], Callable[[], Run]] = {
            (f"{name}, one batch", size): partial(self.batched, size) for size in sizes
        }
        if name == STOCK:
            ways["stock, one at a time", 1] = self.one_at_a_time
        return ways

    def warm_up(self) -> float:
        """Run what allocates, compiles, tunes and caches once; the seconds that it took."""
        from jubako.families.acceleration import Acceleration
        from jubako.families.warm_up import warm_up

        began = perf_counter()
        acceleration = self._recipe.acceleration
        compiles = self._recipe.mode is not None or (acceleration or Acceleration()).compile != "off"
        # A GPU tunes its kernels for each shape, and so does a compiler; else one tells as much as all.
        sizes = self._options.batches if compiles or self.device.type != "cpu" else (1,)
        if acceleration is not None and acceleration.warm_up:
            modules = [
                part for part in self._pipeline.components.values() if isinstance(part, torch.nn.Module)
            ]
            warm_up(self._model, self._model.prepare(self._jobs[0]), modules)
        # What is compiled at first may be compiled anew for what is different at the second time.
        for size in (*sizes, *sizes) if compiles else sizes:
            try:
                if acceleration is not None:
                    self.by_step(size)
                else:
                    self._call(self._jobs[:size])
            except Exception as error:  # noqa: BLE001 # a batch that does not fit must not cost the smaller ones
                self.failed[size] = reason(error)
        self._synchronize()
        return perf_counter() - began

    def flops(self) -> dict[str, float]:
        """Operations of one picture."""
        return flops_of(lambda: self._call(self._jobs[:1]), self._model.denoiser)

    def one_at_a_time(self) -> Run:
        """The stock pipeline, one picture a call; as many as the largest batch has twice, for reference."""
        latents = {}
        began = perf_counter()
        for job in self._jobs:
            latents.update(self._call([job]))
        self._synchronize()
        return self._run(len(self._jobs), perf_counter() - began, 1, latents)

    def batched(self, size: int) -> Run:
        """The stock pipeline with ``size`` pictures a call; twice."""
        latents = {}
        began = perf_counter()
        for start in (0, size):
            latents.update(self._call(self._jobs[start : start + size]))
        self._synchronize()
        return self._run(2 * size, perf_counter() - began, size, latents)

    def by_step(self, size: int) -> Run:
        """The step batcher with ``size`` pictures in flight, two turns of them."""
        from jubako.engine.batcher import StepBatcher

        self._model.forget_prompts()
        batcher = StepBatcher()
        began = perf_counter()
        try:
            latents = _staggered(self._model, batcher, self._jobs[: 2 * size], size)
            self._synchronize()
            seconds = perf_counter() - began
        finally:
            batcher.close()
        return Run(2 * size, seconds, batcher.forwards, batcher.rows, latents)

    def _call(self, jobs: Sequence[Job]) -> dict[int, torch.Tensor]:
        """One call of the stock pipeline for these jobs; the final latents by seed."""
        last: list[torch.Tensor] = []

        def keep(_pipeline: Any, _step: int, _timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
            last[:] = [given["latents"]]
            return {}

        job = jobs[0]
        self._pipeline(
            [job.prompt for job in jobs],
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
            output_type="pt",
            callback_on_step_end=keep,
        ).images.cpu()
        return {job.seed: latents.float().cpu() for job, latents in zip(jobs, last[0], strict=True)}

    def _run(self, pictures: int, seconds: float, size: int, latents: Mapping[int, torch.Tensor]) -> Run:
        forwards = len(self._pipeline.scheduler.timesteps) * pictures // size
        rows = 2 if self._jobs[0].guidance_scale > 1 else 1
        return Run(pictures, seconds, forwards, forwards * size * rows, latents)

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def reason(error: BaseException) -> str:
    """What went wrong, in short; of a job that failed in the batcher, why."""
    error = error.__cause__ or error
    return f"{type(error).__name__}: {error}"[:500]


def _staggered(model: Any, batcher: Any, jobs: Sequence[Job], size: int) -> dict[int, torch.Tensor]:
    """Keep ``size`` pictures in flight, begun at even distances within the steps of the first.

    This thread prepares while the batcher's thread denoises, as in the server. The final latents by seed.
    """
    from jubako.engine.ticket import Ticket

    events: SimpleQueue[Any] = SimpleQueue()
    waiting = deque(jobs)
    begun = 0

    def begin() -> None:
        nonlocal begun
        job = waiting.popleft()
        sample = model.prepare(job)
        # The steps of the first picture are the clock by which the others arrive.
        ticket = Ticket(None if begun else lambda step, steps: events.put(step / steps))
        ticket.decoded.add_done_callback(lambda picture: events.put((job.seed, sample, picture)))
        batcher.submit(sample, ticket)
        begun += 1

    begin()
    latents: dict[int, torch.Tensor] = {}
    while len(latents) < len(jobs):
        event = events.get()
        if isinstance(event, float):
            while begun < size and begun / size <= event:
                begin()
        else:
            seed, sample, picture = event
            picture.result().cpu()
            latents[seed] = sample.latents[0].float().cpu()
            if waiting:
                begin()
    return latents


def _jobs(entry: Model, options: argparse.Namespace, count: int) -> list[Job]:
    """Jobs that differ in prompt and seed only."""
    mix = Mix((options.steps,), (options.guidance,), (options.size or entry.defaults.width,))
    return [
        Job(
            id=str(index),
            task="txt2img",
            family=entry.family,
            model=entry.name,
            negative_prompt="",
            scheduler=options.scheduler,
            output_format="png",
            output_compression=90,
            **request.fields(),
        )
        for index, request in enumerate(Traffic(mix, options.seed).take(count))
    ]
