"""What the gateway does with a family of several replicas: its turns, its failures, what it cancels."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from doors import KEY, STEPS, Door, doors
from pydantic import SecretStr
from starlette.types import Message, Receive, Scope, Send

from jubako.catalog import load_catalog
from jubako.errors import FamilyUnavailable
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Progress, Result
from jubako.services import family_service
from jubako.services.connection import ErrorShape
from jubako.services.demand import window_of
from jubako.services.families import Families
from jubako.services.remote_replicas import RemoteReplicas
from jubako.settings import load_settings

CATALOG = load_catalog()
SD, SDXL = family_service("sd"), family_service("sdxl")
JOB = plan(TextToImage(prompt="a red circle", model="tiny-sd", seed=7), CATALOG)


@asynccontextmanager
async def served() -> AsyncGenerator[tuple[Door, Door, Families], None]:
    """Two replicas of one family, and one of another, which is the second as well."""
    async with doors("127.0.0.1", "127.0.0.2") as (one, other):
        key = SecretStr(KEY)
        replicas = {
            "sd": RemoteReplicas("sd", [one.url, other.url], SD, key, 60),
            "sdxl": RemoteReplicas("sdxl", [other.url], SDXL, key, 60),
        }
        families = Families(replicas, CATALOG, load_settings({}))
        await families.open()
        try:
            yield one, other, families
        finally:
            await families.close()


async def run(families: Families, **changes: Any) -> Result:
    """A job's result, asked for by a request whose client stays."""
    outcome: list[Result | BaseException] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del scope, receive, send
        outcome.extend(
            await asyncio.gather(families.run(JOB.model_copy(update=changes)), return_exceptions=True)
        )

    async def stays() -> Message:
        await asyncio.Event().wait()
        raise AssertionError

    async def unheard(message: Message) -> None:
        del message

    await ErrorShape(app)({"type": "http", "headers": []}, stays, unheard)
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def checked(check: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(check())


def test_both_replicas_are_kept_full_and_one_that_dies_costs_nothing() -> None:
    async def check() -> None:
        async with served() as (one, other, families):
            window = window_of(CATALOG.families["sd"])
            assert families.queues["sd"].window == 2 * window
            results = await asyncio.gather(*(run(families, id=f"job{i}") for i in range(8)))
            assert {result.seed for result in results} == {JOB.seed}
            assert len(one.begun) == len(other.begun) == 4
            one.dies_after = 0
            results = await asyncio.gather(*(run(families, id=f"more{i}") for i in range(8)))
            assert {result.content.decode() for result in results} == {other.url}
            await one.close()
            while families.queues["sd"].window != window:
                await asyncio.sleep(0.05)

    checked(check)


def test_a_family_without_a_ready_replica_is_a_503_and_others_are_served() -> None:
    async def check() -> None:
        async with served() as (one, other, families):
            await one.close()
            other.ready = False
            while (await families.ready())["sd"]:
                await asyncio.sleep(0.05)
            with pytest.raises(FamilyUnavailable) as failure:
                await run(families)
            assert (failure.value.status, failure.value.code) == (503, "family_unavailable")
            assert failure.value.retry_after
            other.ready = True
            await one.open()
            one.ready = False
            while not (await families.ready())["sdxl"]:
                await asyncio.sleep(0.05)
            assert (await run(families, family="sdxl", model="tiny-sdxl")).error is None

    checked(check)


@pytest.mark.parametrize("durable", [False, True])
def test_closing_a_stream_cancels_its_job_where_it_is_unless_it_is_durable(*, durable: bool) -> None:
    async def check() -> None:
        async with served() as (one, other, families):
            async with aclosing(families.events(JOB, durable=durable)) as events:
                assert isinstance(await anext(events), Progress)
            begun, idle = (one, other) if one.begun else (other, one)
            assert begun.cancelled == ([] if durable else [JOB.id])
            assert not idle.begun
            assert not idle.cancelled
            await families.cancel(JOB)
            # Nobody waits for it here any more, so that it may be anywhere.
            assert idle.cancelled == [JOB.id]
            steps = [event async for event in families.events(JOB, durable=durable)]
            assert len(steps) == STEPS + 1

    checked(check)
