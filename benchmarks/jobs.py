"""`scripts/benchmark jobs`: asking and cancelling while the engine has more to do than it can.

A server of its own is given more long jobs than it can run side by side. While they wait and run, one client
asks for the state of jobs, and cancels some: how long does it take to get an answer, and how long until the
engine has let go of what was cancelled? The latter is judged from outside: a job of one step, submitted once
all others were cancelled, is done as soon as their rows are gone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import httpx

from benchmarks.report import Report, percentile
from benchmarks.server import served

__all__ = ["main"]

PROMPT = "a large red circle on the left of a blue background"


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark jobs", description=__doc__)
    parser.add_argument("--jobs", type=int, default=60, help="submitted at once; default 60")
    parser.add_argument("--steps", type=int, default=50, help="of each; default 50")
    parser.add_argument("--polls", type=int, default=500, help="default 500")
    parser.add_argument(
        "--cancels", type=int, default=20, help="one by one, while the others run; default 20"
    )
    parser.add_argument("--save", action="store_true", help="write the document to benchmarks/results")
    options = parser.parse_args(arguments)
    report = Report("jobs", {k: v for k, v in vars(options).items() if k != "save"})
    with served() as server, httpx.Client(base_url=server.url, timeout=30) as client:
        _measure(client, options, report)
    report.finish(save=options.save)


def _measure(client: httpx.Client, options: argparse.Namespace, report: Report) -> None:
    idle = [_seconds(client, "GET", "/v1/jobs?limit=1") for _ in range(50)]
    jobs = [_submit(client, options.steps) for _ in range(options.jobs)]
    polls = [_seconds(client, "GET", f"/v1/jobs/{jobs[i % len(jobs)]}") for i in range(options.polls)]
    running = [job["id"] for job in client.get("/v1/jobs?state=running&limit=100").json()["data"]]
    if not running:
        raise RuntimeError("nothing ran any more while the client asked: give more jobs or steps")
    victims = [*running, *(job for job in reversed(jobs) if job not in running)][: options.cancels]
    cancels = [_seconds(client, "DELETE", f"/v1/jobs/{job}") for job in victims]
    for job in jobs:
        client.delete(f"/v1/jobs/{job}")
    began = time.perf_counter()
    _wait(client, _submit(client, steps=1))
    freed = time.perf_counter() - began
    figures = {"poll, idle": idle, "poll, saturated": polls, "cancel, saturated": cancels}
    for name, samples in figures.items():
        report.say(
            f"{name:>18}: p50 {1000 * percentile(samples, 0.5):6.1f} ms, "
            f"p99 {1000 * percentile(samples, 0.99):6.1f} ms, of {len(samples)}"
        )
    report.say(f"a job of one step after all others were cancelled: {freed:.2f} s")
    report.add(
        latencies={
            name: {
                "count": len(s),
                "p50_s": percentile(s, 0.5),
                "p99_s": percentile(s, 0.99),
                "max_s": max(s),
            }
            for name, s in figures.items()
        },
        one_step_after_cancelling_s=freed,
    )


def _submit(client: httpx.Client, steps: int) -> str:
    fields = {"task": "txt2img", "prompt": PROMPT, "num_inference_steps": steps}
    job: dict[str, Any] = client.post("/v1/jobs", json=fields).raise_for_status().json()
    return str(job["id"])


def _seconds(client: httpx.Client, method: str, path: str) -> float:
    began = time.perf_counter()
    reply = client.request(method, path)
    spent = time.perf_counter() - began
    if reply.status_code not in {200, 409}:  # 409: it had ended by itself
        reply.raise_for_status()
    return spent


def _wait(client: httpx.Client, job: str) -> None:
    with client.stream("GET", f"/v1/jobs/{job}/events") as events:
        last = [line for line in events.iter_lines() if line.startswith("event: ")][-1]
    if last != "event: completed":
        raise RuntimeError(f"the job of one step ended in {last}")
