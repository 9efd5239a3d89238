"""`jubako jobs` against a real server: list, follow, fetch, cancel, and what it says when it can't."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from program import jubako
from server import Server, free_port

CAPTION = "a large red circle on the left of a blue background"


def submit(server: Server, **fields: Any) -> str:
    reply = server.post("/v1/jobs", {"task": "txt2img", "prompt": CAPTION, **fields}).raise_for_status()
    return str(reply.json()["id"])


def test_following_waits_for_the_end_and_writes_the_result(server: Server, tmp_path: Path) -> None:
    job = submit(server, steps=10, seed=7)
    done = jubako(
        "jobs", "follow", job, "-o", str(tmp_path / "x.png"), "--url", server.url, tmp_path=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"{job[:12]} succeeded" in done.stdout
    with Image.open(tmp_path / "x.png") as image:
        assert "Seed: 7" in image.info["parameters"]


def test_a_terminal_shows_a_progress_bar(server: Server, tmp_path: Path) -> None:
    job = submit(server, steps=20)
    environ: dict[str, Any] = {"TTY_COMPATIBLE": "1", "TERM": "xterm", "FORCE_COLOR": "1"}
    done = jubako("jobs", "follow", job, "--url", server.url, tmp_path=tmp_path, **environ)
    assert done.returncode == 0, done.stderr
    assert "of 20" in done.stderr


def test_the_list_shows_jobs_the_newest_first(server: Server, tmp_path: Path) -> None:
    first, second = submit(server, steps=1), submit(server, steps=1)
    for job in (first, second):
        jubako("jobs", "follow", job, "--url", server.url, tmp_path=tmp_path)
    shown = jubako("jobs", "list", "--state", "succeeded", "--url", server.url, tmp_path=tmp_path).stdout
    assert 0 < shown.index(second[:12]) < shown.index(first[:12])
    assert "100%" in shown
    listed = json.loads(jubako("jobs", "list", "--json", "--url", server.url, tmp_path=tmp_path).stdout)
    assert [job["id"] for job in listed[:2]] == [second, first]


def test_a_job_is_known_by_the_beginning_of_its_id(server: Server, tmp_path: Path) -> None:
    job = submit(server, steps=50)
    done = jubako("jobs", "cancel", job[:10], "--url", server.url, tmp_path=tmp_path)
    assert (done.returncode, done.stdout.split()) == (0, [job[:12], "cancelled"]), done.stderr
    followed = jubako("jobs", "follow", job[:10], "--url", server.url, tmp_path=tmp_path)
    assert followed.returncode == 1
    assert "cancelled" in followed.stdout


def test_several_pictures_are_fetched_into_files_with_numbers(server: Server, tmp_path: Path) -> None:
    job = submit(server, steps=1, n=2, seed=5)
    jubako("jobs", "follow", job, "--url", server.url, tmp_path=tmp_path)
    done = jubako("jobs", "fetch", job, "-o", str(tmp_path / "x.png"), "--url", server.url, tmp_path=tmp_path)
    assert done.returncode == 0, done.stderr
    for number, seed in ((1, 5), (2, 6)):
        with Image.open(tmp_path / f"x-{number}.png") as image:
            assert f"Seed: {seed}" in image.info["parameters"]


def test_what_can_not_be_done_is_one_sentence(server: Server, tmp_path: Path) -> None:
    job = submit(server, model="sd1.5")
    refused = {
        ("follow", job): "jubako pull sd1.5",
        ("cancel", job): "the job has failed already",
        ("fetch", job, "-o", "x.png"): "the job is failed",
        ("cancel", "zzz"): "no job of the last",
        ("cancel", "0" * 32): "there is no job",
    }
    for arguments, words in refused.items():
        done = jubako("jobs", *arguments, "--url", server.url, tmp_path=tmp_path)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
    away = jubako("jobs", "list", "--url", f"http://127.0.0.1:{free_port()}", tmp_path=tmp_path)
    assert (away.returncode, "no server answers" in away.stderr) == (1, True)
