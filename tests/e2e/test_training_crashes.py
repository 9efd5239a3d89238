"""Trainer and server are killed while an adapter is made: it is made, once, and no process is left behind."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from plus import FIVE, draw
from server import Server, serving

from jubako.pictures import png

STEPS = 24
FIELDS = {
    "model": "tiny-sd",
    "trigger": "zog",
    "class_noun": "shape",
    "seed": "1",
    "steps": str(STEPS),
    "class_pictures": "2",
    "sample_steps": "2",
    "validation_every": "0",
    "checkpoint_every": "2",
    "targets": "attention",
}


def trainers(home: Path) -> list[psutil.Process]:
    """The trainers at work in this home."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "jubako.training" in words and any(str(home) in word for word in words):
            found.append(process)
    return found


def job(server: Server, job_id: str) -> dict[str, Any]:
    reply = httpx.get(f"{server.url}/v1/fine_tuning/jobs/{job_id}", timeout=20).raise_for_status()
    found: dict[str, Any] = reply.json()
    return found


def checkpoints(home: Path, job_id: str) -> list[int]:
    folder = home / "trainings" / job_id / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("[0-9]*") if path.name.isdigit())


def wait_for_step(home: Path, job_id: str, step: int) -> None:
    deadline = time.monotonic() + 120
    while not any(reached >= step for reached in checkpoints(home, job_id)):
        assert time.monotonic() < deadline, f"no checkpoint of step {step}"
        time.sleep(0.05)


def kill_all_but(spared: list[psutil.Process], server: Server) -> None:
    """SIGKILL to the server's processes, its supervisor first, which would start the others again."""
    supervisor = psutil.Process(server.process.pid)
    for process in (supervisor, *supervisor.children(recursive=True)):
        if process.pid not in {each.pid for each in spared}:
            process.kill()
    server.process.wait()


@pytest.mark.timeout(400)
def test_an_adapter_is_made_whatever_is_killed(tmp_path: Path) -> None:
    home = tmp_path / "jubako"
    with serving(tmp_path, JUBAKO_FAMILIES="sd") as server:
        files = [("images", (f"{n}.png", png(draw(each)))) for n, each in enumerate(FIVE)]
        reply = httpx.post(f"{server.url}/v1/fine_tuning/jobs", data=FIELDS, files=files, timeout=60)
        job_id = reply.raise_for_status().json()["id"]
        wait_for_step(home, job_id, 4)
        (trainer,) = trainers(home)
        trainer.kill()
        wait_for_step(home, job_id, 10)
        assert trainers(home)[0].pid != trainer.pid
        kill_all_but(trainers(home), server)
    reached = checkpoints(home, job_id)[-1]
    with serving(tmp_path, JUBAKO_FAMILIES="sd") as server:
        deadline = time.monotonic() + 200
        while (found := job(server, job_id))["status"] not in {"succeeded", "failed"}:
            assert len(trainers(home)) <= 2, "at most the one before, at its last step"
            assert time.monotonic() < deadline, found
            time.sleep(0.2)
        assert (found["status"], found["fine_tuned_model"]) == ("succeeded", "zog"), found["error"]
        events = httpx.get(f"{server.url}{found['links']['checkpoints']}", params={"limit": 100}).json()[
            "data"
        ]
        steps = [event["step_number"] for event in events]
        assert steps[0] == STEPS
        assert steps.count(STEPS) == 1
        assert reached >= 10
        assert [path.name for path in (home / "adapters").iterdir()] == ["zog"]
        assert not (home / "trainings" / job_id).exists()
        reply = server.post("/txt2img", {"prompt": "a large red zog", "num_inference_steps": 2})
        assert "zog" in reply.headers["x-warnings"]
    assert not trainers(home)
