"""Runs the stages of durable jobs on the families, and tells the ledger how far they are."""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol, TypeVar

from jubako import logs, tracing
from jubako.errors import Cancelled, DiskFull, FamilyUnavailable, GenerationFailed, JubakoError, TimedOut
from jubako.job import Job
from jubako.jobs.ledger import Advance, Ledger
from jubako.jobs.record import Kept, Output, Record, Training, stages_of
from jubako.jobs.similarity import Printed, Similarity
from jubako.jobs.store import FileStore
from jubako.pictures import started_from
from jubako.result import Progress, Result

__all__ = ["Engine", "Execution", "Trainings"]

logger = logging.getLogger(__name__)

FLUSH_SECONDS = 0.1
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 1.0
# A finished job has a progress of 1 only with its result: what is left after the last step is no step.
NEARLY = 0.99

T = TypeVar("T")

Call = Callable[..., Awaitable[Any]]
"""Runs a function that blocks on a thread that is meant for such."""


class Engine(Protocol):
    """The families, as durable jobs need them."""

    def events(self, job: Job, *, durable: bool) -> AsyncGenerator[Progress | Result, None]:
        """A job's steps as they happen, then its result; closing the generator leaves the job at work."""
        ...

    async def cancel(self, job: Job) -> None:
        """Stop a job before its next step."""
        ...


class Trainings(Protocol):
    """What makes adapters, as durable jobs need it."""

    def run(
        self, job_id: str, training: Training, told: Callable[[str, Mapping[str, Any]], None]
    ) -> Coroutine[Any, Any, Result]:
        """The adapter's file; told is ``progress``, ``checkpoint`` and ``validation`` with facts."""
        ...

    def remove(self, job_id: str) -> None:
        """Delete what only a training at work needs, of any job."""
        ...

    def sweep(self, unfinished: Iterable[str]) -> None:
        """Delete that of all other jobs."""
        ...


