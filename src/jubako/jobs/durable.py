"""DBOS: sees to it that whatever is recorded is run, after any crash, within each family's bound.

A workflow is one job. Its steps are the job's stages, each remembered with the files that it made, so that a
job that begins again goes on with the first stage that is missing. Nothing but JSON is kept: no pickle.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Coroutine, Mapping
from typing import Any, Protocol, TypeVar

import dbos
from dbos import DBOS, SetWorkflowID

__all__ = ["DurableQueue", "Worker"]

# Jobs of another version of the workflow would not be run. Change it when its steps change.
WORKFLOW_VERSION = "1"
POLL_SECONDS = 0.2
# A job that kills its family each time must end; one that was only interrupted often must not.
MAX_ATTEMPTS = 1000

T = TypeVar("T")


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
        self._bounds = bounds
        self._worker = worker
        self._run_job: Any = None

    def open(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to run what waits, and what this gateway had begun when it ended; work goes to ``loop``."""
        DBOS(config=self._config)
        self._run_job = _workflow(self._worker, loop)
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

    def close(self) -> None:
        """Stop at once. What runs is left as begun: the next start of this gateway goes on with it."""
        DBOS.destroy(workflow_completion_timeout_sec=0)

    def enqueue(self, job_id: str, family: str) -> None:
        """Have a recorded job run; twice is as good as once."""
        with SetWorkflowID(job_id):
            DBOS.enqueue_workflow(family, self._run_job, job_id)

    def cancel(self, job_id: str) -> None:
        """Take a job from its queue. Its stage, if one is at work, is the worker's to stop."""
        DBOS.cancel_workflow(job_id)

    def adopt(self, name: str) -> int:
        """Put what a dead gateway had begun into the queues again; how many jobs that were."""
        begun = DBOS.list_workflows(status="PENDING", executor_id=name, load_input=False, load_output=False)
        for workflow in begun:
            DBOS.resume_workflow(workflow.workflow_id, queue_name=workflow.queue_name)
        return len(begun)

    def standing(self, job_ids: list[str]) -> dict[str, bool]:
        """Of those of these that DBOS knows, whether it still means to run them."""
        known = DBOS.list_workflows(workflow_ids=job_ids, load_input=False, load_output=False)
        return {each.workflow_id: each.status in {"ENQUEUED", "PENDING", "DELAYED"} for each in known}

    def forget(self, job_ids: list[str]) -> None:
        """Remove what is remembered of jobs that are over."""
        DBOS.delete_workflows(job_ids)


def _workflow(worker: Worker, loop: asyncio.AbstractEventLoop) -> Any:
    """The workflow of one job, known to DBOS from here on."""

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
        stages = await begin(job_id)
        outcome: dict[str, Any] = {"files": []}
        for stage in range(stages):
            outcome = await run_stage(job_id, stage, outcome["files"])
            if "error" in outcome:
                break
        if stages:
            await end(job_id, outcome)

    return run_job


class _Json(dbos.Serializer):
    """Plain JSON in the database, where DBOS by itself would put pickles."""

    def serialize(self, data: Any) -> str:
        return json.dumps(data, default=str)

    def deserialize(self, serialized_data: str) -> Any:
        return json.loads(serialized_data)

    def name(self) -> str:
        return "jubako_json"
