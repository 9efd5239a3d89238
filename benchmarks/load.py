"""`scripts/benchmark load`: four systems under one load of mixed requests.

First each system's saturation throughput: a closed loop that always has many requests in flight, the same
ones for each system. Then an open loop: Poisson arrivals at 70 % of what the server saturates at when it
batches by step, to all systems, and at 70 % of what it saturates at when it batches by request, to these two.
The order of the systems is drawn anew each round.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.report import Report, decimals, integers, latency_figures, spread
from benchmarks.systems import SYSTEMS
from benchmarks.traffic import Answer, Mix, Outcome, Traffic, closed_loop, open_loop

__all__ = ["main"]

LOAD = 0.7


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    options = _options(arguments)
    # Read by the servers and by what runs here, as by any server.
    os.environ["JUBAKO_PRECISION"] = options.dtype
    report = Report("load", vars(options))
    asyncio.run(_measure(options, report))
    report.finish(save=options.save)


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--steps", type=integers, default=(4, 20, 50), help="mixed; default 4,20,50")
    parser.add_argument("--guidance", type=decimals, default=(4.0, 1.0), help="mixed; default 4,1")
    parser.add_argument("--sides", type=integers, default=(64, 96), help="in pixels; default 64,96")
    parser.add_argument("--warm-up", type=int, default=16, help="requests to each system; default 16")
    parser.add_argument("--in-flight", type=int, default=24, help="of the closed loop; default 24")
    parser.add_argument("--requests", type=int, default=36, help="of a closed-loop run; default 36")
    parser.add_argument("--rounds", type=int, default=3, help="closed-loop runs of each system; default 3")
    parser.add_argument("--arrivals", type=int, default=48, help="of an open-loop run; default 48")
    parser.add_argument("--open-rounds", type=int, default=1, help="open-loop runs, pooled; default 1")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of each system; default 2")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a smoke test; its figures mean nothing")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-load.json too")
    options = parser.parse_args(arguments)
    if options.quick:
        quick = {"warm_up": 6, "in_flight": 6, "requests": 12, "rounds": 1, "arrivals": 12, "open_rounds": 1}
        vars(options).update(quick, steps=(2, 4, 6))
    return options


async def _measure(options: argparse.Namespace, report: Report) -> None:
    mix = Mix(options.steps, options.guidance, options.sides)
    async with AsyncExitStack() as stack:
        started = perf_counter()
        running = await asyncio.gather(
            *(
                stack.enter_async_context(system(options.model, options.threads))
                for system in SYSTEMS.values()
            )
        )
        answers = dict(zip(SYSTEMS, running, strict=True))
        report.say(f"{len(answers)} systems are up after {perf_counter() - started:.0f} s")
        order = random.Random(options.seed)  # noqa: S311 # for the order of runs, not for secrets
        bench = _Bench(answers, Traffic(mix, options.seed), order, options, report)
        await bench.warm_up(options.warm_up)
        saturation = await bench.saturate()
        loads = [
            await bench.load("step", LOAD * saturation["step"], list(SYSTEMS)),
            await bench.load("request", LOAD * saturation["request"], ["step", "request"]),
        ]
    ratios = _ratios(saturation, loads)
    report.say("\nRatios")
    for name, value in ratios.items():
        report.say(f"  {name:56} {value:6.2f}")
    report.add(ratios=ratios)


@dataclass(frozen=True)
class _Bench:
    """The systems side by side, and where their requests come from and their figures go."""

    answers: Mapping[str, Answer]
    traffic: Traffic
    order: random.Random
    options: argparse.Namespace
    report: Report

    async def warm_up(self, count: int) -> None:
        """Some requests to each system, whose pictures must agree with the stock pipeline's.

        BentoML's dispatcher needs a dozen before it knows how long a batch takes.
        """
        requests = self.traffic.take(count)
        outcomes = {name: await closed_loop(answer, requests, 4) for name, answer in self.answers.items()}
        warm_up: dict[str, dict[str, Any]] = {
            name: {
                "seconds": outcome.seconds,
                "errors": outcome.errors,
                "largest_pixel_difference": _difference(outcome, outcomes["one_at_a_time"]),
            }
            for name, outcome in outcomes.items()
        }
        self.report.say("\nWarm-up, and the largest difference to the stock pipeline's pictures, of 255")
        for name, figures in warm_up.items():
            difference, errors = figures["largest_pixel_difference"], outcomes[name].errors
            self.report.say(f"  {name:14} {figures['seconds']:6.1f} s   {difference}{_warned(errors)}")
        self.report.add(warm_up=warm_up)

    async def saturate(self) -> dict[str, float]:
        """The most pictures a second of each system: the median of some closed-loop runs."""
        rounds, in_flight = self.options.rounds, self.options.in_flight
        runs: dict[str, list[Outcome]] = {name: [] for name in self.answers}
        for _ in range(rounds):
            requests = self.traffic.take(self.options.requests)
            for name in self.order.sample(list(runs), len(runs)):
                runs[name].append(await closed_loop(self.answers[name], requests, in_flight))
        saturation: dict[str, dict[str, Any]] = {
            name: {
                "pictures_per_s": spread([outcome.throughput for outcome in outcomes]),
                "errors": [error for outcome in outcomes for error in outcome.errors],
            }
            for name, outcomes in runs.items()
        }
        self.report.say(f"\nSaturation, {in_flight} in flight: pictures/s, median of {rounds} runs")
        for name, figures in saturation.items():
            throughputs = figures["pictures_per_s"]
            each = "  ".join(f"{run:.2f}" for run in throughputs["runs"])
            self.report.say(
                f"  {name:14} {throughputs['median']:6.2f}   ({each}){_warned(figures['errors'])}"
            )
        self.report.add(saturation=saturation)
        return {name: figures["pictures_per_s"]["median"] for name, figures in saturation.items()}

    async def load(self, of: str, rate: float, names: Sequence[str]) -> dict[str, Any]:
        """Poisson arrivals at this rate for these systems; the latencies of all rounds are pooled."""
        count, fewest_steps = self.options.arrivals, min(self.options.steps)
        runs: dict[str, list[Outcome]] = {name: [] for name in names}
        for _ in range(self.options.open_rounds):
            requests, arrivals = self.traffic.take(count), self.traffic.arrivals(count, rate)
            for name in self.order.sample(names, len(names)):
                runs[name].append(await open_loop(self.answers[name], requests, arrivals))
        systems = {name: _open_figures(outcomes, fewest_steps) for name, outcomes in runs.items()}
        self.report.say(f"\nPoisson arrivals, {rate:.2f}/s = {LOAD:.0%} of what {of} saturates at; seconds")
        self.report.say(
            f"{'':24} all: {'mean':>7} {'p50':>6} {'p95':>6} {'p99':>6}  {fewest_steps} steps:"
            f" {'mean':>5} {'p50':>6} {'p95':>6}"
        )
        for name, figures in systems.items():
            every, shortest = figures["all"], figures["shortest"]
            self.report.say(
                f"  {name:14} {figures['pictures_per_s']:5.2f}/s      {_row(every)} {every['p99_s']:6.2f}"
                f"          {_row(shortest)}   {figures['backlog']} unfinished at the last arrival"
                f"{_warned(figures['errors'])}"
            )
        load = {"of": of, "share": LOAD, "requests_per_s": rate, "systems": systems}
        self.report.add(**{f"poisson_at_{of}": load})
        return load


def _difference(outcome: Outcome, reference: Outcome) -> int | None:
    """The largest difference of two runs' pictures in any channel of any pixel; None when one is missing."""
    pairs = [
        (_pixels(ours), _pixels(theirs))
        for ours, theirs in zip(outcome.pictures, reference.pictures, strict=True)
        if ours and theirs
    ]
    if len(pairs) < len(outcome.pictures):
        return None
    return max(int(np.abs(ours - theirs).max()) for ours, theirs in pairs)


