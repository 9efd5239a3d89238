"""What the gateway sees of a family's process: an address that answers as one does, or is made to fail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

from aiohttp import web
from server import free_port

from jubako.job import Job
from jubako.result import Progress, Result

__all__ = ["KEY", "STEPS", "Door", "doors"]

KEY = "jbk_secret-of-the-families-0123456789"
STEPS = 5


class Door:
    """What a family's process says of itself at an address; silent, it takes connections and says nothing."""

    def __init__(self, host: str, port: int) -> None:
        self.host, self.port = host, port
        self.url = f"http://{host}:{port}"
        self.ready, self.silent = True, False
        self.key = KEY
        self.jobs: set[str] = set()
        self.cancelled: list[str] = []
        self.hosts: set[str] = set()
        self.begun: list[Job] = []
        self.dies_after: int | None = None
        self.status = 200
        self.previewed: int | None = None
        self.runner: web.AppRunner | None = None

    async def open(self) -> None:
        app = web.Application()
        app.router.add_get("/readyz", self._readyz)
        app.router.add_post("/has_job", self._has_job)
        app.router.add_post("/cancel_job", self._cancel_job)
        app.router.add_post("/generate", self._generate)
        app.router.add_post("/generate_events", self._generate_events)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self.runner.setup()
        await web.TCPSite(self.runner, self.host, self.port).start()

    async def close(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    async def _readyz(self, _: web.Request) -> web.Response:
        if self.silent:
            await asyncio.sleep(60)
        return web.Response(status=200 if self.ready else 503)

    async def _asked(self, request: web.Request) -> dict[str, Any]:
        if self.silent:
            await asyncio.sleep(60)
        self.hosts.add(request.headers["Host"])
        if request.headers.get("Authorization") != f"Bearer {self.key}":
            raise web.HTTPUnauthorized
        assert request.content_type == "application/json"
        return dict(await request.json())

    async def _has_job(self, request: web.Request) -> web.Response:
        return web.json_response((await self._asked(request))["job_id"] in self.jobs)

    async def _cancel_job(self, request: web.Request) -> web.Response:
        self.cancelled.append((await self._asked(request))["job_id"])
        return web.json_response(data=True)

    async def _generate(self, request: web.Request) -> web.Response:
        job = await self._begun(request)
        if self.dies_after is not None:
            _hang_up(request)
        return web.json_response(self._result(job).model_dump(mode="json"), status=self.status)

    async def _generate_events(self, request: web.Request) -> web.StreamResponse:
        job = await self._begun(request)
        response = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await response.prepare(request)
        for step in range(1, STEPS + 1):
            await response.write(_line(Progress(job_id=job.id, step=step, steps=STEPS)))
            if step == self.previewed:
                await response.write(_line(Progress(job_id=job.id, step=step, steps=STEPS, preview=b"small")))
            if step == self.dies_after:
                _hang_up(request)
        await response.write(_line(self._result(job)))
        return response

    async def _begun(self, request: web.Request) -> Job:
        job = Job.model_validate((await self._asked(request))["job"])
        self.begun.append(job)
        return job

    def _result(self, job: Job) -> Result:
        return Result(job_id=job.id, seed=job.seed, content=self.url.encode())


def _line(event: Progress | Result) -> bytes:
    return event.model_dump_json().encode() + b"\n"


def _hang_up(request: web.Request) -> None:
    assert request.transport is not None
    request.transport.abort()
    raise ConnectionResetError


@asynccontextmanager
async def doors(*hosts: str) -> AsyncGenerator[list[Door], None]:
    port = free_port()
    async with AsyncExitStack() as stack:
        opened = [Door(host, port) for host in hosts]
        for door in opened:
            await door.open()
            stack.push_async_callback(door.close)
        yield opened
