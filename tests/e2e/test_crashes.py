"""Processes are killed while jobs wait and run: every job succeeds, once, with its own picture.

Pictures are judged by what they show, and every job has another caption.
"""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
import sqlalchemy as sa
from databases import postgresql
from PIL import Image
from server import Server, serving

from jubako.jobs.tables import database_url
from jubako.miniatures.reader import shows
from jubako.miniatures.world import random_scene

HERE = Path(__file__).parent
JOBS = 60
STEPS = 5
KILLS = 8
PATIENCE = 240


@dataclass(frozen=True)
class Order:
    """A picture that the model is known to get right, from which nobody else's can be taken for it."""

    caption: str
    seed: int

    @property
    def request(self) -> dict[str, Any]:
        return {"prompt": self.caption, "seed": self.seed, "num_inference_steps": STEPS}

    def is_shown_by(self, content: bytes) -> bool:
        with Image.open(io.BytesIO(content)) as image:
            return shows(image, self.caption).ok


def orders(server: Server, count: int) -> list[Order]:
    """Different captions that the synchronous route draws right."""
    rng = np.random.default_rng(11)
    captions = list(dict.fromkeys(random_scene(rng, 1).caption() for _ in range(count * 3 // 2)))
    wanted = [Order(caption, seed) for seed, caption in enumerate(captions)]

    def right(order: Order) -> bool:
        return order.is_shown_by(server.post("/txt2img", order.request).raise_for_status().content)

    with ThreadPoolExecutor(16) as threads:
        fine = [order for order, ok in zip(wanted, threads.map(right, wanted), strict=True) if ok]
    assert len(fine) >= count, "the model draws too few of them right"
    return fine[:count]


def submit(server: Server, order: Order) -> str:
    """The id of the order's job. A gateway that is just away is asked again, for the same job by its key."""
    headers = {"Idempotency-Key": f"{order.seed}-{order.caption.replace(' ', '-')}"}
    body = {"task": "txt2img", **order.request}
    deadline = time.monotonic() + 60
    while True:
        try:
            reply = httpx.post(f"{server.url}/v1/jobs", json=body, headers=headers, timeout=20)
        except httpx.TransportError:
            assert time.monotonic() < deadline, server.tail()
            time.sleep(0.2)
        else:
            assert reply.status_code == 202, reply.text
            return str(reply.json()["id"])


def workers(server: Server, service: str) -> list[psutil.Process]:
    """The processes of a service of this server."""
    found = []
    for process in psutil.Process(server.process.pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        if service in words and "--service-name" in words:
            found.append(process)
    return found


@contextmanager
def killing(victims: Sequence[tuple[Server, str]], every: float, times: int) -> Iterator[list[str]]:
    """SIGKILL these in turn so many times, or until the block ends; the names of those that were.

    It ends because a family needs some 8 s of a core to import its libraries: where it gets less than that
    between two of its deaths, it never comes to its first step.
    """
    killed: list[str] = []
    stop = threading.Event()

    def run() -> None:
        for server, service in itertools.islice(itertools.cycle(victims), times):
            if stop.wait(every):
                return
            for process in workers(server, service):
                process.kill()
                killed.append(service)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        stop.set()
        thread.join()


def listed(server: Server) -> dict[str, dict[str, Any]]:
    """All jobs by id, in pages; waits for a gateway that is just away."""
    deadline = time.monotonic() + 60
    while True:
        try:
            page = httpx.get(f"{server.url}/v1/jobs", params={"limit": 100}, timeout=5).raise_for_status()
        except httpx.HTTPError:
            assert time.monotonic() < deadline, server.tail()
            time.sleep(0.2)
        else:
            return {job["id"]: job for job in page.json()["data"]}


def wait_for_all(server: Server, ids: Sequence[str]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        jobs = listed(server)
        states = Counter(jobs[job_id]["state"] for job_id in ids)
        if states["succeeded"] == len(ids):
            return
        assert not {"failed", "cancelled"} & set(states), states
        assert time.monotonic() < deadline, f"{states}\n{server.tail()}"
        time.sleep(1)


def check_results(server: Server, ordered: dict[str, Order]) -> None:
    """Each job has one result, its own, and one end among its events."""
    with httpx.Client(base_url=server.url, timeout=30) as client:
        for job_id, order in ordered.items():
            result = client.get(f"/v1/jobs/{job_id}/result").raise_for_status()
            assert result.headers["x-seed"] == str(order.seed)
            assert order.is_shown_by(result.content), f"{order.caption} got another's picture"
            kinds = [
                line.removeprefix("event: ")
                for line in client.get(f"/v1/jobs/{job_id}/events").text.splitlines()
                if line.startswith("event: ")
            ]
            assert kinds.count("completed") == 1
            assert kinds[-1] == "completed"
            assert kinds.count("started") == 1


@pytest.mark.timeout(420)
def test_60_jobs_survive_a_kill_every_five_seconds_and_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path, JUBAKO_FAMILIES="sd") as server:
        wanted = orders(server, JOBS)
        with killing([(server, "Gateway"), (server, "SD")], every=5, times=KILLS) as killed:
            ordered: dict[str, Order] = {}
            for order in wanted:
                ordered[submit(server, order)] = order
            wait_for_all(server, list(ordered))
        assert {"Gateway", "SD"} <= set(killed)
        check_results(server, ordered)
        for process in psutil.Process(server.process.pid).children(recursive=True):
            process.kill()
        server.process.kill()
        server.process.wait()
    with serving(tmp_path, JUBAKO_FAMILIES="sd") as again:
        assert set(listed(again)) >= set(ordered)
        check_results(again, ordered)


def test_a_restart_in_order_goes_on_with_what_ran_and_what_waited(tmp_path: Path) -> None:
    with serving(tmp_path, JUBAKO_FAMILIES="sd") as server:
        ids = [submit(server, Order("a large red circle", seed)) for seed in range(12)]
        while not any(job["progress"] > 0 for job in listed(server).values()):
            time.sleep(0.05)
    with serving(tmp_path, JUBAKO_FAMILIES="sd") as again:
        wait_for_all(again, ids)
        for job in listed(again).values():
            assert len(job["outputs"]) == 1


@pytest.mark.timeout(420)
def test_a_gateway_that_dies_for_good_leaves_its_jobs_to_the_other(tmp_path: Path) -> None:
    with ExitStack() as stack:
        family = stack.enter_context(serving(tmp_path / "family", target="counted:SD", cwd=HERE))
        shared: dict[str, Any] = {
            "JUBAKO_HOME": str(tmp_path / "home"),
            "JUBAKO_DATABASE_URL": stack.enter_context(postgresql()),
            "JUBAKO_FAMILIES": "sd",
            "JUBAKO_FAMILY_URLS": f"sd={family.url}",
            "JUBAKO_JOB_LEASE": "4",
        }
        dying, living = (
            stack.enter_context(serving(tmp_path / name, JUBAKO_GATEWAY=name, **shared))
            for name in ("dying", "living")
        )
        wanted = orders(living, JOBS)
        ordered = {submit((dying, living)[i % 2], order): order for i, order in enumerate(wanted)}
        wait_until_it_runs(shared["JUBAKO_DATABASE_URL"], "dying-0")
        for process in psutil.Process(dying.process.pid).children(recursive=True):
            process.kill()
        dying.process.kill()
        wait_for_all(living, list(ordered))
        assert "gateway dying-0 is dead" in living.log.read_text(encoding="utf-8")
        check_results(living, ordered)
        assert_nothing_ran_twice(family, listed(living).values())


def wait_until_it_runs(database: str, name: str) -> None:
    """The gateway of that name has begun jobs of the one queue."""
    engine = sa.create_engine(database_url(database, Path()), poolclass=sa.NullPool)
    query = sa.text(
        "SELECT count(*) FROM dbos.workflow_status WHERE status = 'PENDING' AND executor_id = :name"
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            if connection.execute(query, {"name": name}).scalar_one():
                return
        time.sleep(0.05)
    raise AssertionError(f"{name} has begun nothing")


def assert_nothing_ran_twice(family: Server, jobs: Iterable[dict[str, Any]]) -> None:
    """The family has run each job's picture to its end once."""
    log = family.log.read_text(encoding="utf-8")
    for job in jobs:
        assert log.count(f"job {job['id']} ended") == 1, job
