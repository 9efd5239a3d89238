"""A system in a process of its own, so that the systems compared share neither threads nor a lock.

This is more than tidiness. OpenMP keeps a pool of threads for each thread that computes, and as soon as a
process has more of them than the machine has cores, they no longer spin but sleep between any two parallel
regions: with two pools on two cores, small forwards take twice as long. Systems that share a process would
slow each other down.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.traffic import Answer, Request, System

__all__ = ["in_a_process"]

READY = -1


def in_a_process(system: System) -> System:
    """The same system, but running in a process of its own; ``system`` is a function of a module."""

    @asynccontextmanager
    async def elsewhere(model: str, threads: int) -> AsyncIterator[Answer]:
        context = get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, system, model, threads))
        process.start()
        theirs.close()
        line = _Line(ours)
        try:
            await line.ready
            yield line.ask
        finally:
            line.hang_up()
            await asyncio.to_thread(process.join)

    return elsewhere


class _Line:
    """Our end: numbers the requests and gives each reply to whoever waits for it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self.ready = self._expect(READY)
        self._listener = ThreadPoolExecutor(1, "listener")
        self._listener.submit(self._listen)

    async def ask(self, request: Request) -> bytes:
        number = next(self._numbers)
        reply = self._expect(number)
        self._connection.send((number, request))
        picture: bytes = await reply
        return picture

    def hang_up(self) -> None:
        with suppress(BrokenPipeError):  # it may be gone already
            self._connection.send(None)
        self._listener.shutdown()

    def _expect(self, number: int) -> asyncio.Future[Any]:
        self._waiting[number] = self._loop.create_future()
        return self._waiting[number]

    def _listen(self) -> None:
        while True:
            try:
                message = self._connection.recv()
            except EOFError:
                self._loop.call_soon_threadsafe(self._lost)
                return
            self._loop.call_soon_threadsafe(self._deliver, *message)

    def _deliver(self, number: int, picture: bytes | None, error: str) -> None:
        waiting = self._waiting.pop(number)
        if error:
            waiting.set_exception(RuntimeError(error))
        else:
            waiting.set_result(picture)

    def _lost(self) -> None:
        for waiting in self._waiting.values():
            waiting.set_exception(RuntimeError("the system's process has ended"))
        self._waiting.clear()


def _work(connection: Connection, system: System, model: str, threads: int) -> None:
    asyncio.run(_serve(connection, system(model, threads)))


async def _serve(connection: Connection, system: AbstractAsyncContextManager[Answer]) -> None:
    """Their end: answer until told to stop."""
    loop = asyncio.get_running_loop()
    listener = ThreadPoolExecutor(1, "listener")
    tasks: set[asyncio.Task[None]] = set()
    async with system as answer:
        connection.send((READY, None, ""))
        while (message := await loop.run_in_executor(listener, connection.recv)) is not None:
            task = asyncio.create_task(_reply(connection, answer, *message))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)
    listener.shutdown()
    connection.close()


async def _reply(connection: Connection, answer: Answer, number: int, request: Request) -> None:
    try:
        connection.send((number, await answer(request), ""))
    except Exception as error:  # noqa: BLE001 # it is raised again where the request came from
        connection.send((number, None, f"{type(error).__name__}: {error}"))
