"""Results that are like earlier ones of the same key: told by every route of a server, to nobody else."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
from api_keys import KEYS
from server import Server

DRAWN: dict[str, Any] = {"prompt": "a large red circle on the left of a blue background", "steps": 6}


def client(guarded: Server, name: str) -> httpx.Client:
    return httpx.Client(base_url=guarded.url, headers=KEYS[name].headers, timeout=60)


def drawn(http: httpx.Client, **fields: Any) -> list[dict[str, Any]]:
    reply = http.post("/v1/images/generations", json=DRAWN | fields)
    assert reply.status_code == 200, reply.text
    data: list[dict[str, Any]] = reply.json()["data"]
    return data


def finished(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    job = http.post("/v1/jobs", json={"task": "txt2img", **DRAWN, **fields}).json()
    while job["state"] not in {"succeeded", "failed"}:
        time.sleep(0.05)
        job = http.get(job["links"]["self"]).json()
    assert job["state"] == "succeeded", job["error"]
    return dict(job)


def test_the_same_picture_again_is_told_by_every_route_and_to_its_own_key_alone(guarded: Server) -> None:
    with client(guarded, "alice") as alice, client(guarded, "bob") as bob:
        (first,) = drawn(alice, seed=900)
        assert first["similar_to"] == []
        itself = {"id": first["id"], "index": 0, "distance": 0}

        (again,) = drawn(alice, seed=900, output_format="jpeg", output_compression=50)
        assert itself in again["similar_to"]
        reply = alice.post("/txt2img", json=DRAWN | {"seed": 900})
        assert itself in json.loads(reply.headers["X-Similar-To"])
        with alice.stream(
            "POST", "/v1/images/generations", json=DRAWN | {"seed": 900, "stream": True}
        ) as told:
            events = [json.loads(line[6:]) for line in told.iter_lines() if line.startswith("data: {")]
        assert itself in events[-1]["similar_to"]
        job = finished(alice, seed=900)
        assert itself in job["outputs"][0]["similar_to"]

        (after,) = drawn(alice, seed=900)
        assert {"id": job["id"], "index": 0, "distance": 0} in after["similar_to"]

        # Not a word of it to another key, though it draws the same.
        (theirs,) = drawn(bob, seed=900)
        assert theirs["similar_to"] == []
        assert finished(bob, seed=900)["outputs"][0]["similar_to"] == [
            {"id": theirs["id"], "index": 0, "distance": 0}
        ]


def test_another_picture_is_like_none_of_them(guarded: Server) -> None:
    with client(guarded, "drawer") as drawer:
        drawn(drawer, seed=901)
        other = drawn(
            drawer, seed=901, prompt="a small white star above a large black ring on a green background"
        )
        assert other[0]["similar_to"] == []
        assert "X-Similar-To" not in drawer.post("/txt2img", json={"prompt": "a yellow square"}).headers


def test_a_job_s_record_and_its_result_say_the_same(guarded: Server) -> None:
    with client(guarded, "root") as root:
        job = finished(root, n=2, seed=77)
        again = finished(root, n=2, seed=77)
        result = root.get(again["links"]["result"]).json()["data"]
    assert [entry["similar_to"] for entry in result] == [each["similar_to"] for each in again["outputs"]]
    for index, entry in enumerate(result):
        assert {"id": job["id"], "index": index, "distance": 0} in entry["similar_to"]
