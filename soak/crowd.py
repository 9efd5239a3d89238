"""Clients of every kind at once: who wants a picture, who leaves, who cancels, who asks for nonsense."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp

from soak.gauge import Gauge
from soak.orders import Order

__all__ = ["LONG", "Crowd", "Tally"]

PATIENCE = 120
POLL_SECONDS = 0.1
LONG = {"prompt": "a large red circle", "num_inference_steps": 150}
READINGS = 100

NONSENSE: Sequence[tuple[str, Any, int]] = (
    ("/txt2img", {"prompt": "a star", "width": 10**6}, 400),
    ("/txt2img", {"prompt": "a star", "num_inference_steps": -1}, 400),
    ("/txt2img", {"prompt": "a star", "model": "nobody"}, 404),
    ("/txt2img", {"promt": "a star"}, 400),
    ("/txt2img", [], 400),
    ("/img2img", {"prompt": "a star", "image": "http://127.0.0.1:1/a.png"}, 400),
    ("/img2img", {"prompt": "a star", "image": "AAAA"}, 400),
    ("/v1/images/generations", {"prompt": "a star", "n": 10**6}, 400),
    ("/v1/images/generations", {"prompt": "a star", "size": "big"}, 400),
    ("/v1/jobs", {"task": "dance", "prompt": "a star"}, 400),
    ("/v1/jobs/00000000", None, 404),
    ("/v1/nothing", None, 404),
)


@dataclass
class Tally:
    """What became of everything that was asked for."""

    asked: Counter[str] = field(default_factory=Counter)
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    mixed_up: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    compared: int = 0

    @property
    def total(self) -> int:
        """Requests of every kind."""
        return self.asked.total()


class Crowd:
    """So many clients with one request at a time each, of a kind that chance (``seed``) chooses."""

    def __init__(self, client: aiohttp.ClientSession, orders: Sequence[Order], seed: int) -> None:
        self._client, self._orders = client, orders
        self._chance = Random(seed)  # noqa: S311 # it mixes requests
        self._kinds: dict[Callable[[], Awaitable[None]], int] = {
            self._picture: 50,
            self._openai: 10,
            self._job: 8,
            self._leaver: 8,
            self._cancelled_job: 4,
            self._too_late: 5,
            self._nonsense: 15,
        }
        self.tally = Tally()

    async def come(self, requests: int, clients: int, gauge: Gauge) -> Tally:
        """Ask so often in all, and read the gauge now and then."""
        numbers = itertools.count()
        every = max(1, requests // READINGS)

        async def one() -> None:
            while (number := next(numbers)) < requests:
                if number % every == 0:
                    gauge.read(number)
                kind = self._chance.choices(list(self._kinds), list(self._kinds.values()))[0]
                name = kind.__name__.strip("_")
                self.tally.asked[name] += 1
                try:
                    async with asyncio.timeout(PATIENCE):
                        await kind()
                except (TimeoutError, aiohttp.ClientError) as error:
                    self.tally.lost.append(f"{name}: {type(error).__name__} {error}")

        await asyncio.gather(*(one() for _ in range(clients)))
        gauge.read(requests)
        return self.tally

    async def _picture(self) -> None:
        order = self._chance.choice(self._orders)
        async with self._client.post(order.path, json=order.fields) as reply:
            content = await reply.read()
            if self._as_expected(reply, {200}):
                self._compare(order, content)
                if reply.headers["X-Seed"] != str(order.fields["seed"]):
                    self.tally.mixed_up.append(f"the seed of {order}")

    async def _openai(self) -> None:
        order = self._chance.choice([each for each in self._orders if each.path == "/txt2img"])
        async with self._client.post("/v1/images/generations", json=order.fields) as reply:
            body = await reply.json()
            if self._as_expected(reply, {200}):
                self._compare(order, base64.b64decode(body["data"][0]["b64_json"]))

    async def _job(self) -> None:
        order = self._chance.choice(self._orders)
        job_id = await self._submitted({"task": order.path[1:], **order.fields})
        job = await self._ended(job_id)
        if job["state"] != "succeeded":
            self.tally.lost.append(f"job {job_id} has {job['state']}: {job['error']}")
            return
        async with self._client.get(f"/v1/jobs/{job_id}/result") as reply:
            self._compare(order, await reply.read())
        async with self._client.get(f"/v1/jobs/{job_id}/events") as reply:
            ends = (await reply.text()).count("event: completed")
        if ends != 1 or len(job["outputs"]) != 1:
            self.tally.doubled.append(f"job {job_id}: {ends} ends, {len(job['outputs'])} outputs")

    async def _leaver(self) -> None:
        asking = asyncio.ensure_future(self._client.post("/txt2img", json=LONG))
        await asyncio.sleep(0.3 * self._chance.random())
        asking.cancel()

    async def _cancelled_job(self) -> None:
        job_id = await self._submitted({"task": "txt2img", **LONG})
        await asyncio.sleep(0.5 * self._chance.random())
        async with self._client.delete(f"/v1/jobs/{job_id}") as reply:
            self._as_expected(reply, {200})
        job = await self._ended(job_id)
        if job["state"] != "cancelled":
            self.tally.unexpected.append(f"a cancelled job has {job['state']}")

    async def _too_late(self) -> None:
        headers = {"X-Request-Deadline": "0.001"}
        async with self._client.post("/txt2img", json=LONG, headers=headers) as reply:
            await reply.read()
            if self._as_expected(reply, {429}) and int(reply.headers["Retry-After"]) < 1:
                self.tally.unexpected.append("429 without the time to come again")

    async def _nonsense(self) -> None:
        path, body, status = self._chance.choice(NONSENSE)
        method = "GET" if body is None else "POST"
        async with self._client.request(method, path, json=body) as reply:
            text = await reply.text()
            if self._as_expected(reply, {status}):
                error = json.loads(text)["error"]
                if error.keys() != {"message", "type", "param", "code"}:
                    self.tally.unexpected.append(f"{path}: another shape of error: {text}")

    async def _submitted(self, fields: dict[str, Any]) -> str:
        headers = {"Idempotency-Key": str(uuid.UUID(int=self._chance.getrandbits(128)))}
        async with self._client.post("/v1/jobs", json=fields, headers=headers) as reply:
            reply.raise_for_status()
            return str((await reply.json())["id"])

    async def _ended(self, job_id: str) -> dict[str, Any]:
        while True:
            async with self._client.get(f"/v1/jobs/{job_id}") as reply:
                job: dict[str, Any] = await reply.json()
            if job["state"] not in {"queued", "running"}:
                return job
            await asyncio.sleep(POLL_SECONDS)

    def _compare(self, order: Order, content: bytes) -> None:
        self.tally.compared += 1
        if not order.is_shown_by(content):
            self.tally.mixed_up.append(str(order))

    def _as_expected(self, reply: aiohttp.ClientResponse, statuses: set[int]) -> bool:
        if reply.status not in statuses:
            self.tally.unexpected.append(f"{reply.status} from {reply.url.path}, not {statuses}")
        return reply.status in statuses
