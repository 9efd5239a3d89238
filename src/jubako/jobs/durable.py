"""DBOS: sees to it that whatever is recorded is run, after any crash, within each family's bound.

A workflow is one job. Its steps are the job's stages, each remembered with the files that it made, so that a
job that begins again goes on with the first stage that is missing. Nothing but JSON is kept: no pickle.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, Protocol, TypeVar

import dbos
import sqlalchemy as sa
from dbos import DBOS, SetEnqueueOptions, SetWorkflowID

from jubako.disk import no_room
from jubako.jobs.tables import refusal

__all__ = ["DurableQueue", "Standing", "Worker"]

# Jobs of another version of the workflow would not be run. Change it when its steps change.
WORKFLOW_VERSION = "1"
POLL_SECONDS = 0.2
# A job that kills its family each time must end; one that was only interrupted often must not.
MAX_ATTEMPTS = 1000

T = TypeVar("T")

Standing = Literal["meant to run", "dropped", "given up"]
"""Of a job that is not over. One is dropped by this gateway when DBOS itself could not write."""

_AHEAD = {"ENQUEUED", "DELAYED"}
_GIVEN_UP = {"MAX_RECOVERY_ATTEMPTS_EXCEEDED", "CANCELLED"}


class Worker(Protocol):
    """What runs jobs, on the gateway's event loop. All it takes and gives is JSON; failures are values."""

    async def begin(self, job_id: str) -> int:
        """Mark the job as running; how many stages it has, 0 when there is nothing left to do."""
        ...

    async def run_stage(self, job_id: str, stage: int, earlier: list[dict[str, Any]]) -> dict[str, Any]:
        """Run one stage, given the files of the one before; ``{"files": […]}`` or ``{"error": {…}}``."""
        ...

    async def end(self, job_id: str, outcome: dict[str, Any]) -> None:
        """Record what the last stage gave."""
        ...


class DurableQueue:
    """The queue of every family, with at most that many jobs of it at work at the same time.

    One a process, as DBOS itself. Its methods block; call them from threads.
    """

    def __init__(self, url: str, name: str, bounds: Mapping[str, int], worker: Worker) -> None:
        self._config: dbos.DBOSConfig = {
            "name": "jubako",
            "system_database_url": url,
            "executor_id": name,
            "application_version": WORKFLOW_VERSION,
            "serializer": _Json(),
            "log_level": "ERROR",
            "use_listen_notify": False,
        }
        self._name = name
        self._bounds = bounds
        self._worker = worker
        self._at_work: set[str] = set()
        self._run_job: Any = None
        self._is_open = False

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to run what waits, and what this gateway had begun when it ended; work goes to ``loop``."""
        DBOS(config=self._config)
        self._run_job = _workflow(self._worker, loop, self._at_work)
        # The database may have the queues of families that this gateway does not reach.
        DBOS.listen_queues(list(self._bounds))
        DBOS.launch()
        for family, bound in self._bounds.items():
            DBOS.register_queue(
                family,
                global_concurrency=bound,
                polling_interval_sec=POLL_SECONDS,
                on_conflict="always_update",
            )
        self._is_open = True

    def close(self) -> None:
        """Stop at once. What runs is left as begun: the next start of this gateway goes on with it."""
        DBOS.destroy(workflow_completion_timeout_sec=0)

    def enqueue(self, job_id: str, family: str, turn: int | None) -> None:
        """Have a recorded job run at its turn; twice is as good as once. DiskFull when that finds no room."""
        # Its own priorities begin with 1.
        with self._writing(), SetWorkflowID(job_id), SetEnqueueOptions(priority=1 + (turn or 0)):
            DBOS.enqueue_workflow(family, self._run_job, job_id)

    def cancel(self, job_id: str) -> None:
        """Take a job from its queue. Its stage, if one is at work, is the worker's to stop."""
        with self._writing():
            DBOS.cancel_workflow(job_id)

    def adopt(self, name: str) -> int:
        """Put what a dead gateway had begun into the queues again; how many jobs that were."""
        begun = DBOS.list_workflows(status="PENDING", executor_id=name, load_input=False, load_output=False)
        for workflow in begun:
            DBOS.resume_workflow(workflow.workflow_id, queue_name=workflow.queue_name)
        return len(begun)

    def standing(self, job_ids: list[str]) -> dict[str, Standing]:
        """How those of these stand that DBOS knows. One that is just begun may look dropped for a moment."""
        known = DBOS.list_workflows(workflow_ids=job_ids, load_input=False, load_output=False)
        return {each.workflow_id: self._standing(each) for each in known}

    def begin_again(self, job_id: str, family: str, turn: int | None) -> None:
        """Have a dropped job run from its first stage."""
        with self._writing():
            DBOS.delete_workflows([job_id])
        self.enqueue(job_id, family, turn)

    def forget(self, job_ids: list[str]) -> None:
        """Remove what is remembered of jobs that are over."""
        with self._writing():
            DBOS.delete_workflows(job_ids)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Within, DBOS's errors are ours where the disk is what is wrong."""
        if not self._is_open:  # it is opened when the disk has room
            raise no_room("JUBAKO_HOME")
        try:
            yield
        except sa.exc.DBAPIError as error:
            if (refused := refusal(error)) is not None:
                raise refused from error
            raise

    def _standing(self, workflow: dbos.WorkflowStatus) -> Standing:
        if workflow.status in _GIVEN_UP:
            return "given up"
        elsewhere = workflow.status == "PENDING" and workflow.executor_id != self._name
        if workflow.status in _AHEAD or elsewhere or workflow.workflow_id in self._at_work:
            return "meant to run"
        return "dropped"


def _workflow(worker: Worker, loop: asyncio.AbstractEventLoop, at_work: set[str]) -> Any:
    """The workflow of one job, known to DBOS from here on; ``at_work`` holds those that run here."""

    async def there(work: Coroutine[Any, Any, T]) -> T:
        # DBOS has an event loop of its own; the connections to the families belong to the gateway's.
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))

    @DBOS.step(name="begin")
    async def begin(job_id: str) -> int:
        return await there(worker.begin(job_id))

    @DBOS.step(name="run_stage")
    async def run_stage(job_id: str, stage: int, earlier: list[dict[str, Any]]) -> dict[str, Any]:
        return await there(worker.run_stage(job_id, stage, earlier))

    @DBOS.step(name="end")
    async def end(job_id: str, outcome: dict[str, Any]) -> None:
        await there(worker.end(job_id, outcome))

    @DBOS.workflow(name="jubako_job", max_recovery_attempts=MAX_ATTEMPTS)
    async def run_job(job_id: str) -> None:
        at_work.add(job_id)
        try:
            stages = await begin(job_id)
            outcome: dict[str, Any] = {"files": []}
            for stage in range(stages):
                outcome = await run_stage(job_id, stage, outcome["files"])
                if "error" in outcome:
                    break
            if stages:
                await end(job_id, outcome)
        finally:
            at_work.discard(job_id)

    return run_job


class _Json(dbos.Serializer):
    """Plain JSON in the database, where DBOS by itself would put pickles."""

    def serialize(self, data: Any) -> str:
        return json.dumps(data, default=str)

    def deserialize(self, serialized_data: str) -> Any:
        return json.loads(serialized_data)

    def name(self) -> str:
        return "jubako_json"
