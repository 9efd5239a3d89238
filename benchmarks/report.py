"""What a benchmark says: figures of samples, the machine, the versions, and one JSON document at the end."""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["Report", "decimals", "integers", "latency_figures", "percentile", "rounded", "spread"]

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jubako", "torch", "diffusers", "transformers", "bentoml", "httpx")


class Report:
    """Collects a benchmark's settings and figures; prints for people, and at last for programs."""

    def __init__(self, benchmark: str, settings: Mapping[str, Any]) -> None:
        self._document: dict[str, Any] = {
            "benchmark": benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": machine(),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "settings": dict(settings),
        }

    def say(self, line: str = "") -> None:
        """One line for people, at once."""
        print(line, flush=True)

    def add(self, **figures: Any) -> None:
        """Put figures into the document."""
        self._document.update(figures)

    def finish(self, *, save: bool) -> None:
        """Print the document as the last line; with ``save`` also write it to the dated file of today."""
        self._document["machine"]["load_average_at_end"] = _load_average()
        document = rounded(self._document)
        if save:
            RESULTS.mkdir(exist_ok=True)
            path = RESULTS / f"{self._document['date'][:10]}-{self._document['benchmark']}.json"
            path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
            self.say(f"\nWritten to {path.relative_to(RESULTS.parent.parent)}")
        print(json.dumps(document), flush=True)


def machine() -> dict[str, Any]:
    """The processor, how many of its cores we may use, and how busy they were when the run began."""
    import torch

    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average_at_start": _load_average(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _load_average() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` of the values do not exceed; NaN for no values."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else math.nan


def latency_figures(latencies: Iterable[float | None]) -> dict[str, float]:
    """Count, mean and percentiles of the latencies that there are, in seconds."""
    values = [latency for latency in latencies if latency is not None]
    return {
        "count": len(values),
        "mean_s": statistics.fmean(values) if values else math.nan,
        "p50_s": percentile(values, 0.50),
        "p95_s": percentile(values, 0.95),
        "p99_s": percentile(values, 0.99),
    }


def spread(values: Sequence[float]) -> dict[str, Any]:
    """The median of some runs, with the runs."""
    return {"median": statistics.median(values), "runs": list(values)}


def rounded(value: Any) -> Any:
    """The same document with floats to four significant digits and without NaN, which JSON does not know."""
    if isinstance(value, Mapping):
        return {str(key): rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value


def integers(text: str) -> tuple[int, ...]:
    """An argparse type: whole numbers separated by commas."""
    return tuple(int(word) for word in text.split(","))


def decimals(text: str) -> tuple[float, ...]:
    """An argparse type: numbers separated by commas."""
    return tuple(float(word) for word in text.split(","))
