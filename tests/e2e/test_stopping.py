"""SIGTERM: what was accepted is done, nothing new is taken, and what is left goes on with the next start."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server import Server, serving

REQUEST = {"prompt": "a red circle", "num_inference_steps": 10}
GRACE = 30


def asked(server: Server, seed: int, **fields: Any) -> httpx.Response:
    return server.post("/txt2img", REQUEST | {"seed": seed} | fields)


def told(server: Server, number: int = signal.SIGTERM) -> float:
    """When it was told to stop."""
    server.process.send_signal(number)
    return time.monotonic()


def ended_after(server: Server, since: float) -> float:
    """Seconds until the last of its processes was gone."""
    server.process.wait(60)
    return time.monotonic() - since


def test_what_was_accepted_is_done_and_what_waits_is_done_by_the_next_start(tmp_path: Path) -> None:
    serve = partial(
        serving, tmp_path, JUBAKO_FAMILIES="sd", JUBAKO_STOP_GRACE=str(GRACE), JUBAKO_STOP_DELAY="2"
    )
    with serve() as server, ThreadPoolExecutor(24) as threads:
        asked(server, 0, num_inference_steps=1).raise_for_status()
        processes = psutil.Process(server.process.pid).children(recursive=True)
        jobs = [server.post("/v1/jobs", {"task": "txt2img", **REQUEST, "seed": i}).json() for i in range(12)]
        stream = threads.submit(followed, server, jobs[-1]["id"])
        accepted = [threads.submit(asked, server, seed) for seed in range(12)]
        time.sleep(1)
        since = told(server)
        while server.ready():
            assert time.monotonic() < since + 2
        still = asked(server, 99, num_inference_steps=1)
        assert still.status_code == 200
        while (late := asked(server, 100, num_inference_steps=1)).status_code == 200:
            assert time.monotonic() < since + GRACE
        assert (late.status_code, late.json()["error"]["code"]) == (503, "shutting_down")
        assert int(late.headers["retry-after"]) >= 1
        assert late.headers["connection"] == "close"
        assert httpx.get(f"{server.url}/v1/jobs/{jobs[0]['id']}", timeout=5).status_code == 200
        assert {reply.result().status_code for reply in accepted} == {200}
        assert ended_after(server, since) < 2 + GRACE + 1
        assert not psutil.wait_procs(processes, 0)[1]
        stream.result()
    with serve() as server:
        deadline = time.monotonic() + 60
        for each in jobs:
            while (job := httpx.get(f"{server.url}/v1/jobs/{each['id']}").json())["state"] != "succeeded":
                assert job["state"] in {"queued", "running"}, job["error"]
                assert time.monotonic() < deadline
                time.sleep(0.1)
        # With nothing to do it ends after its delay.
        assert ended_after(server, told(server, signal.SIGINT)) < 2 + 5


def followed(server: Server, job_id: str) -> None:
    """Read a job's events until the server ends the stream."""
    with httpx.stream("GET", f"{server.url}/v1/jobs/{job_id}/events", timeout=60) as reply:
        assert reply.status_code == 200
        reply.read()


@pytest.mark.parametrize("times", [1, 2])
def test_past_its_time_it_is_answered_that_the_server_stops(tmp_path: Path, times: int) -> None:
    """So it is as well when the server is told twice."""
    grace = "1" if times == 1 else "60"
    with serving(tmp_path, JUBAKO_FAMILIES="sd", JUBAKO_STOP_GRACE=grace) as server:
        asked(server, 0, num_inference_steps=1).raise_for_status()
        with ThreadPoolExecutor(17) as threads:
            long = [threads.submit(asked, server, i, num_inference_steps=150) for i in range(16)]
            streamed = threads.submit(
                server.generate, "a red circle", num_inference_steps=150, stream=True, model="tiny-sd"
            )
            time.sleep(1)
            since = told(server)
            if times == 2:
                time.sleep(0.5)
                for process in psutil.Process(server.process.pid).children():
                    if "Gateway" in process.cmdline():
                        process.send_signal(signal.SIGTERM)
            for reply in long:
                error = reply.result().json()["error"]
                assert (reply.result().status_code, error["code"]) == (503, "shutting_down")
            assert "shutting_down" in streamed.result().text
        assert ended_after(server, since) < 8
