"""Durable jobs over HTTP: any task, states, events, results, cancelling, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import numpy as np
import pytest
from httpx_sse import EventSource, ServerSentEvent, connect_sse
from PIL import Image
from server import Server

from jubako.miniatures.reader import shows
from jubako.miniatures.world import arrange, parse, render
from jubako.pictures import png

CAPTION = "a large red circle on the left of a blue background"
ENDED = {"succeeded", "failed", "cancelled"}


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def submit(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    reply = http.post("/v1/jobs", json={"task": "txt2img", "prompt": CAPTION, **fields})
    assert reply.status_code == 202, reply.text
    job: dict[str, Any] = reply.json()
    return job


def wait(http: httpx.Client, job: dict[str, Any], state: set[str] = ENDED) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found: dict[str, Any] = http.get(job["links"]["self"]).raise_for_status().json()
        if found["state"] in state:
            return found
        time.sleep(0.05)
    raise AssertionError(f"still {found['state']}")


def follow(http: httpx.Client, job: dict[str, Any], seen: str = "0") -> Iterator[ServerSentEvent]:
    with connect_sse(
        http, "GET", job["links"]["events"], headers={"Last-Event-ID": seen}, timeout=60
    ) as source:
        yield from source.iter_sse()


def error(reply: httpx.Response) -> dict[str, Any]:
    body: dict[str, Any] = reply.json()["error"]
    assert set(body) == {"message", "type", "param", "code"}
    return body


def picture() -> bytes:
    return png(render(arrange(parse(CAPTION), np.random.default_rng(1))))


def test_a_job_is_accepted_run_and_its_result_is_the_picture(http: httpx.Client) -> None:
    reply = http.post("/v1/jobs", json={"task": "txt2img", "prompt": CAPTION, "seed": 7, "steps": 10})
    assert reply.status_code == 202
    accepted = reply.json()
    assert reply.headers["location"] == accepted["links"]["self"] == f"/v1/jobs/{accepted['id']}"
    assert accepted["state"] == "queued"
    assert accepted["seeds"] == [7]
    done = wait(http, accepted)
    assert done["state"] == "succeeded"
    assert (done["progress"], done["step"], done["steps"]) == (1.0, 10, 10)
    assert done["created_at"] <= done["started_at"] <= done["ended_at"]
    result = http.get(done["links"]["result"])
    assert result.headers["content-type"] == "image/png"
    assert result.headers["x-seed"] == "7"
    assert shows(Image.open(io.BytesIO(result.content)), CAPTION).ok
    assert done["outputs"][0]["bytes"] == len(result.content)


def test_its_picture_is_that_of_the_synchronous_route(http: httpx.Client) -> None:
    fields = {"prompt": CAPTION, "seed": 11, "steps": 6}
    done = wait(http, submit(http, **fields))
    pictures = [
        np.asarray(Image.open(io.BytesIO(reply.content)), np.int16)
        for reply in (http.get(done["links"]["result"]), http.post("/txt2img", json=fields))
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


@pytest.mark.parametrize("form", [False, True])
def test_pictures_to_start_from_come_in_json_and_in_forms(http: httpx.Client, form: bool) -> None:
    fields: dict[str, Any] = {"task": "img2img", "prompt": CAPTION, "seed": 3, "strength": 0.5}
    if form:
        texts = {name: str(value) for name, value in fields.items()}
        reply = http.post("/v1/jobs", data=texts, files={"image": ("x.png", picture())})
    else:
        reply = http.post("/v1/jobs", json={**fields, "image": base64.b64encode(picture()).decode()})
    assert reply.status_code == 202, reply.text
    done = wait(http, reply.json())
    assert done["state"] == "succeeded"
    assert len(done["request"]["image_sha256"]) == 64
    assert shows(Image.open(io.BytesIO(http.get(done["links"]["result"]).content)), CAPTION).ok


def test_several_pictures_come_as_openai_s_json_or_one_by_one(http: httpx.Client) -> None:
    done = wait(http, submit(http, n=3, seed=20, steps=4))
    assert done["seeds"] == [20, 21, 22]
    data = http.get(done["links"]["result"]).json()["data"]
    assert [entry["seed"] for entry in data] == [20, 21, 22]
    single = http.get(done["links"]["result"], params={"index": 1})
    assert base64.b64decode(data[1]["b64_json"]) == single.content
    beyond = http.get(done["links"]["result"], params={"index": 3})
    assert (beyond.status_code, error(beyond)["param"]) == (400, "index")
    odd = http.get(done["links"]["result"], params={"index": 0, "variant": "mesh"})
    assert (odd.status_code, error(odd)["param"]) == (400, "variant")


def test_events_are_ordered_and_progress_rises_to_one(http: httpx.Client) -> None:
    job = submit(http, seed=5, steps=25)
    events = list(follow(http, job))
    kinds = [event.event for event in events]
    assert kinds[:2] == ["queued", "started"]
    assert set(kinds[2:-1]) == {"progress"}
    assert kinds[-1] == "completed"
    numbers = [int(event.id) for event in events]
    assert numbers == sorted(set(numbers))
    progress = [event.json()["progress"] for event in events]
    assert (progress[0], progress[-1]) == (0.0, 1.0)
    assert progress == sorted(progress)
    previews = [event.json()["preview"] for event in events if "preview" in event.json()]
    assert previews
    for preview in previews:
        with Image.open(io.BytesIO(base64.b64decode(preview["b64_json"]))) as image:
            assert (image.format, preview["content_type"]) == ("JPEG", "image/jpeg")
    assert events[-1].json()["result"] == f"{job['links']['self']}/result"


def test_the_last_preview_shows_what_the_picture_will(http: httpx.Client) -> None:
    events = list(follow(http, submit(http, seed=7, steps=25)))
    last = [event.json()["preview"]["b64_json"] for event in events if "preview" in event.json()][-1]
    with Image.open(io.BytesIO(base64.b64decode(last))) as image:
        pixels = np.asarray(image.convert("RGB").resize((64, 64)), np.float32)
    red, blue = pixels[26:38, 13:25].mean((0, 1)), pixels[4:12, 48:60].mean((0, 1))
    assert red[0] > red[2] + 60
    assert blue[2] > blue[0] + 20


def test_events_go_on_where_the_connection_was_lost(http: httpx.Client) -> None:
    job = submit(http, seed=6, steps=25)
    first: list[ServerSentEvent] = []
    for event in follow(http, job):
        first.append(event)
        if len(first) == 5:
            break
    rest = list(follow(http, job, seen=first[-1].id))
    whole = list(follow(http, job))
    assert [event.id for event in [*first, *rest]] == [event.id for event in whole]
    assert rest[-1].event == "completed"
    after_the_end = http.get(job["links"]["events"], headers={"Last-Event-ID": rest[-1].id})
    assert after_the_end.status_code == 204, "an EventSource would connect for ever"


def test_a_running_job_is_cancelled_within_a_step(http: httpx.Client) -> None:
    job = submit(http, steps=50)
    wait(http, job, {"running"})
    reply = http.delete(job["links"]["self"])
    assert (reply.status_code, reply.json()["state"]) == (200, "cancelled")
    events = list(follow(http, job))
    assert events[-1].event == "cancelled"
    time.sleep(0.5)
    assert len(list(follow(http, job))) == len(events), "it went on"
    again = http.delete(job["links"]["self"])
    assert (again.status_code, again.json()["state"]) == (200, "cancelled")
    result = http.get(f"{job['links']['self']}/result")
    assert (result.status_code, error(result)["code"]) == (409, "job_not_done")


def test_a_queued_job_is_cancelled_at_once_and_never_begins(http: httpx.Client) -> None:
    jobs = [submit(http, steps=30) for _ in range(24)]
    last = http.get(jobs[-1]["links"]["self"]).json()
    assert last["state"] == "queued"
    assert last["position"] >= 1
    assert http.delete(jobs[-1]["links"]["self"]).json()["state"] == "cancelled"
    for job in jobs[:-1]:
        http.delete(job["links"]["self"])
    kinds = [event.event for event in follow(http, jobs[-1])]
    assert kinds == ["queued", "cancelled"]


def test_cancelling_a_finished_job_says_so(http: httpx.Client) -> None:
    done = wait(http, submit(http, steps=1))
    reply = http.delete(done["links"]["self"])
    assert (reply.status_code, error(reply)["code"]) == (409, "job_ended")
    assert "succeeded already" in error(reply)["message"]
    assert http.get(done["links"]["result"]).status_code == 200


def test_the_same_key_is_the_same_job(http: httpx.Client) -> None:
    headers = {"Idempotency-Key": "order-66"}
    fields = {"task": "txt2img", "prompt": CAPTION, "steps": 2}
    first, second = (http.post("/v1/jobs", json=fields, headers=headers) for _ in range(2))
    assert first.json()["id"] == second.json()["id"]
    assert first.json()["seeds"] == second.json()["seeds"]
    other = http.post("/v1/jobs", json={**fields, "steps": 3}, headers=headers)
    assert (other.status_code, error(other)["code"]) == (409, "idempotency_key_reused")
    assert http.post("/v1/jobs", json=fields).json()["id"] != first.json()["id"]


def test_pages_hold_all_jobs_once(http: httpx.Client) -> None:
    made = {submit(http, steps=1)["id"] for _ in range(5)}
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 2}
    while True:
        page = http.get("/v1/jobs", params=query).json()
        seen += [job["id"] for job in page["data"]]
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert made <= set(seen)
    assert len(seen) == len(set(seen))
    states = {job["state"] for job in http.get("/v1/jobs", params={"state": "cancelled"}).json()["data"]}
    assert states <= {"cancelled"}


def test_a_job_that_fails_says_why_as_the_synchronous_route_does(http: httpx.Client) -> None:
    job = submit(http, model="sd1.5")
    failed = wait(http, job)
    assert failed["state"] == "failed"
    assert failed["error"]["code"] == "model_not_on_disk"
    assert "jubako pull sd1.5" in failed["error"]["message"]
    last = list(follow(http, job))[-1]
    assert last.event == "failed"
    assert last.json()["error"] == failed["error"]


@pytest.mark.parametrize(
    ("body", "status", "param", "words"),
    [
        ({"prompt": "x"}, 400, "task", "required"),
        ({"task": "txt2img"}, 400, "prompt", "required"),
        ({"task": "paint", "prompt": "x"}, 400, "task", "txt2img"),
        ({"task": "txt2img", "prompt": "x", "stepz": 3}, 400, "stepz", "Did you mean 'steps'"),
        ({"task": "txt2img", "prompt": "x", "n": 0}, 400, "n", "greater than 0"),
        ({"task": "txt2img", "prompt": "x", "n": 99}, 400, "n", "limit of 10"),
        ({"task": "txt2img", "prompt": "x", "width": 65}, 400, "width", "64 and 72"),
        ({"task": "txt2img", "prompt": "x", "model": "nope"}, 404, "model", "unknown model"),
        ({"task": "img2img", "prompt": "x", "image": "https://x/y.png"}, 400, "image", "not fetched"),
        ({"task": "img2img", "prompt": "x", "image": "AAAA"}, 400, "image", "not a picture"),
        ([1, 2], 400, None, "JSON object"),
    ],
)
def test_bad_jobs_are_refused_before_they_are_queued(
    http: httpx.Client, body: Any, status: int, param: str | None, words: str
) -> None:
    reply = http.post("/v1/jobs", json=body)
    assert reply.status_code == status, reply.text
    assert error(reply)["param"] == param
    assert words in error(reply)["message"]


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"state": "done"}, "state"),
        ({"limit": 0}, "limit"),
        ({"limit": "many"}, "limit"),
        ({"order": "up"}, "order"),
        ({"stat": "queued"}, "stat"),
    ],
)
def test_odd_lists_are_refused(http: httpx.Client, query: dict[str, Any], param: str) -> None:
    reply = http.get("/v1/jobs", params=query)
    assert reply.status_code == 400, reply.text
    assert param in str(error(reply)["param"])


@pytest.mark.parametrize("path", ["", "/events", "/result"])
def test_an_unknown_job_is_a_404(http: httpx.Client, path: str) -> None:
    reply = http.get(f"/v1/jobs/nope{path}")
    assert (reply.status_code, error(reply)["code"]) == (404, "job_not_found")
    assert http.delete("/v1/jobs/nope").status_code == 404
    assert http.get("/v1/jobs", params={"after": "nope"}).status_code == 404


def test_nothing_in_the_database_is_a_pickle(http: httpx.Client, server: Server) -> None:
    wait(http, submit(http, steps=1))
    file = server.log.parent / "jubako" / "jobs.sqlite"
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as connection:
        forms = connection.execute(
            "SELECT serialization FROM workflow_status UNION SELECT serialization FROM operation_outputs"
        ).fetchall()
        assert forms == [("jubako_json",)]
        for query in (
            "SELECT inputs FROM workflow_input",
            "SELECT output FROM workflow_output",
            "SELECT output FROM operation_outputs",
        ):
            values = [value for (value,) in connection.execute(query) if value is not None]
            assert values
            for value in values:
                json.loads(value)


def test_an_event_source_reads_the_stream(http: httpx.Client) -> None:
    with http.stream("GET", submit(http, steps=2)["links"]["events"]) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(EventSource(response).iter_sse())
    assert events[0].retry == 1000
    assert events[-1].event == "completed"