class Execution:
    """The :class:`jubako.jobs.durable.Worker` of a gateway. All of it runs on the gateway's event loop."""

    def __init__(
        self,
        ledger: Ledger,
        store: FileStore,
        engine: Engine,
        trainings: Trainings,
        similarity: Similarity | None = None,
        *,
        timeout: float,
        call: Call,
        ring: Callable[[str], None],
    ) -> None:
        self._ledger, self._store, self._engine, self._trainings = ledger, store, engine, trainings
        self._similarity = similarity
        self._timeout = timeout
        self._call = call
        self._ring = ring
        self._stages: dict[str, asyncio.Task[dict[str, Any]]] = {}
        self._advances: dict[str, Advance] = {}
        self._told: list[tuple[str, str, Mapping[str, Any]]] = []
        self._stopping: set[str] = set()
        self._abandoned: set[asyncio.Task[dict[str, Any]]] = set()
        self._paused = False

    @property
    def running(self) -> tuple[str, ...]:
        """The jobs that are at work here."""
        return tuple(self._stages)

    def stop(self, job_id: str) -> bool:
        """Stop the job's stage before its next step; False when none is at work here."""
        task = self._stages.get(job_id)
        if task is None:
            return False
        self._stopping.add(job_id)
        return task.cancel()

    def pause(self) -> None:
        """Begin nothing more; it waits as it is for the next start."""
        self._paused = True

    def abandon(self) -> None:
        """Stop what is at work here and record nothing more of it: others have taken these jobs over."""
        self._abandoned.update(self._stages.values())
        for task in self._stages.values():
            task.cancel()

    async def begin(self, job_id: str) -> int:
        """Mark the job as running; how many stages it has, 0 when it is over or gone."""
        await self._while_paused()
        record: Record | None = await self._when_there_is_room(self._ledger.begin, job_id)
        self._ring(job_id)
        return len(stages_of(record.work)) if record else 0

    async def run_stage(self, job_id: str, stage: int, earlier: list[dict[str, Any]]) -> dict[str, Any]:
        """Run one stage; its files, or the error that ended it."""
        await self._while_paused()
        record: Record | None = await self._call(self._ledger.get, job_id)
        if record is None or record.is_over:
            return {"error": Cancelled("the job was cancelled").body()}
        facts = {"job_id": job_id, "owner": record.owner, "model": record.model}
        logs.about(request_id=record.request_id, **facts)
        told = {name: value for name, value in facts.items() if value is not None} | {"stage": stage}
        with tracing.span("durable job", told, asked_by=record.traceparent or "") as span:
            outcome = await self._begun(record, stage, earlier)
            if "error" in outcome:
                tracing.fail(span, outcome["error"]["error"]["code"])
        return outcome

    async def _begun(self, record: Record, stage: int, earlier: list[dict[str, Any]]) -> dict[str, Any]:
        job_id = record.id
        task = self._stages[job_id] = asyncio.ensure_future(self._stage(record, stage, earlier))
        try:
            outcome = await self._outcome(task, job_id)
        finally:
            if self._stages.get(job_id) is task:
                del self._stages[job_id]
            self._stopping.discard(job_id)
            self._advances.pop(job_id, None)
        if task in self._abandoned:
            # Whoever took the job over gives it its end. This workflow must give it none, not even a failure.
            await asyncio.Event().wait()
        return outcome

    async def _while_paused(self) -> None:
        if self._paused:
            # For ever: only the next start goes on with it.
            await asyncio.Event().wait()

    async def end(self, job_id: str, outcome: dict[str, Any]) -> None:
        """Record the files of the last stage, or the error."""
        if "error" in outcome:
            await self._when_there_is_room(self._ledger.fail, job_id, outcome["error"])
        else:
            outputs = [Output.model_validate(file) for file in outcome["files"]]
            await self._when_there_is_room(self._ledger.succeed, job_id, outputs)
        await self._call(self._trainings.remove, job_id)
        self._ring(job_id)

    async def flush_for_ever(self) -> None:
        """Write down what has advanced since the last time, all jobs in one transaction."""
        while True:
            await asyncio.sleep(FLUSH_SECONDS)
            advances, self._advances = self._advances, {}
            told, self._told = self._told, []
            if advances or told:
                try:
                    await self._when_there_is_room(self._ledger.advance, advances)
                    for job_id, kind, data in told:
                        await self._when_there_is_room(self._ledger.tell, job_id, kind, data)
                except Exception:
                    logger.exception("progress could not be recorded")
                for job_id in {*advances, *(job_id for job_id, _, _ in told)}:
                    self._ring(job_id)

    async def _outcome(self, task: asyncio.Task[dict[str, Any]], job_id: str) -> dict[str, Any]:
        try:
            return await task
        except JubakoError as error:
            return {"error": error.body()}
        except asyncio.CancelledError:
            if not task.cancelled():
                raise
            return {"error": Cancelled("the job was cancelled").body()}
        except Exception:
            logger.exception("job %s failed", job_id)
            return {"error": GenerationFailed("the job failed; the server's log says why").body()}

    async def _stage(self, record: Record, stage: int, earlier: list[dict[str, Any]]) -> dict[str, Any]:
        if record.work.training is not None:
            return await self._trained(record, record.work.training)
        jobs: list[Job] = await self._call(self._complete, record, stage, earlier)
        meter = _Meter(record, stage, partial(self._advance, record.id))
        try:
            async with asyncio.timeout(self._timeout), asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._made(job, meter)) for job in jobs]
        except ExceptionGroup as failures:
            await self._cancel(jobs)
            raise failures.exceptions[0] from None
        except TimeoutError:
            await self._cancel(jobs)
            raise TimedOut(f"no result after {self._timeout:g} s; cancelled") from None
        except asyncio.CancelledError:
            # Otherwise it is this gateway that ends; the jobs go on for whoever takes them over.
            if record.id in self._stopping:
                await self._cancel(jobs)
            raise
        outputs = [task.result() for task in tasks]
        if stage + 1 == len(stages_of(record.work)):
            outputs = await self._call(self._compared, record, outputs)
        return await self._held(record, outputs)

    async def _trained(self, record: Record, training: Training) -> dict[str, Any]:
        """No limit of time: it takes what it was asked to, and can be cancelled."""

        async def made() -> Output:
            result = await self._trainings.run(record.id, training, partial(self._hear, record))
            output: Output = await self._call(self._kept, result)
            return output

        try:
            # It is tried again as a whole, since it goes on where it was.
            output = await self._patient(made)
        except asyncio.CancelledError:
            if record.id in self._stopping:
                await self._call(self._trainings.remove, record.id)
            raise
        return await self._held(record, [output])

    def _hear(self, record: Record, kind: str, facts: Mapping[str, Any]) -> None:
        """Note what a training tells; its progress is that of its steps."""
        if kind != "progress":
            self._told.append((record.id, kind, facts))
            return
        (stage,) = stages_of(record.work)
        step = facts.get("step", 0)
        self._advance(record.id, Advance(0, step, stage.steps, NEARLY * step / stage.steps, facts=facts))

    async def _held(self, record: Record, outputs: Sequence[Output]) -> dict[str, Any]:
        await self._when_there_is_room(self._ledger.hold, record.id, outputs)
        return {"files": [output.model_dump(mode="json") for output in outputs]}

    async def _cancel(self, jobs: Sequence[Job]) -> None:
        await asyncio.gather(*(self._engine.cancel(job) for job in jobs))

    def _advance(self, job_id: str, advance: Advance) -> None:
        """Have this written down next; a preview that is not written down yet is not lost to a later step."""
        before = self._advances.get(job_id)
        if before is not None and not advance.preview:
            advance = replace(advance, preview=before.preview)
        self._advances[job_id] = advance

    def _complete(self, record: Record, stage: int, earlier: list[dict[str, Any]]) -> list[Job]:
        """The stage's jobs with the pictures that they start from."""
        jobs = stages_of(record.work)[stage].jobs
        if earlier:
            drawn = self._store.get(Output.model_validate(earlier[0]).digest)
            return [started_from(job, drawn) for job in jobs]
        pictures = {name: self._store.get(digest) for name, digest in record.work.pictures.items()}
        return [job.model_copy(update=pictures) if job.source is None else job for job in jobs]

    async def _made(self, job: Job, meter: _Meter) -> Output:
        """One job's files; tried again for as long as its family is away."""
        pause = FIRST_PAUSE
        while True:
            try:
                result = await self._result(job, meter)
            except FamilyUnavailable as error:
                logger.info("job %s waits: %s", job.id, error)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                output: Output = await self._when_there_is_room(self._kept, result)
                return output

    async def _when_there_is_room(self, work: Callable[..., Any], *arguments: Any) -> Any:
        return await self._patient(lambda: self._call(work, *arguments))

    async def _patient(self, attempt: Callable[[], Awaitable[T]]) -> T:
        """What the attempt gives, made again for as long as a disk is full: no job is lost for that."""
        told = ""
        while True:
            try:
                return await attempt()
            except DiskFull as error:
                if told != error.message:
                    logger.warning("jobs wait: %s", error)
                    told = error.message
                await asyncio.sleep(LONGEST_PAUSE)

    async def _result(self, job: Job, meter: _Meter) -> Result:
        async with aclosing(self._engine.events(job, durable=True)) as events:
            async for event in events:
                if isinstance(event, Result):
                    return event.checked()
                meter.tell(job, event)
        raise FamilyUnavailable(f"the family {job.family} gave no result")

    def _kept(self, result: Result) -> Output:
        def kept(content: bytes, content_type: str) -> Kept:
            digest = self._store.put(content)
            return Kept(digest=digest, content_type=content_type, bytes=len(content))

        variants = {name: kept(file.content, file.content_type) for name, file in result.variants.items()}
        main = kept(result.content, result.content_type)
        return Output(
            **main.model_dump(),
            seed=result.seed,
            timings=result.timings,
            variants=variants,
            fingerprint=result.fingerprint,
            flagged=result.flagged,
        )

    def _compared(self, record: Record, outputs: Sequence[Output]) -> Sequence[Output]:
        """The outputs with what they are very like of what their owner had made before."""
        if self._similarity is None or not all(output.fingerprint for output in outputs):
            return outputs
        prints = [Printed(record.id, index, output.fingerprint) for index, output in enumerate(outputs)]
        found = self._similarity.near(record.owner or "", prints)
        self._similarity.note(record.owner or "", prints)
        return [
            output.model_copy(update={"similar_to": similar})
            for output, similar in zip(outputs, found, strict=True)
        ]


class _Meter:
    """Adds up the steps of a stage's jobs, and its share of the whole."""

    def __init__(self, record: Record, stage: int, told: Callable[[Advance], None]) -> None:
        stages = stages_of(record.work)
        total = sum(each.steps for each in stages)
        self._stage = stage
        self._before = sum(each.steps for each in stages[:stage]) / total
        self._share = stages[stage].steps / total
        # Until its first step is told, a job's forwards are taken to be its steps.
        self._steps = {job.id: (0, job.num_inference_steps) for job in stages[stage].jobs}
        self._told = told

    def tell(self, job: Job, progress: Progress) -> None:
        """One more step of one of the jobs."""
        self._steps[job.id] = progress.step, progress.steps
        done = sum(step for step, _ in self._steps.values())
        steps = sum(steps for _, steps in self._steps.values())
        whole = min(self._before + self._share * done / steps, NEARLY)
        preview = base64.b64encode(progress.preview).decode()
        self._told(Advance(self._stage, done, steps, whole, preview))
