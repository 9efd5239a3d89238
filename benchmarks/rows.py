"""`scripts/benchmark rows`: how long one forward takes by its rows, and so how many rows it should hold.

More rows than where the time per row stops falling gain no throughput and make every step longer.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from benchmarks.architectures import served_pipeline
from benchmarks.report import Report, integers
from jubako.catalog import load_catalog
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.settings import load_settings

__all__ = ["main"]

GOOD_ENOUGH = 1.05  # of the least time per row


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark rows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--sides", type=integers, default=(64, 96, 128), help="in pixels; default 64,96,128")
    parser.add_argument("--rows", type=integers, default=(1, 2, 4, 6, 8, 12, 16, 24, 32, 48))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2, help="torch threads; default 2")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-rows.json too")
    options = parser.parse_args(arguments)
    report = Report("rows", vars(options))
    report.add(sides={side: _side(side, options, report) for side in options.sides})
    report.finish(save=options.save)


def _side(side: int, options: argparse.Namespace, report: Report) -> dict[str, Any]:
    """Milliseconds of a forward for each number of rows at one size; the repeats go round the numbers."""
    import torch

    torch.set_num_threads(options.threads)
    model = _model(options.model)
    seconds: dict[int, list[float]] = {rows: [] for rows in options.rows}
    with torch.inference_mode():
        inputs = {rows: _inputs(model, side, rows) for rows in options.rows}
        for repeat in range(options.repeats + 1):
            for rows, given in inputs.items():
                began = perf_counter()
                model.predict(*given)
                if repeat:  # the first round warms up
                    seconds[rows].append(perf_counter() - began)
    forward = {rows: 1000 * statistics.median(times) for rows, times in seconds.items()}
    each = {rows: milliseconds / rows for rows, milliseconds in forward.items()}
    best = min(rows for rows in each if each[rows] <= GOOD_ENOUGH * min(each.values()))
    report.say(f"\n{side} pixels: rows, ms of a forward, ms of a row")
    for rows in options.rows:
        mark = "   <- the fewest within 5 % of the best" if rows == best else ""
        report.say(f"  {rows:3} {forward[rows]:8.2f} {each[rows]:7.2f}{mark}")
    return {"forward_ms": forward, "row_ms": each, "recommended": best}


def _model(name: str) -> Any:
    from importlib import import_module

    model = load_catalog(load_settings().catalog).model(name)
    return import_module(f"jubako.families.{model.family}").wrap(served_pipeline(model), model)


def _inputs(model: Any, side: int, rows: int) -> tuple[Any, Any, dict[str, Any]]:
    import torch

    words = TextToImage(
        prompt="a small red star on the left of a blue background", model=model.model.name, guidance_scale=1
    )
    job = plan(words, load_catalog(load_settings().catalog))
    conditioning = {
        name: values.expand(rows, *values.shape[1:]).contiguous()
        for name, values in model.conditioning(job).items()
    }
    latent = side // model.pipeline.vae_scale_factor
    shape = (rows, model.denoiser.config.in_channels, latent, latent)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    embeds = next(iter(conditioning.values()))
    return latents.to(embeds), torch.linspace(999, 1, rows).to(embeds.device), conditioning
