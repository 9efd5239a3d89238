"""`scripts/benchmark tables`: put the newest saved results into the tables of docs/performance.md.

Each table stands between `<!-- NAME -->` and `<!-- end of NAME -->`; a test compares them with the results.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS

__all__ = ["filled", "main"]

PAGE = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
Result = Mapping[str, Any]

NAMES = {
    "step": "the server, batching by step",
    "request": "the server, batching by request",
    "one_at_a_time": "the stock pipeline, one at a time",
    "engine": "the engine without HTTP",
}


def main(_: Sequence[str]) -> None:
    """Rewrite the page."""
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    sys.stdout.write(f"Wrote {PAGE.relative_to(PAGE.parent.parent)}\n")


def filled(page: str) -> str:
    """The page with each of its tables as the newest result of that benchmark has it."""
    for name, (benchmark, table) in _TABLES.items():
        results = sorted(RESULTS.glob(f"*-{benchmark}.json"))
        text = "Not measured yet."
        if results:
            text = table(json.loads(results[-1].read_text(encoding="utf-8")))
        head, begin, rest = page.partition(f"<!-- {name} -->\n")
        _, end, tail = rest.partition(f"<!-- end of {name} -->")
        page = f"{head}{begin}{text}\n{end}{tail}"
    return page


def _saturation(result: Result) -> str:
    rows = [
        (NAMES[name], _number(figures["pictures_per_s"]["median"]), _runs(figures["pictures_per_s"]["runs"]))
        for name, figures in result["saturation"].items()
    ]
    return f"{_when(result)}\n\n" + _table(("", "pictures/s, median", "runs"), rows)


def _poisson(result: Result) -> str:
    parts = []
    for of in ("step", "request"):
        load = result[f"poisson_at_{of}"]
        rows = [
            (
                NAMES[name],
                *(_number(figures["all"][f"{figure}_s"]) for figure in ("mean", "p50", "p95", "p99")),
                *(_number(figures["shortest"][f"{figure}_s"]) for figure in ("mean", "p50", "p95")),
                ", ".join(map(str, figures["backlog"])),
            )
            for name, figures in load["systems"].items()
        ]
        short = f"{min(result['settings']['steps'])} steps:"
        heads = (
            "",
            "mean",
            "p50",
            "p95",
            "p99",
            f"{short} mean",
            "p50",
            "p95",
            "unfinished at the last arrival",
        )
        share = f"{load['share']:.0%} of what the server saturates at batching by {of}"
        parts.append(f"At {_number(load['requests_per_s'])} requests/s, {share}:\n\n{_table(heads, rows)}")
    return "\n\n".join(parts)


def _ratios(result: Result) -> str:
    return _table(("ratio", ""), [(name, _number(value)) for name, value in result["ratios"].items()])


def _engine(result: Result) -> str:
    rows = [
        (
            architecture,
            row["way"],
            str(row["batch"]),
            _number(row["seconds_per_picture"]["median"]),
            _number(row["forwards_per_s"]),
            _number(row["rows_per_s"]),
            _number(row["rows_per_forward"]),
            f"{row['largest_relative_difference']:.0e}",
        )
        for architecture, measured in result["architectures"].items()
        for row in measured["results"]
    ]
    heads = (
        "",
        "",
        "at once",
        "s/picture",
        "forwards/s",
        "rows/s",
        "rows a forward",
        "difference of latents",
    )
    return f"{_when(result)}\n\n" + _table(heads, rows)


def _rows(result: Result) -> str:
    sides = result["sides"]
    counts = [str(rows) for rows in result["settings"]["rows"]]
    rows = [(count, *(_number(sides[side]["row_ms"][count]) for side in sides)) for count in counts]
    return f"{_when(result)}\n\n" + _table(("rows", *(f"ms a row, {side} px" for side in sides)), rows)


def _jobs(result: Result) -> str:
    rows = [
        (name, str(figures["count"]), *(_number(1000 * figures[f"{figure}_s"]) for figure in _JOB_FIGURES))
        for name, figures in result["latencies"].items()
    ]
    freed = _number(result["one_step_after_cancelling_s"])
    return (
        f"{_when(result)}\n\n{_table(('', 'asked', 'p50, ms', 'p99, ms', 'slowest, ms'), rows)}\n\n"
        f"A job of one step, submitted when all others had been cancelled, was done {freed} s later."
    )


def _adapters(result: Result) -> str:
    ways = list(result["measured"][0]["results"])
    rows = [
        (
            one["model"],
            str(one["rank"]),
            str(one["threads"]),
            _number(one["results"][ways[0]]["pictures_per_s"]["median"]),
            *(
                f"{found['ratio']['median']:.2f}, {found['cpu_ratio']['median']:.2f}"
                for found in (one["results"][way] for way in ways[1:])
            ),
        )
        for one in result["measured"]
    ]
    return f"{_when(result)}\n\n" + _table(("", "rank", "threads", f"{ways[0]}, pictures/s", *ways[1:]), rows)


def _shapes(result: Result) -> str:
    rows = [
        (
            f"{model}, {found['parameters'] / 1e6:.0f} M",
            layers,
            str(adapter["layers"]),
            _number(adapter["bytes"] / 1e6),
            _number(adapter["read_s"]),
            _number(adapter["read_cpu_s"]),
            f"{_number(found['without_s']['median'])}, {_number(found['mixed_s']['median'])}",
            f"{found['ratio']['median']:.2f}, {found['cpu_ratio']['median']:.2f}",
        )
        for model, found in result["models"].items()
        for layers, adapter in found["adapters"].items()
    ]
    heads = (
        "",
        "adapter of",
        "layers",
        "MB",
        "read in, s",
        "CPU time, s",
        "forward without, mixed, s",
        "ratio, of CPU time",
    )
    return f"{_when(result)}\n\n" + _table(heads, rows)


_JOB_FIGURES = ("p50", "p99", "max")

_TABLES: Mapping[str, tuple[str, Callable[[Result], str]]] = {
    "saturation": ("load", _saturation),
    "poisson": ("load", _poisson),
    "ratios": ("load", _ratios),
    "engine": ("engine", _engine),
    "rows": ("rows", _rows),
    "jobs": ("jobs", _jobs),
    "adapters": ("adapters", _adapters),
    "shapes": ("shapes", _shapes),
}


def _when(result: Result) -> str:
    versions, load = result["versions"], result["machine"]["load_average_at_start"]
    libraries = (
        f"PyTorch {versions['torch']}, diffusers {versions['diffusers']}, BentoML {versions['bentoml']}"
    )
    return f"Measured on {result['date'][:10]} with {libraries}; load average {load} when it began."


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _runs(values: Iterable[float]) -> str:
    return ", ".join(map(_number, values))


def _number(value: float | None) -> str:
    """Three digits that count, without an exponent."""
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
