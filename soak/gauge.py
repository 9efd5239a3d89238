"""How a server's processes grow with the requests that they serve: memory, threads and open files."""

from __future__ import annotations

import re
from collections import defaultdict

import numpy as np
import psutil

__all__ = ["Gauge"]

# What is read while caches fill is left out.
WARM_UP = 0.3


class Gauge:
    """Reads the processes below the given one; the names are those of their services."""

    def __init__(self, process_id: int) -> None:
        root = psutil.Process(process_id)
        self._processes = {_name(each): each for each in (root, *root.children(recursive=True))}
        self._readings: dict[str, list[tuple[int, float, int, int]]] = defaultdict(list)

    def read(self, served: int) -> None:
        """Note how it stands after so many requests."""
        for name, process in self._processes.items():
            with process.oneshot():
                megabytes = process.memory_info().rss / 1e6
                self._readings[name].append((served, megabytes, process.num_threads(), process.num_fds()))

    @property
    def count(self) -> int:
        """Readings of each process that count."""
        return min(len(self._settled(name)) for name in self._readings)

    def slopes(self) -> dict[str, float]:
        """Megabytes per 1,000 requests of each process, by least squares, once it has warmed up."""
        return {name: _slope(self._settled(name)) for name in self._readings}

    def grown(self) -> int:
        """How many more threads or files one has at the end than it ever had before the middle."""
        growths = []
        for name in self._readings:
            readings = self._settled(name)
            early, late = readings[: len(readings) // 2], readings[-3:]
            for column in (2, 3):
                before = max(reading[column] for reading in early)
                growths.append(min(int(reading[column]) for reading in late) - int(before))
        return max(0, *growths)

    def _settled(self, name: str) -> list[tuple[int, float, int, int]]:
        readings = self._readings[name]
        return readings[int(WARM_UP * len(readings)) :]


def _slope(readings: list[tuple[int, float, int, int]]) -> float:
    served, megabytes = (np.array([reading[column] for reading in readings]) for column in (0, 1))
    return 1000 * float(np.polyfit(served, megabytes, 1)[0])


def _name(process: psutil.Process) -> str:
    found = re.search(r"--service-name (\w+)", " ".join(process.cmdline()))
    return found[1] if found else "supervisor"
