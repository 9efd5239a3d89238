"""A server that is asked for more than it can do: what is accepted is kept, the rest is told when to come."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from server import Server, serving

REQUEST = {"prompt": "a red circle", "num_inference_steps": 20}


@pytest.fixture(scope="module")
def busy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that lets nobody wait for more than five seconds."""
    with serving(tmp_path_factory.mktemp("busy"), JUBAKO_FAMILIES="sd", JUBAKO_MAX_WAIT="5") as server:
        for _ in range(6):
            server.post("/txt2img", REQUEST).raise_for_status()
        yield server


def test_too_much_at_once_is_refused_with_the_time_to_come_again(busy: Server) -> None:
    with ThreadPoolExecutor(100) as threads:
        replies = list(threads.map(lambda _: busy.post("/txt2img", REQUEST), range(100)))
        polls = [httpx.get(f"{busy.url}{path}", timeout=10) for path in ("/readyz", "/v1/jobs", "/v1/models")]
    counts = Counter(reply.status_code for reply in replies)
    assert counts.keys() == {200, 429}
    assert counts[200] >= 2
    for reply in replies:
        if reply.status_code == 429:
            error = reply.json()["error"]
            assert error["code"] == "overloaded"
            assert int(reply.headers["retry-after"]) >= 1
    assert all(poll.status_code == 200 for poll in polls)
    assert any("x-promised-seconds" in reply.headers for reply in replies if reply.status_code == 200)


def test_who_comes_again_when_told_to_is_served(busy: Server) -> None:
    deadline = time.monotonic() + 60
    while (reply := busy.post("/txt2img", REQUEST)).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(int(reply.headers["retry-after"]))
    assert reply.status_code == 200


def test_a_deadline_that_can_not_be_met_is_refused_at_once(busy: Server) -> None:
    fields = REQUEST | {"num_inference_steps": 150}
    headers = {"X-Request-Deadline": "0.01"}
    compared = {"prompt": "a red circle", "models": ["tiny-sd"], "steps": 150}
    asked = {"/txt2img": fields, "/v1/images/generations": fields, "/v1/images/compare": compared}
    for path, body in asked.items():
        reply = httpx.post(f"{busy.url}{path}", json=body, headers=headers, timeout=30)
        assert (reply.status_code, reply.json()["error"]["code"]) == (429, "overloaded")


@pytest.mark.parametrize(
    ("headers", "says"),
    [({"X-Request-Deadline": "soon"}, "seconds"), ({"X-Priority": "urgent"}, "interactive, batch")],
)
def test_headers_that_are_wrong_are_named(busy: Server, headers: dict[str, str], says: str) -> None:
    reply = httpx.post(f"{busy.url}/txt2img", json=REQUEST, headers=headers, timeout=30)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, next(iter(headers)))
    assert says in error["message"]


def test_jobs_wait_however_many_there_are(busy: Server) -> None:
    replies = [busy.post("/v1/jobs", {"task": "txt2img", **REQUEST}) for _ in range(30)]
    assert {reply.status_code for reply in replies} == {202}
    deadline = time.monotonic() + 120
    for reply in replies:
        while (job := httpx.get(f"{busy.url}/v1/jobs/{reply.json()['id']}").json())["state"] != "succeeded":
            assert job["state"] in {"queued", "running"}, job["error"]
            assert time.monotonic() < deadline
            time.sleep(0.1)
