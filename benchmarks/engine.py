"""`scripts/benchmark engine`: the step batcher against the stock pipeline, same weights, same requests.

Three ways to the same pictures: the stock pipeline one picture a call; the stock pipeline with a whole batch
a call, its best case, since all start and end together; and the step batcher with as many pictures in flight
that arrive spread over the steps of the first, each replaced when it is done. Whole pictures are timed, from
prompt to pixels, and the final latents are compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from queue import SimpleQueue
from time import perf_counter
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES, Architecture, random_pipeline
from benchmarks.report import Report, integers, spread
from benchmarks.traffic import Mix, Traffic
from jubako.catalog import Model, load_catalog
from jubako.job import Job

__all__ = ["main"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    report = Report("engine", vars(options))
    on_cpu = torch.device(options.device).type == "cpu"
    measured = {}
    for name in options.architectures:
        if on_cpu and not ARCHITECTURES[name].on_cpu:
            report.say(f"{name}: skipped, it needs a GPU (--device cuda)")
        else:
            measured[name] = _measure(name, options, report)
    report.add(architectures=measured)
    report.finish(save=options.save)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark engine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--architecture",
        dest="architectures",
        action="append",
        choices=ARCHITECTURES,
        help="may be given several times; default sd1.5, sdxl and sd3.5-medium",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default float32 on a CPU, else float16")
    parser.add_argument("--size", type=int, help="side in pixels; default 128 on a CPU, else the model's own")
    parser.add_argument("--steps", type=int, help="default 4 on a CPU, else 20")
    parser.add_argument("--scheduler", default="Euler")
    parser.add_argument("--guidance", type=float, default=7.5, help="above 1 a picture has two rows")
    parser.add_argument("--batches", type=integers, default=(1, 2, 4, 8), help="default 1,2,4,8")
    parser.add_argument("--repeats", type=int, help="runs of each; default 1 on a CPU, else 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-engine.json too")
    options = parser.parse_args(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    defaults: dict[str, Any] = {"dtype": "float32", "size": 128, "steps": 4, "repeats": 1}
    if not on_cpu:
        defaults = {"dtype": "float16", "steps": 20, "repeats": 3}
    defaults["architectures"] = ["sd1.5", "sdxl", "sd3.5-medium"]
    vars(options).update({name: value for name, value in defaults.items() if vars(options)[name] is None})
    return options


@dataclass(frozen=True)
class _Run:
    """One timed way to some pictures: seconds for all, the UNet's forwards and rows, latents by seed."""

    pictures: int
    seconds: float
    forwards: int
    rows: int
    latents: Mapping[int, torch.Tensor]


def _measure(name: str, options: argparse.Namespace, report: Report) -> dict[str, Any]:
    bench = _Bench(ARCHITECTURES[name], options)
    report.say(f"\n{name}: {bench.parameters / 1e6:.1f} M parameters in the denoiser, {options.dtype}")
    report.say(f"weights drawn in {bench.made_seconds:.1f} s, warmed up in {bench.warm_up():.1f} s")
    ways: dict[tuple[str, int], Callable[[], _Run]] = {("stock, one at a time", 1): bench.one_at_a_time}
    for size in options.batches:
        ways["stock, one batch", size] = partial(bench.batched, size)
        ways["step batcher", size] = partial(bench.by_step, size)
    runs: dict[tuple[str, int], list[_Run]] = {way: [] for way in ways}
    order = random.Random(options.seed)  # noqa: S311 # for the order of runs, not for secrets
    for _ in range(options.repeats):
        for way in order.sample(list(ways), len(ways)):
            runs[way].append(ways[way]())
    reference = runs["stock, one at a time", 1][0].latents
    rows = [_figures(name, size, done, reference) for (name, size), done in runs.items()]
    report.say(
        f"\n{'':22} {'pictures':>8} {'s/picture':>9} {'it/s':>7} {'rows/s':>7} {'rows':>5} {'difference':>10}"
    )
    for row in rows:
        report.say(
            f"{row['way']:22} {row['batch']:8} {row['seconds_per_picture']['median']:9.3f}"
            f" {row['forwards_per_s']:7.2f} {row['rows_per_s']:7.2f} {row['rows_per_forward']:5.1f}"
            f" {row['largest_relative_difference']:10.1e}"
        )
    report.say("\nrows: of a forward, on average. difference: of latents to the stock pipeline's, relative")
    return {"parameters": bench.parameters, "results": rows, "ratios": _ratios(rows)}


