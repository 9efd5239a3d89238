"""A job whose replica dies is begun on another, so often and no oftener; a durable one where it is."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from doors import KEY, STEPS, Door, doors
from pydantic import SecretStr

from jubako.catalog import load_catalog
from jubako.errors import FamilyUnavailable
from jubako.fair_queue import Ask
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.result import Progress
from jubako.services import family_service, remote_replicas
from jubako.services.dispatch import TRIES, generated, heard
from jubako.services.remote_replicas import RemoteReplicas
from jubako.services.replicas import FAILURES

SD = family_service("sd")
JOB = plan(TextToImage(prompt="a red circle", model="tiny-sd", seed=7), load_catalog())
ASK = Ask(1.0, 1)


@asynccontextmanager
async def two() -> AsyncGenerator[tuple[Door, Door, RemoteReplicas], None]:
    async with doors("127.0.0.1", "127.0.0.2") as (one, other):
        replicas = RemoteReplicas("sd", [one.url, other.url], SD, SecretStr(KEY), 60)
        try:
            await replicas.look()
            yield one, other, replicas
        finally:
            await replicas.close()


async def drawn(replicas: RemoteReplicas) -> tuple[str, int]:
    result = await generated(replicas, JOB, ASK, batched=False)
    return result.content.decode(), result.seed


async def told(replicas: RemoteReplicas, *, durable: bool) -> list[int | str]:
    aborted = None if durable else asyncio.get_running_loop().create_future()
    return [
        event.step if isinstance(event, Progress) else event.content.decode()
        async for event in heard(replicas, JOB, ASK, aborted=aborted)
    ]


def checked(check: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(check())


def test_what_a_replica_has_not_answered_is_begun_again_on_another() -> None:
    async def check() -> None:
        async with two() as (one, other, replicas):
            one.dies_after = 0
            assert [await drawn(replicas) for _ in range(4)] == [(other.url, JOB.seed)] * 4
            assert one.begun
            assert one.begun[0] == other.begun[0] == JOB
            await other.close()
            one.dies_after = None
            assert await drawn(replicas) == (one.url, JOB.seed)

    checked(check)


def test_the_preview_of_a_step_that_was_told_already_is_passed_on() -> None:
    async def check() -> None:
        async with two() as (one, other, replicas):
            one.previewed = other.previewed = 2
            for aborted in (None, asyncio.get_running_loop().create_future()):
                events = [event async for event in heard(replicas, JOB, ASK, aborted=aborted)]
                previews = [event.preview for event in events if isinstance(event, Progress)]
                assert previews.count(b"small") == 1
                assert len(previews) == len(set(previews)) + STEPS - 1

    checked(check)


def test_a_job_that_kills_processes_is_begun_so_often_and_no_oftener() -> None:
    async def check() -> None:
        async with two() as (one, other, replicas):
            one.dies_after = other.dies_after = 0
            with pytest.raises(FAILURES):
                await drawn(replicas)
            assert len(one.begun) + len(other.begun) == TRIES
            assert min(len(one.begun), len(other.begun)) == 1

    checked(check)


def test_an_error_that_a_replica_answers_with_is_not_tried_again() -> None:
    async def check() -> None:
        async with two() as (one, other, replicas):
            await one.close()
            await replicas.look()
            other.status = 500
            with pytest.raises(FAILURES):
                await drawn(replicas)
            assert len(other.begun) == 1
            assert replicas.ready

    checked(check)


def test_one_whose_key_was_changed_is_tried_once_and_then_left_alone() -> None:
    async def check() -> None:
        async with two() as (one, other, replicas):
            one.key = KEY.upper()
            assert {await drawn(replicas) for _ in range(3)} == {(other.url, JOB.seed)}
            await replicas.look()
            assert [replica.name for replica in replicas.ready] == [other.url]

    checked(check)


def test_what_a_silent_replica_has_goes_to_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_replicas, "LOST_SECONDS", 1.0)

    async def check() -> None:
        async with two() as (one, other, replicas):
            one.silent = True
            drawing = asyncio.ensure_future(drawn(replicas))
            while not drawing.done():
                await replicas.look()
            assert await drawing == (other.url, JOB.seed)

    checked(check)


def test_a_stream_goes_on_with_the_steps_that_were_not_told() -> None:
    async def check() -> None:
        async with two() as (one, other, replicas):
            one.dies_after = 2
            assert await told(replicas, durable=False) == [*range(1, STEPS + 1), other.url]
            assert (len(one.begun), len(other.begun)) == (1, 1)

    checked(check)


def test_a_durable_job_is_not_begun_elsewhere_while_its_replica_may_have_it() -> None:
    async def check() -> None:
        async with two() as (one, other, replicas):
            one.dies_after = 2
            with pytest.raises(FAILURES):
                await told(replicas, durable=True)
            assert not other.begun
            one.dies_after = None
            one.jobs.add(JOB.id)
            assert (await told(replicas, durable=True))[-1] == one.url
            one.silent = True
            with pytest.raises(FamilyUnavailable):
                await told(replicas, durable=True)
            assert not other.begun
            await one.close()
            assert (await told(replicas, durable=True))[-1] == other.url

    checked(check)