def _pixels(picture: bytes) -> np.ndarray[Any, np.dtype[np.int16]]:
    return np.asarray(Image.open(io.BytesIO(picture)), dtype=np.int16)


def _open_figures(outcomes: Sequence[Outcome], fewest_steps: int) -> dict[str, Any]:
    pairs = [
        (request, latency)
        for outcome in outcomes
        for request, latency in zip(outcome.requests, outcome.latencies, strict=True)
    ]
    done = sum(latency is not None for _, latency in pairs)
    return {
        "pictures_per_s": done / sum(outcome.seconds for outcome in outcomes),
        "backlog": [outcome.backlog for outcome in outcomes],
        "errors": [error for outcome in outcomes for error in outcome.errors],
        "all": latency_figures(latency for _, latency in pairs),
        "shortest": latency_figures(
            latency for request, latency in pairs if request.num_inference_steps == fewest_steps
        ),
    }


def _ratios(saturation: Mapping[str, float], loads: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The questions that this benchmark was made to answer."""
    ratios = {
        "saturation, step : one at a time": saturation["step"] / saturation["one_at_a_time"],
        "saturation, step : request": saturation["step"] / saturation["request"],
        "throughput lost to HTTP and gateway": 1 - saturation["step"] / saturation["engine"],
    }
    for load in loads:
        step, request = (load["systems"][name] for name in ("step", "request"))
        name = f"at {LOAD:.0%} of {load['of']}, step : request"
        ratios[f"p95 of the shortest {name}"] = step["shortest"]["p95_s"] / request["shortest"]["p95_s"]
        ratios[f"mean of all {name}"] = step["all"]["mean_s"] / request["all"]["mean_s"]
    return ratios


def _row(figures: Mapping[str, float]) -> str:
    return " ".join(f"{figures[name]:6.2f}" for name in ("mean_s", "p50_s", "p95_s"))


def _warned(errors: Sequence[str]) -> str:
    return f"   {len(errors)} FAILED, the first: {errors[0]}" if errors else ""
