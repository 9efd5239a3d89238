"""A job belongs to the key that it came with: to every other key it is as if it had never been."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from api_keys import KEYS
from served_routes import served_routes
from server import Server

from jubako.jobs.ledger import Ledger
from jubako.jobs.record import TRAINING, Output, Record, Training, Work
from jubako.jobs.store import FileStore
from jubako.jobs.tables import database_url, open_database

READS = 1000
CAPTION = "a large red circle on the left of a blue background"
PLAN = {"model": "tiny-sd", "steps": 6, "seed": 1, "trigger": "zog", "batch_size": 1}


@pytest.fixture(scope="module")
def people(guarded: Server) -> Iterator[Mapping[str, httpx.Client]]:
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                httpx.Client(base_url=guarded.url, headers=KEYS[name].headers, timeout=60)
            )
            for name in ("alice", "bob", "root")
        }


@pytest.fixture(scope="module")
def kept(guarded: Server) -> Iterator[tuple[Ledger, FileStore]]:
    """The ledger and the files of the running server."""
    home = guarded.log.parent / "jubako"
    engine = open_database(database_url(None, home))
    yield Ledger(engine), FileStore(home / "files")
    engine.dispose()


@pytest.fixture(scope="module")
def jobs_of_alice(kept: tuple[Ledger, FileStore], record: Callable[..., Record]) -> list[Record]:
    """Jobs of every kind that have succeeded, with their results."""
    ledger, store = kept
    training = Work(training=Training(name="zog", plan=PLAN))
    kinds: list[dict[str, Any]] = [
        {"task": "txt2img"},
        {"task": "txt2vid"},
        {"task": TRAINING, "family": TRAINING, "work": training},
    ]
    made = []
    for number in range(60):
        one = record(owner="alice", **kinds[number % len(kinds)])
        ledger.add(one)
        ledger.begin(one.id)
        digest = store.put(f"the result of {number}".encode())
        ledger.succeed(one.id, [Output(digest=digest, content_type="image/png", bytes=9, seed=7)])
        made.append(one)
    return made


def test_another_key_s_jobs_are_not_there(
    people: Mapping[str, httpx.Client], jobs_of_alice: list[Record]
) -> None:
    chance = random.Random(7)
    routes = [route for route in served_routes() if "{job_id}" in route.path]
    assert {route.method for route in routes} == {"GET", "POST", "DELETE"}
    answers: Counter[str] = Counter()
    for _ in range(READS):
        route, job = chance.choice(routes), chance.choice(jobs_of_alice)
        reply = people["bob"].request(route.method, route.at(job.id))
        assert reply.status_code == 404, (route, reply.text)
        error = reply.json()["error"]
        assert (error["code"], error["message"]) == ("job_not_found", f"there is no job {job.id!r}")
        answers[route.path] += 1
    assert len(answers) == len({route.path for route in routes})
    for route in routes:
        if route.method == "GET":
            for name in ("alice", "root"):
                found = {people[name].get(route.at(job.id)).status_code for job in jobs_of_alice[:3]}
                assert 200 in found, (name, route)
    assert {job.id for job in jobs_of_alice[:20]} <= ids(people["alice"], "/v1/jobs")


def ids(client: httpx.Client, path: str) -> set[str]:
    reply = client.get(path, params={"limit": 100}).raise_for_status()
    return {entry["id"] for entry in reply.json()["data"]}


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/videos", "/v1/fine_tuning/jobs"])
def test_lists_have_the_caller_s_own_jobs_and_the_admin_s_all(
    people: Mapping[str, httpx.Client], jobs_of_alice: list[Record], path: str
) -> None:
    of_alice = ids(people["alice"], path)
    assert of_alice
    assert of_alice <= ids(people["root"], path)
    assert not of_alice & ids(people["bob"], path)
    behind = people["bob"].get(path, params={"after": next(iter(of_alice))})
    assert (behind.status_code, behind.json()["error"]["code"]) == (404, "job_not_found")


def submit(client: httpx.Client, **headers: str) -> httpx.Response:
    fields = {"task": "txt2img", "prompt": CAPTION, "steps": 2}
    return client.post("/v1/jobs", json=fields, headers=headers)


def test_what_one_key_submits_it_alone_follows_fetches_and_cancels(
    people: Mapping[str, httpx.Client],
) -> None:
    job = submit(people["alice"]).json()
    here = job["links"]["self"]
    assert people["bob"].delete(here).status_code == 404
    deadline = time.monotonic() + 60
    while (state := people["alice"].get(here).json()["state"]) != "succeeded":
        assert state in {"queued", "running"}, "another's cancel has had an effect"
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert people["alice"].get(f"{here}/result").status_code == 200
    assert people["root"].get(f"{here}/result").status_code == 200
    for path in (here, f"{here}/result", f"{here}/events"):
        assert people["bob"].get(path).status_code == 404


def test_an_idempotency_key_is_its_owner_s(people: Mapping[str, httpx.Client]) -> None:
    headers = {"Idempotency-Key": "order-7"}
    first, again, other, admin = (
        submit(people[name], **headers).json()["id"] for name in ("alice", "alice", "bob", "root")
    )
    assert first == again
    assert len({first, other, admin}) == 3
