"""What Prometheus is told, each measure declared once. BentoML's ``/metrics`` shows those of all services.

``prometheus_client`` is imported with the first measurement: BentoML tells it where processes meet only after
a service's module was imported. The table in ``docs/operations.md`` is checked against this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

__all__ = [
    "AT_WORK",
    "ERRORS",
    "EVICTIONS",
    "FORWARD_ROWS",
    "FORWARD_SECONDS",
    "JOBS",
    "JOB_AGE",
    "LIVE_ROWS",
    "LOADS",
    "LOAD_SECONDS",
    "MEASURES",
    "QUEUE_AGE",
    "QUEUE_DEPTH",
    "READY_REPLICAS",
    "RESIDENT_BYTES",
    "RESULTS",
    "RETRIES",
    "STAGE_SECONDS",
    "WASTED_STEPS",
    "WORK_RATE",
    "Measure",
]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
ROWS = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Measure:
    """One measure; its name in Prometheus begins with ``jubako_``, a counter's ends in ``_total``."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    says: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = SECONDS

    def add(self, amount: float = 1, **labels: str) -> None:
        """Count."""
        self._of(labels).inc(amount)

    def set(self, value: float, **labels: str) -> None:
        """Replace a gauge's value in this process; over all processes they are summed up."""
        self._of(labels).set(value)

    def observe(self, value: float, **labels: str) -> None:
        """Add to a histogram."""
        self._of(labels).observe(value)

    def _of(self, labels: dict[str, str]) -> Any:
        return self._metric.labels(**labels) if labels else self._metric

    @cached_property
    def _metric(self) -> Any:
        import prometheus_client

        name = f"jubako_{self.name}"
        if self.kind == "counter":
            return prometheus_client.Counter(name, self.says, self.labels)
        if self.kind == "gauge":
            return prometheus_client.Gauge(name, self.says, self.labels, multiprocess_mode="livesum")
        return prometheus_client.Histogram(name, self.says, self.labels, buckets=self.buckets)


QUEUE_DEPTH = Measure(
    "queue_depth", "gauge", "Requests that wait for their turn in the gateway", ("family", "priority")
)
QUEUE_AGE = Measure("queue_age_seconds", "gauge", "How long the oldest of them has waited", ("family",))
AT_WORK = Measure("at_work", "gauge", "Requests that have their turn", ("family",))
WORK_RATE = Measure("work_rate", "gauge", "Work a second, as measured for promises", ("family",))
READY_REPLICAS = Measure(
    "ready_replicas", "gauge", "Replicas that are given new work, as the gateway sees them", ("family",)
)
RETRIES = Measure(
    "retries", "counter", "Requests that were begun again because their replica did not answer", ("family",)
)
JOBS = Measure("jobs", "gauge", "Durable jobs that are not over", ("family", "state"))
JOB_AGE = Measure("job_age_seconds", "gauge", "How long the oldest queued job has waited", ("family",))
ERRORS = Measure("errors", "counter", "Answers that were errors, by their code", ("code",))
RESULTS = Measure(
    "results", "counter", "Jobs that ended in a family: succeeded, or the error's code", ("model", "outcome")
)
STAGE_SECONDS = Measure(
    "stage_seconds",
    "histogram",
    "Time of a job that succeeded: queued, prepared, denoised, decoded, encoded",
    ("model", "stage"),
)
FORWARD_SECONDS = Measure(
    "forward_seconds",
    "histogram",
    "Time of a forward, by the positions of its latents up to the next power of two",
    ("family", "size"),
)
FORWARD_ROWS = Measure("forward_rows", "histogram", "Rows of a forward", ("family",), ROWS)
LIVE_ROWS = Measure("live_rows", "gauge", "Rows under denoising", ("family",))
WASTED_STEPS = Measure("wasted_steps", "counter", "Steps of jobs that were cancelled", ("family",))
LOADS = Measure("model_loads", "counter", "Models loaded into memory", ("model",))
LOAD_SECONDS = Measure("model_load_seconds", "histogram", "Time of a load", ("model",))
EVICTIONS = Measure("model_evictions", "counter", "Models evicted to make room", ("model",))
RESIDENT_BYTES = Measure("resident_bytes", "gauge", "Memory of loaded components", ("family",))

MEASURES = tuple(value for value in list(vars().values()) if isinstance(value, Measure))
