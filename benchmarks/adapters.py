"""`scripts/benchmark adapters`: what it costs that requests have adapters of their own.

Some requests at once, over four adapters and the base, seven ways to their pictures: without any adapter
(the reference); all with one; mixed in one forward, as they are served; in the step batcher too, but with a
bucket for each adapter; and one by one in the stock pipeline: without adapters, with peft's adapters switched
for each request, and with them fused into the weights and taken out again. From prompts to decoded pictures.

The ways take turns, in an order drawn anew each round. Every round gives each way's throughput by that of the
reference in the same round; the ratio is the median of them. The ratio of CPU time, of all threads, is what
other programs on the machine disturb least.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES
from benchmarks.mixtures import REFERENCE, STOCK, Load, Mixtures, Run
from benchmarks.random_adapters import LAYERS, quiet
from benchmarks.report import Report, integers, spread

__all__ = ["main"]

MODELS = ("tiny-sd", "tiny-sdxl", "sd1.5")


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark adapters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model",
        dest="models",
        action="append",
        choices=MODELS,
        help="may be given several times; default tiny-sd. sd1.5 has random weights",
    )
    parser.add_argument("--ranks", type=integers, default=(4, 16), help="default 4,16")
    parser.add_argument("--layers", choices=LAYERS, default="attention", help="what the adapters have")
    parser.add_argument("--requests", type=int, default=8, help="at once, of two rows each; default 8")
    parser.add_argument("--steps", type=int, help="default 4; 1 with random weights")
    parser.add_argument("--size", type=int, default=64, help="side in pixels; default 64")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; default 5")
    parser.add_argument("--threads", type=integers, default=(1, 2), help="torch threads; default 1,2")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-adapters.json too")
    options = parser.parse_args(arguments)
    options.models = options.models or ["tiny-sd"]
    report = Report("adapters", vars(options))
    measured = []
    for name, rank in product(options.models, options.ranks):
        measured += _measure(name, rank, options, report)
    report.add(measured=measured)
    report.finish(save=options.save)


def _measure(name: str, rank: int, options: argparse.Namespace, report: Report) -> list[dict[str, Any]]:
    """A model with adapters of one rank, with each number of threads."""
    steps = options.steps or (1 if name in ARCHITECTURES else 4)
    load = Load(options.requests, steps, options.size, rank, options.layers, options.seed)
    found = []
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), quiet():
        mixtures = Mixtures(name, load, Path(folder))
        for threads in options.threads:
            torch.set_num_threads(threads)
            head = {"model": name, "rank": rank, "layers": load.layers, "threads": threads, "steps": steps}
            results = _results(mixtures, options)
            _say(report, head, results)
            found.append({**head, "adapter_bytes": mixtures.adapter_bytes, "results": results})
    return found


def _results(mixtures: Mixtures, options: argparse.Namespace) -> dict[str, Any]:
    ways = mixtures.ways()
    order = random.Random(options.seed)  # noqa: S311 # for the order of runs, not for secrets
    # The first round warms up, and its pictures are compared.
    first = {way: run() for way, run in ways.items()}
    rounds: list[Mapping[str, Run]] = [
        {way: ways[way]() for way in order.sample(list(ways), len(ways))} for _ in range(options.repeats)
    ]
    return {way: _figures(way, first, rounds) for way in ways}


def _figures(way: str, first: Mapping[str, Run], rounds: Sequence[Mapping[str, Run]]) -> dict[str, Any]:
    runs = [each[way] for each in rounds]
    reference = [each[REFERENCE] for each in rounds]
    seconds = statistics.median(run.seconds for run in runs)
    return {
        "pictures_per_s": spread([len(run.pictures) / run.seconds for run in runs]),
        "rows_per_s": runs[0].rows / seconds,
        "rows_per_forward": runs[0].rows / runs[0].forwards,
        "ratio": spread([base.seconds / run.seconds for base, run in zip(reference, runs, strict=True)]),
        "cpu_ratio": spread(
            [base.cpu_seconds / run.cpu_seconds for base, run in zip(reference, runs, strict=True)]
        ),
        "largest_pixel_difference": _difference(way, first),
        "largest_pixel_change": _apart(first[way], first[REFERENCE]),
    }


def _difference(way: str, first: Mapping[str, Run]) -> float | None:
    """The largest of any pixel, of 255, to the stock pipeline's; None where that has no such pictures."""
    if way == "one adapter":
        return None
    return _apart(first[way], first[STOCK if way in {REFERENCE, STOCK} else "stock, switched"])


def _apart(one: Run, other: Run) -> float:
    pairs = zip(one.pictures, other.pictures, strict=True)
    return max(255 * float((a.clamp(0, 1) - b.clamp(0, 1)).abs().max()) for a, b in pairs)


def _say(report: Report, head: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    report.say("\n" + ", ".join(f"{name} {value}" for name, value in head.items()))
    report.say(f"{'':20} {'pictures/s':>10} {'rows':>5} {'ratio':>6} {'of CPU':>6} {'difference':>10}")
    for way, one in results.items():
        apart = one["largest_pixel_difference"]
        report.say(
            f"{way:20} {one['pictures_per_s']['median']:10.3f} {one['rows_per_forward']:5.1f}"
            f" {one['ratio']['median']:6.2f} {one['cpu_ratio']['median']:6.2f}"
            f" {'-' if apart is None else f'{apart:.2f}':>10}"
        )
