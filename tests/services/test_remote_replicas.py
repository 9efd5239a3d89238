"""Replicas elsewhere, which are addresses of this machine: found, known by their answers, asked for jobs."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest
from doors import KEY, doors
from pydantic import SecretStr

from jubako.catalog import load_catalog
from jubako.errors import FamilyUnavailable
from jubako.fair_queue import Ask
from jubako.job import Job
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.services import family_service, remote_replicas
from jubako.services.remote_replicas import RemoteReplicas

SD = family_service("sd")
JOB = plan(TextToImage(prompt="a red circle", model="tiny-sd", seed=7), load_catalog())
GRACE = 3.0


@asynccontextmanager
async def replicas_at(*urls: str) -> AsyncGenerator[RemoteReplicas, None]:
    replicas = RemoteReplicas("sd", urls, SD, SecretStr(KEY), GRACE)
    try:
        await replicas.look()
        yield replicas
    finally:
        await replicas.close()


def names(replicas: RemoteReplicas) -> set[str]:
    return {replica.name for replica in replicas.ready}


def checked(check: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(check())


def test_each_address_of_a_name_is_a_replica_and_they_come_and_go(monkeypatch: pytest.MonkeyPatch) -> None:
    addresses = ["127.0.0.1"]

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        assert host == "sd.families"
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no such name")
        kinds = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in addresses]
        return [(kind, 1, 6, "", (address, 0)) for kind, address in zip(kinds, addresses, strict=True)]

    async def check() -> None:
        async with doors("127.0.0.1", "127.0.0.2") as (one, two):
            monkeypatch.setattr(socket, "getaddrinfo", resolve)
            async with replicas_at(f"http://sd.families:{one.port}") as replicas:
                assert names(replicas) == {one.url}
                addresses[:] = ["::1", "127.0.0.2", "127.0.0.1"]
                await replicas.look()
                assert names(replicas) == {one.url, two.url}
                # It is called by the name, as whoever stands before it goes by that.
                assert one.hosts == {f"sd.families:{one.port}"}
                addresses[:] = []
                await replicas.look()
                assert names(replicas) == {one.url, two.url}
                addresses[:] = ["127.0.0.2"]
                (leaving,) = [replica for replica in replicas.ready if replica.name == one.url]
                with replicas.at_work(leaving, Ask(1.0, 1), "j"):
                    await replicas.look()
                    assert names(replicas) == {two.url}
                    await replicas.cancel("j")
                    assert (one.cancelled, two.cancelled) == (["j"], [])

    monkeypatch.setattr(remote_replicas, "RESOLVE_SECONDS", 0.0)
    checked(check)


def test_one_that_is_not_ready_or_is_gone_is_given_nothing_new() -> None:
    async def check() -> None:
        async with doors("127.0.0.1", "127.0.0.2") as (one, two), replicas_at(one.url, two.url) as replicas:
            one.ready = False
            await replicas.look()
            assert names(replicas) == {two.url}
            assert {replicas.choose().name for _ in range(4)} == {two.url}
            one.ready = True
            await replicas.look()
            (dying,) = [replica for replica in replicas.ready if replica.name == two.url]
            await two.close()
            assert await dying.failed(ConnectionResetError("by peer"))
            assert names(replicas) == {one.url}
            one.ready = False
            await replicas.look()
            assert not await replicas.answer()
            with pytest.raises(FamilyUnavailable, match="no replica of the family sd is ready"):
                replicas.choose()
            await two.open()
            await replicas.look()
            assert names(replicas) == {two.url}

    checked(check)


def test_one_of_another_key_is_given_nothing_and_the_log_says_why(caplog: pytest.LogCaptureFixture) -> None:
    async def check() -> None:
        async with doors("127.0.0.1") as (door,):
            door.key = KEY.upper()
            async with replicas_at(door.url) as replicas:
                assert not replicas.ready
                await replicas.look()
                # It has none of our jobs, so that nobody waits for it.
                with pytest.raises(FamilyUnavailable, match="no replica"):
                    await replicas.keeper(JOB)
                door.key = KEY
                await replicas.look()
                assert replicas.ready

    with caplog.at_level(logging.INFO, "jubako"):
        checked(check)
    told = [
        record.getMessage() for record in caplog.records if "JUBAKO_FAMILY_KEY (401)" in record.getMessage()
    ]
    assert len(told) == 1


def test_a_probe_that_was_missed_is_no_death_but_three_are() -> None:
    async def check() -> None:
        async with doors("127.0.0.1") as (door,), replicas_at(door.url) as replicas:
            door.silent = True
            ready = []
            for _ in range(3):
                await replicas.look()
                ready.append(bool(replicas.ready))
            assert ready == [True, True, False]

    checked(check)


def test_a_durable_job_is_followed_where_it_is_and_begun_elsewhere_only_when_that_one_is_gone() -> None:
    async def keeper(replicas: RemoteReplicas, job: Job = JOB) -> str:
        return (await replicas.keeper(job)).name

    async def check() -> None:
        async with doors("127.0.0.1", "127.0.0.2") as (one, two), replicas_at(one.url, two.url) as replicas:
            two.jobs.add(JOB.id)
            for _ in range(3):
                assert await keeper(replicas) == two.url
            # It stops: what it has it ends.
            two.ready = False
            await replicas.look()
            assert await keeper(replicas) == two.url
            # It may live, and the job with it.
            two.silent = True
            with pytest.raises(FamilyUnavailable, match="is silent"):
                await keeper(replicas)
            # So long without anybody who follows it, it would have cancelled the job.
            await asyncio.sleep(GRACE)
            assert await keeper(replicas) == one.url
            two.silent = False
            await replicas.look()
            assert await keeper(replicas) == two.url
            # Nobody is there any more.
            await two.close()
            assert await keeper(replicas) == one.url

    checked(check)
