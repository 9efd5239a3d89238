"""`scripts/benchmark engine`: the step batcher against the stock pipeline, same weights, same requests.

Ways to the same pictures: the stock pipeline one picture a call; the stock pipeline with a whole batch a
call, its best case, since all start and end together; the same compiled as diffusers' documentation advises;
and the step batcher with as many pictures in flight that arrive spread over the steps of the first, each
replaced when it is done. `--ablate` repeats the last with each acceleration alone turned over. Whole pictures
are timed, from prompt to pixels, and the final latents are compared.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES, Architecture
from benchmarks.bench import DTYPES, Bench, Run, reason
from benchmarks.rates import matrix_rate, peak_bytes
from benchmarks.recipes import ABLATED, COMPILED, OURS, STOCK, Recipe, recipes
from benchmarks.report import Report, integers, spread

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    report = Report("engine", vars(options))
    on_cpu = torch.device(options.device).type == "cpu"
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    rate = matrix_rate(device, dtype)
    report.say(f"matrix product in {options.dtype}: {rate / 1e12:.2f} TFLOP/s")
    report.add(matrix_flops_per_s=rate)
    measured = {}
    for name in options.architectures:
        if on_cpu and not ARCHITECTURES[name].on_cpu:
            report.say(f"{name}: skipped, it needs a GPU (--device cuda)")
        else:
            measured[name] = _measure(name, options, report, rate)
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
    parser.add_argument("--dtype", choices=DTYPES, help="default float32 on a CPU, else bfloat16")
    parser.add_argument("--size", type=int, help="side in pixels; default 128 on a CPU, else the model's own")
    parser.add_argument("--steps", type=int, help="default 4 on a CPU, else 20")
    parser.add_argument("--scheduler", default="Euler")
    parser.add_argument("--guidance", type=float, default=7.5, help="above 1 a picture has two rows")
    parser.add_argument("--batches", type=integers, default=(1, 2, 4, 8), help="default 1,2,4,8")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run the stock pipeline compiled too; default on a GPU only",
    )
    parser.add_argument("--compile-mode", default="max-autotune", help="of torch.compile, for the stock one")
    parser.add_argument("--accelerations", type=_words, default=(), help="as in JUBAKO_ACCELERATIONS")
    parser.add_argument(
        "--ablate",
        action="store_const",
        const=ABLATED,
        default=(),
        help="also with each acceleration alone turned over",
    )
    parser.add_argument("--ablate-only", dest="ablate", type=_words, help="the same with these words only")
    parser.add_argument("--compiled", help="a folder to keep kernels in; default one that is deleted")
    parser.add_argument("--repeats", type=int, help="runs of each; default 1 on a CPU, else 3")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-engine.json too")
    options = parser.parse_args(arguments)
    on_cpu = torch.device(options.device).type == "cpu"
    defaults: dict[str, Any] = {"dtype": "float32", "size": 128, "steps": 4, "repeats": 1, "compile": False}
    if not on_cpu:
        defaults = {"dtype": "bfloat16", "steps": 20, "repeats": 3, "compile": True}
    defaults["architectures"] = ["sd1.5", "sdxl", "sd3.5-medium"]
    vars(options).update({name: value for name, value in defaults.items() if vars(options)[name] is None})
    try:
        _recipes(options)
    except ValueError as error:
        parser.error(str(error))
    return options


def _recipes(options: argparse.Namespace) -> list[Recipe]:
    on_cpu = torch.device(options.device).type == "cpu"
    mode = options.compile_mode if options.compile else None
    return recipes("cpu" if on_cpu else "cuda", options.accelerations, mode=mode, ablate=options.ablate)


@dataclass(frozen=True)
class _Timed:
    """What one recipe gave: its runs by way and batch, the peaks of memory, and what came before."""

    runs: Mapping[tuple[str, int], Sequence[Run]]
    peaks: Mapping[tuple[str, int], int | None]
    parameters: int
    made_seconds: float
    warm_up_seconds: float
    flops: Mapping[str, float] | None


def _measure(name: str, options: argparse.Namespace, report: Report, rate: float) -> dict[str, Any]:
    device_type = torch.device(options.device).type
    ways = _recipes(options)
    order = random.Random(options.seed)  # noqa: S311 # for the order of runs, not for secrets
    timed: dict[str, _Timed] = {}
    failed: dict[str, str] = {}
    for recipe in order.sample(ways, len(ways)):
        try:
            timed[recipe.name] = _time(ARCHITECTURES[name], recipe, options, order, failed)
        except Exception as error:  # noqa: BLE001 # one recipe that a card can't run must not cost the others
            failed[recipe.name] = reason(error)
        gc.collect()
        if device_type == "cuda":
            torch.cuda.empty_cache()
    for what, why in failed.items():
        report.say(f"{name}, {what}: failed, {why}")
    if not timed.get(STOCK) or ("stock, one at a time", 1) not in timed[STOCK].runs:
        return {"failed": failed}
    runs = {
        way: done for recipe in ways if recipe.name in timed for way, done in timed[recipe.name].runs.items()
    }
    peaks = {way: peak for found in timed.values() for way, peak in found.peaks.items()}
    reference = runs["stock, one at a time", 1][0].latents
    rows = [_figures(way, size, done, reference) for (way, size), done in runs.items()]
    for row in rows:
        row["peak_bytes"] = peaks[row["way"], row["batch"]]
    stock = timed[STOCK]
    summaries = _summaries(ways, timed, rows, rate)
    _say(
        report,
        f"{name}: {stock.parameters / 1e6:.1f} M parameters in the denoiser, {options.dtype}",
        rows,
        summaries,
    )
    return {
        "parameters": stock.parameters,
        "flops": stock.flops,
        "results": rows,
        "recipes": summaries,
        "failed": failed,
        "ratios": _ratios(rows),
    }


def _time(
    architecture: Architecture,
    recipe: Recipe,
    options: argparse.Namespace,
    order: random.Random,
    failed: dict[str, str],
) -> _Timed:
    """Run all ways of one recipe, with weights of its own; what fails of them is left out and noted."""
    with Bench(architecture, options, recipe) as bench:
        warm_up_seconds = bench.warm_up()
        failed.update({f"{recipe.name}, {size} at once": why for size, why in bench.failed.items()})
        ways = bench.ways()
        runs: dict[tuple[str, int], list[Run]] = {way: [] for way in ways}
        peaks: dict[tuple[str, int], int | None] = {}
        for _ in range(options.repeats):
            for way in order.sample(list(ways), len(ways)):
                peak_bytes(bench.device)
                try:
                    runs[way].append(ways[way]())
                except Exception as error:  # noqa: BLE001 # as for recipes
                    failed[f"{way[0]}, {way[1]} at once"] = reason(error)
                    del ways[way], runs[way]
                else:
                    peaks[way] = max(peak_bytes(bench.device) or 0, peaks.get(way) or 0) or None
        flops = bench.flops() if recipe.name == STOCK else None
        return _Timed(runs, peaks, bench.parameters, bench.made_seconds, warm_up_seconds, flops)


def _say(
    report: Report, head: str, rows: Sequence[Mapping[str, Any]], summaries: Sequence[Mapping[str, Any]]
) -> None:
    width = max(len(row["way"]) for row in rows)
    heads = f"{'pictures':>8} {'s/picture':>9} {'it/s':>7} {'rows/s':>7} {'rows':>5} {'difference':>10}"
    report.say(f"\n{head}\n\n{'':{width}} {heads}")
    for row in rows:
        report.say(
            f"{row['way']:{width}} {row['batch']:8} {row['seconds_per_picture']['median']:9.3f}"
            f" {row['forwards_per_s']:7.2f} {row['rows_per_s']:7.2f} {row['rows_per_forward']:5.1f}"
            f" {row['largest_relative_difference']:10.1e}"
        )
    report.say("\nrows: of a forward, on average. difference: of latents to the stock pipeline's, relative")
    heads = f"{'best at':>8} {'pictures/s':>10} {': stock':>8} {'of matrix':>9} {'GB':>6} {'warm-up':>8}"
    report.say(f"\n{'':{width}} {heads}")
    for one in summaries:
        memory = "-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 1e9:.1f}"
        report.say(
            f"{one['recipe']:{width}} {one['best_batch']:8} {one['pictures_per_s']:10.3f}"
            f" {one['ratio_to_best_stock']:8.2f} {one['share_of_matrix_rate']:9.1%} {memory:>6}"
            f" {one['warm_up_s']:7.1f}s"
        )
    report.say("\n: stock: to the best stock one. of matrix: of the rate of a large matrix product")


def _summaries(
    ways: Sequence[Recipe], timed: Mapping[str, _Timed], rows: Sequence[Mapping[str, Any]], rate: float
) -> list[dict[str, Any]]:
    """Each recipe at its best batch: against the best stock one, and against what the device could do."""
    best = {
        recipe.name: max(
            (row for row in rows if (row["way"], row["batch"]) in timed[recipe.name].runs),
            key=lambda row: float(row["pictures_per_s"]),
        )
        for recipe in ways
        if recipe.name in timed and timed[recipe.name].runs
    }
    to_beat = max(best[name]["pictures_per_s"] for name in (STOCK, COMPILED) if name in best)
    flops = timed[STOCK].flops or {}
    return [
        {
            "recipe": recipe.name,
            "accelerations": asdict(recipe.acceleration) if recipe.acceleration else None,
            "best_batch": row["batch"],
            "pictures_per_s": row["pictures_per_s"],
            "ratio_to_best_stock": row["pictures_per_s"] / to_beat,
            "share_of_matrix_rate": row["pictures_per_s"] * flops["picture"] / rate,
            "peak_bytes": row["peak_bytes"],
            "made_s": timed[recipe.name].made_seconds,
            "warm_up_s": timed[recipe.name].warm_up_seconds,
        }
        for recipe in ways
        if (row := best.get(recipe.name))
    ]


def _figures(
    name: str, size: int, runs: Sequence[Run], reference: Mapping[int, torch.Tensor]
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
        "pictures_per_s": run.pictures / seconds,
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
        if way == OURS:
            ratios[f"step batcher, {size} in flight : stock one at a time"] = rate / alone
            ratios[f"step batcher, {size} in flight : stock in one batch"] = (
                rate / by_way["stock, one batch", size]
            )
    return ratios


def _words(text: str) -> tuple[str, ...]:
    """An argparse type: words separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())
