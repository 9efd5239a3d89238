"""What is recorded of a durable job: what to run, how far it is, what came of it. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from jubako.job import Job
from jubako.result import Timings

__all__ = [
    "ENDED",
    "TRAINING",
    "Event",
    "JobState",
    "Kept",
    "Output",
    "Record",
    "Similar",
    "Stage",
    "Training",
    "Work",
    "stages_of",
]

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
ENDED: tuple[JobState, ...] = ("succeeded", "failed", "cancelled")

TRAINING = "training"
"""The queue of trainings, as a family's name is that of its jobs; and their task."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Kept(_Value):
    """A file in the store."""

    digest: str
    content_type: str
    bytes: int


class Similar(_Value):
    """An earlier result that one is very like: its job, its number there, the bits in which they differ."""

    id: str
    index: int
    distance: int


class Output(Kept):
    """One picture, clip or object of a job's result."""

    seed: int
    timings: Timings | None = None
    variants: Mapping[str, Kept] = {}
    fingerprint: str = ""
    similar_to: tuple[Similar, ...] = ()
    flagged: bool | None = None


class Training(_Value):
    """A fine-tuning whose pictures lie in its own folder. ``plan`` is a TrainingPlan as JSON."""

    name: str
    plan: Mapping[str, Any]
    keep_images: bool = False
    warnings: tuple[str, ...] = ()


class Work(_Value):
    """What a job is to run: jobs of one kind with their pictures taken out, which are in the store.

    Or a training.
    """

    jobs: tuple[Job, ...] = ()
    pictures: Mapping[str, str] = {}
    training: Training | None = None

    @property
    def digests(self) -> set[str]:
        """The files that it needs."""
        return set(self.pictures.values())


class Stage(_Value):
    """Jobs that run side by side. A stage begins when the one before has ended."""

    task: str
    model: str
    family: str
    steps: int
    jobs: tuple[Job, ...] = ()


def stages_of(work: Work) -> tuple[Stage, ...]:
    """The source first, where there is one, then the jobs themselves. Stages are weighed by their steps."""
    if work.training is not None:
        plan = work.training.plan
        return (Stage(task=TRAINING, model=plan["model"], family=TRAINING, steps=plan["steps"]),)
    sources = tuple(job.source for job in work.jobs if job.source is not None)
    return tuple(
        Stage(
            task=jobs[0].task,
            model=jobs[0].model,
            family=jobs[0].family,
            steps=sum(job.num_inference_steps for job in jobs),
            jobs=jobs,
        )
        for jobs in (sources, work.jobs)
        if jobs
    )


class Record(_Value):
    """A durable job as the ledger has it. Times are seconds since the epoch.

    ``owner`` is the name of the key that it came with; None where no keys were asked for. By ``request_id``
    and ``traceparent`` the request is found that it came with. Of those that wait the lowest ``turn`` comes
    next.
    """

    id: str
    state: JobState
    task: str
    family: str
    model: str
    request_hash: str
    owner: str | None = None
    request_id: str | None = None
    traceparent: str | None = None
    turn: int | None = None
    work: Work
    created: float
    started: float | None = None
    ended: float | None = None
    progress: float = 0.0
    stage: int = 0
    step: int = 0
    steps: int = 0
    outputs: tuple[Output, ...] = ()
    error: Mapping[str, Any] | None = None
    expired: bool = False

    @property
    def is_over(self) -> bool:
        """Whether nothing will change any more."""
        return self.state in ENDED


class Event(_Value):
    """Something that happened to a job; ``id`` grows."""

    id: int
    job_id: str
    kind: str
    at: float
    data: Mapping[str, Any]
