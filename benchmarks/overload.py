"""`scripts/benchmark overload`: ten times as many clients as the server can serve.

First as many as it serves well, in a closed loop: that is its peak. Then ten times as many for a minute, each
of which asks again at once when it was refused, which is worse than well-behaved clients do. Is as much done
as at the peak, are refusals quick, do they say when to come again, and is what was accepted done within the
time that was promised?
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import httpx

from benchmarks.report import Report, percentile
from benchmarks.server import served

__all__ = ["main"]

PROMPT = "a large red circle on the left of a blue background"
# A client that is refused waits this long, where it was told to wait a second or more.
IMPATIENCE = 0.2


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark overload", description=__doc__)
    parser.add_argument("--clients", type=int, default=16, help="of the peak; default 16")
    parser.add_argument("--times", type=int, default=10, help="as many then; default 10")
    parser.add_argument("--steps", type=int, default=10, help="of each picture; default 10")
    parser.add_argument("--peak-seconds", type=float, default=20, help="default 20")
    parser.add_argument("--seconds", type=float, default=60, help="of the overload; default 60")
    parser.add_argument("--longest", type=float, default=10, help="JUBAKO_MAX_WAIT; default 10")
    parser.add_argument("--save", action="store_true", help="write the document to benchmarks/results")
    options = parser.parse_args(arguments)
    report = Report("overload", {k: v for k, v in vars(options).items() if k != "save"})
    with served(JUBAKO_MAX_WAIT=str(options.longest), OMP_NUM_THREADS="1") as url:
        asyncio.run(_measure(url, options, report))
    report.finish(save=options.save)


@dataclass(frozen=True)
class _Reply:
    status: int
    seconds: float
    promise: float | None
    retry_after: int | None


async def _measure(url: str, options: argparse.Namespace, report: Report) -> None:
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await _load(client, 4, options.steps, 5)
        peak = await _load(client, options.clients, options.steps, options.peak_seconds)
        crowd = options.clients * options.times
        replies = await _load(client, crowd, options.steps, options.seconds)
    done = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status not in {0, 200}]
    promised = [reply for reply in done if reply.promise is not None]
    kept = sum(reply.seconds <= (reply.promise or 0) for reply in promised)
    at_peak = len(peak) / options.peak_seconds
    goodput = len(done) / options.seconds
    figures = {
        "peak_per_s": at_peak,
        "goodput_per_s": goodput,
        "goodput_share": goodput / at_peak,
        "refused": len(refused),
        "refusal_p99_s": percentile([reply.seconds for reply in refused], 0.99) if refused else None,
        "refusals_without_retry_after": sum(reply.retry_after is None for reply in refused),
        "promises": len(promised),
        "promises_kept_share": kept / len(promised) if promised else None,
        "statuses": dict(Counter(reply.status for reply in replies)),
    }
    report.say(f"{at_peak:.1f} pictures a second at the peak, {goodput:.1f} of {crowd} clients")
    report.say(json.dumps(figures, indent=1))
    report.add(**figures)


async def _load(client: httpx.AsyncClient, clients: int, steps: int, seconds: float) -> list[_Reply]:
    """What so many clients got in that time, each with one request at a time."""
    replies: list[_Reply] = []
    seeds, end = itertools.count(), perf_counter() + seconds

    async def ask() -> None:
        while perf_counter() < end:
            fields = {"prompt": PROMPT, "num_inference_steps": steps, "seed": next(seeds)}
            began = perf_counter()
            try:
                reply = await client.post("/txt2img", json=fields)
            except httpx.TransportError:  # as a connection that the server closes while it is taken up again
                replies.append(_Reply(0, perf_counter() - began, None, None))
                continue
            now, headers = perf_counter(), reply.headers
            promise, again = headers.get("x-promised-seconds"), headers.get("retry-after")
            if now <= end:
                own = float(promise) if promise else None, int(again) if again else None
                replies.append(_Reply(reply.status_code, now - began, *own))
            if reply.status_code != 200:
                await asyncio.sleep(IMPATIENCE)

    await asyncio.gather(*(ask() for _ in range(clients)))
    return replies
