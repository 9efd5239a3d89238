"""What is done to a server at work: clients that all leave, a family that is killed, a rolling restart."""

from __future__ import annotations

import asyncio
import itertools
import re
import signal
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from time import monotonic
from typing import Any

import aiohttp

from benchmarks.server import Served, served
from soak.crowd import LONG
from soak.verdict import Verdict

__all__ = ["clients_left", "family_killed", "rolled", "started"]

SHORT = {"prompt": "a small blue star", "num_inference_steps": 2}
OTHER = "tiny-sdxl-lightning"
QUIET_SECONDS = 2.0
PATIENCE = 180


async def clients_left(server: Served, clients: int, seconds: float) -> list[Verdict]:
    """So many clients leave while their pictures are drawn: how long until the engine rests?"""
    async with _client(server) as client:
        asking = [asyncio.create_task(_status(client, "/txt2img", LONG)) for _ in range(clients)]
        await asyncio.sleep(seconds)
        before, since = await _forwards(client), monotonic()
        await asyncio.sleep(1)
        forwards, left = await _forwards(client), monotonic()
        if forwards == before:
            raise RuntimeError("nothing was drawn when the clients left")
        step = (left - since) / (forwards - before)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        last = left
        while monotonic() < last + QUIET_SECONDS:
            await asyncio.sleep(0.02)
            if (now := await _forwards(client)) != forwards:
                forwards, last = now, monotonic()
    past = last - left - step
    return [Verdict("seconds to rest after all clients left, past one step", past, 0.5, clients)]


async def family_killed(server: Served, seconds: float, every: float) -> list[Verdict]:
    """One family is killed again and again: are others served, and are its own jobs done in the end?"""
    end = monotonic() + seconds
    others: list[int] = []
    jobs: list[str] = []
    async with _client(server) as client:

        async def ask_another() -> None:
            while monotonic() < end:
                others.append(await _status(client, "/txt2img", {"prompt": "a star", "model": OTHER}))

        async def submit() -> None:
            while monotonic() < end:
                job = {"task": "txt2img", **SHORT, "seed": len(jobs)}
                async with client.post("/v1/jobs", json=job) as reply:
                    jobs.append((await reply.json())["id"])
                await asyncio.sleep(0.5)

        async def kill() -> None:
            while monotonic() + every < end:
                await asyncio.sleep(every)
                for worker in server.workers("SD"):
                    worker.kill()

        await asyncio.gather(ask_another(), ask_another(), submit(), kill())
        states = [await _end_of(client, job) for job in jobs]
    failed = sum(status != 200 for status in others)
    print(f"  answers of the other family: {dict(Counter(others))}")
    return [
        Verdict("requests to another family that failed while one was killed", failed, 0, len(others)),
        Verdict("jobs of the killed family that were not done", _not_done(states), 0, len(states)),
    ]


async def started(starts: int, requests: int) -> list[Verdict]:
    """A server is started again and again, and asked as soon as it says that it is ready."""
    statuses: list[int] = []
    for _ in range(starts):
        with served(OMP_NUM_THREADS="1") as server:
            async with _client(server) as client:
                asking = (_status(client, "/txt2img", SHORT) for _ in range(requests))
                statuses += await asyncio.gather(*asking)
    failed = sum(status != 200 for status in statuses)
    return [Verdict("requests that failed right after a start", failed, 0, len(statuses))]


async def rolled(probes: int) -> list[Verdict]:
    """Two replicas are restarted one after the other, under requests to those that are ready."""
    statuses: list[int] = []
    settings = {"JUBAKO_STOP_DELAY": "2", "OMP_NUM_THREADS": "1"}
    async with AsyncExitStack() as stack:
        replicas = [await stack.enter_async_context(_replica(None, settings)) for _ in range(2)]
        clients = [await stack.enter_async_context(_client(server)) for server in replicas]
        ready = [asyncio.Event() for _ in replicas]
        rolling = asyncio.create_task(_restart_each(stack, replicas, settings, ready))
        watching = [asyncio.create_task(_watch(clients[i], ready[i])) for i in range(2)]
        turns = itertools.cycle(range(2))
        while len(statuses) < probes or not rolling.done():
            chosen = next(turns)
            if ready[chosen].is_set():
                statuses.append(await _status(clients[chosen], "/txt2img", SHORT))
            await asyncio.sleep(0.01)
        for task in watching:
            task.cancel()
        rolling.result()
    failed = sum(status != 200 for status in statuses)
    return [Verdict("requests lost while two replicas were restarted", failed, 0, len(statuses))]


async def _restart_each(
    stack: AsyncExitStack, replicas: list[Served], settings: Mapping[str, str], ready: list[asyncio.Event]
) -> None:
    for i, server in enumerate(replicas):
        server.process.send_signal(signal.SIGTERM)
        await asyncio.to_thread(server.process.wait)
        port = int(server.url.rpartition(":")[2])
        await stack.enter_async_context(_replica(port, settings))
        await ready[i].wait()


@asynccontextmanager
async def _replica(port: int | None, settings: Mapping[str, str]) -> AsyncIterator[Served]:
    replica = served(port=port, **settings)
    server = await asyncio.to_thread(replica.__enter__)
    try:
        yield server
    finally:
        await asyncio.to_thread(replica.__exit__, None, None, None)


async def _watch(client: aiohttp.ClientSession, ready: asyncio.Event) -> None:
    """What a balancer does: ask often whether it is ready."""
    while True:
        if await _status(client, "/readyz") == 200:
            ready.set()
        else:
            ready.clear()
        await asyncio.sleep(0.25)


def _client(server: Served) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(server.url, connector=aiohttp.TCPConnector(limit=0))


async def _status(client: aiohttp.ClientSession, path: str, fields: dict[str, Any] | None = None) -> int:
    """The status of the answer; 0 without one."""
    method = "GET" if fields is None else "POST"
    with suppress(aiohttp.ClientError):
        async with client.request(method, path, json=fields) as reply:
            await reply.read()
            return reply.status
    return 0


async def _forwards(client: aiohttp.ClientSession) -> int:
    async with client.get("/metrics") as reply:
        counts = re.findall(
            r'^jubako_forward_rows_count\{family="sd"\S* (\S+)$', await reply.text(), re.MULTILINE
        )
    return int(sum(map(float, counts)))


async def _end_of(client: aiohttp.ClientSession, job_id: str) -> str:
    deadline = monotonic() + PATIENCE
    state = "queued"
    while state in {"queued", "running"} and monotonic() < deadline:
        async with client.get(f"/v1/jobs/{job_id}") as reply:
            state = str((await reply.json())["state"])
        await asyncio.sleep(0.05)
    return state


def _not_done(states: list[str]) -> int:
    return sum(state != "succeeded" for state in states)
