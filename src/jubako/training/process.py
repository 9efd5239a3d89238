"""The trainer's process: started in a folder, listened to, stopped with its starter. No torch here."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from jubako.errors import GenerationFailed
from jubako.training.folder import Event, TrainingFolder

__all__ = ["COMPLETED", "FAILED", "NO_ROOM", "STOPPED", "train"]

COMPLETED, FAILED, STOPPED, NO_ROOM = 0, 1, 3, 4

LISTEN_SECONDS = 0.2
# Until the step at work is done and its checkpoint is on the disk.
STOP_SECONDS = 30.0
ROOM_SECONDS = 15.0
# Deaths without a checkpoint in between, after which it is given up: whatever kills it will do so again.
MOST_DEATHS = 3


async def train(
    folder: TrainingFolder, processes: int, on_event: Callable[[Event], None], busy: Callable[[], bool]
) -> None:
    """Have the adapter made; GenerationFailed when it can't be.

    A trainer that dies is started again and goes on from its last checkpoint; one that finds no room on its
    device or its disk is started again later. It waits between steps while others are ``busy``. Cancelled, it
    stops the trainer, whose checkpoints stay.
    """
    seen = folder.events.stat().st_size if folder.events.exists() else 0
    deaths, reached = 0, folder.latest_checkpoint()
    while True:
        process = await _started(folder.path, processes)
        try:
            seen = await _listen(folder, process, on_event, busy, seen)
        finally:
            await _stop(process)
        if process.returncode == COMPLETED:
            return
        if process.returncode == FAILED:
            raise GenerationFailed(_last_words(folder))
        if process.returncode == NO_ROOM:
            await asyncio.sleep(ROOM_SECONDS)
            continue
        if (now := folder.latest_checkpoint()) != reached:
            deaths, reached = 0, now
        deaths += 1
        if deaths >= MOST_DEATHS:
            raise GenerationFailed(f"the trainer ended {deaths} times at one place ({_ended(process)})")


async def _started(folder: Path, processes: int) -> asyncio.subprocess.Process:
    trainer = ["-m", "jubako.training", str(folder), "--parent", str(os.getpid())]
    if processes > 1:
        launcher = ["-m", "accelerate.commands.launch", "--num_processes", str(processes)]
        trainer = [*launcher, *trainer]
    with (folder / "trainer.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *trainer,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=_environment(os.environ),
            start_new_session=True,
        )


def _environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The server's own, without the numbers by which BentoML tells its workers and their GPUs apart."""
    return {name: value for name, value in environ.items() if not name.startswith("BENTOML_")}


async def _listen(
    folder: TrainingFolder,
    process: asyncio.subprocess.Process,
    on_event: Callable[[Event], None],
    busy: Callable[[], bool],
    seen: int,
) -> int:
    """Pass events on until the process has ended; the offset behind the last."""
    ended = asyncio.ensure_future(process.wait())
    try:
        while True:
            over = ended.done()
            folder.hold(busy() and not over)
            for after, event in await asyncio.to_thread(_events, folder, seen):
                seen = after
                on_event(event)
            if over:
                return seen
            await asyncio.wait({ended}, timeout=LISTEN_SECONDS)
    finally:
        ended.cancel()
        folder.hold(False)


def _events(folder: TrainingFolder, after: int) -> list[tuple[int, Event]]:
    return list(folder.read_events(after))


async def _stop(process: asyncio.subprocess.Process) -> None:
    """Have it end after its step, or else at once."""
    for number, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, None)):
        if process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), seconds)


def _last_words(folder: TrainingFolder) -> str:
    events = [event for _, event in folder.read_events() if event["type"] == "failed"]
    return str(events[-1]["message"]) if events else "the training failed; the server's log says why"


def _ended(process: asyncio.subprocess.Process) -> str:
    code = process.returncode or 0
    return f"status {code}" if code >= 0 else signal.Signals(-code).name