def _figures(
    name: str, size: int, runs: Sequence[_Run], reference: Mapping[int, torch.Tensor]
) -> dict[str, Any]:
    differences = [
        (latents - reference[seed]).abs().max().item()
        for run in runs
        for seed, latents in run.latents.items()
    ]
    scale = max(latents.abs().max().item() for latents in reference.values())
    seconds = statistics.median(run.seconds for run in runs)
    run = runs[0]
    return {
        "way": name,
        "batch": size,
        "pictures": run.pictures,
        "seconds_per_picture": spread([run.seconds / run.pictures for run in runs]),
        "forwards_per_s": run.forwards / seconds,
        "rows_per_s": run.rows / seconds,
        "rows_per_forward": run.rows / run.forwards,
        "largest_difference": max(differences),
        "largest_relative_difference": max(differences) / scale,
    }


def _ratios(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """How many times as many rows a second the step batcher runs, by pictures in flight."""
    by_way = {(row["way"], row["batch"]): row["rows_per_s"] for row in rows}
    alone = by_way["stock, one at a time", 1]
    ratios = {}
    for (way, size), rate in by_way.items():
        if way == "step batcher":
            ratios[f"step batcher, {size} in flight : stock one at a time"] = rate / alone
            ratios[f"step batcher, {size} in flight : stock in one batch"] = (
                rate / by_way["stock, one batch", size]
            )
    return ratios


class _Bench:
    """The pipeline, the same pipeline taken apart for the step batcher, and the jobs that both do."""

    def __init__(self, architecture: Architecture, options: argparse.Namespace) -> None:
        from jubako.engine.schedule import make_scheduler

        began = perf_counter()
        self._device = torch.device(options.device)
        dtype = DTYPES[options.dtype]
        entry = load_catalog().model(architecture.model)
        entry = entry.model_copy(update={"max_rows": 2 * max(options.batches)})
        self._pipeline = random_pipeline(architecture, self._device, dtype, options.seed)
        config = self._pipeline.scheduler.config
        self._pipeline.scheduler = make_scheduler(config, options.scheduler, entry.flow)
        self._model = import_module(f"jubako.families.{entry.family}").wrap(self._pipeline, entry)
        # A GPU tunes its kernels for each shape; a CPU has little to gain from more than one.
        self._sizes_to_tune = (1,) if self._device.type == "cpu" else options.batches
        self._jobs = _jobs(entry, options, 2 * max(options.batches))
        self._synchronize()
        self.made_seconds = perf_counter() - began
        self.parameters = sum(parameter.numel() for parameter in self._model.denoiser.parameters())

    def warm_up(self) -> float:
        """Run what allocates, tunes and caches once; the seconds that it took."""
        began = perf_counter()
        for size in self._sizes_to_tune:
            self._call(self._jobs[:size])
        self._synchronize()
        return perf_counter() - began

    def one_at_a_time(self) -> _Run:
        """The stock pipeline, one picture a call; as many as the largest batch has twice, for reference."""
        latents = {}
        began = perf_counter()
        for job in self._jobs:
            latents.update(self._call([job]))
        self._synchronize()
        return self._run(len(self._jobs), perf_counter() - began, 1, latents)

    def batched(self, size: int) -> _Run:
        """The stock pipeline with ``size`` pictures a call; twice."""
        latents = {}
        began = perf_counter()
        for start in (0, size):
            latents.update(self._call(self._jobs[start : start + size]))
        self._synchronize()
        return self._run(2 * size, perf_counter() - began, size, latents)

    def by_step(self, size: int) -> _Run:
        """The step batcher with ``size`` pictures in flight, two turns of them."""
        from jubako.engine.batcher import StepBatcher

        self._model.encode.cache_clear()
        batcher = StepBatcher()
        began = perf_counter()
        latents = _staggered(self._model, batcher, self._jobs[: 2 * size], size)
        self._synchronize()
        seconds = perf_counter() - began
        batcher.close()
        return _Run(2 * size, seconds, batcher.forwards, batcher.rows, latents)

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

    def _run(self, pictures: int, seconds: float, size: int, latents: Mapping[int, torch.Tensor]) -> _Run:
        forwards = len(self._pipeline.scheduler.timesteps) * pictures // size
        rows = 2 if self._jobs[0].guidance_scale > 1 else 1
        return _Run(pictures, seconds, forwards, forwards * size * rows, latents)

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _staggered(model: Any, batcher: Any, jobs: Sequence[Job], size: int) -> dict[int, torch.Tensor]:
    """Keep ``size`` pictures in flight, begun at even distances within the steps of the first.

    This thread prepares while the batcher's thread denoises, as in the server. The final latents by seed.
    """
    from jubako.engine.batcher import Ticket

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
