"""`scripts/benchmark overload`: ten times as many requests as the server can serve.

First as many clients as it serves well, each with one request at a time: that is its peak. Then, for a
minute, requests that come by chance at ten times that rate, whatever becomes of those before them. Is as
much done as at the peak, are refusals quick, do they say when to come again, and is what was accepted done
within the time that was promised?
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import aiohttp
import psutil

from benchmarks.report import Report, percentile
from benchmarks.server import Served, served

__all__ = ["main", "under_overload"]

PROMPT = "a large red circle on the left of a blue background"
# Clients that nobody waits for any more are given this long to end.
PATIENCE = 30


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark overload", description=__doc__)
    parser.add_argument("--clients", type=int, default=8, help="of the peak; default 8")
    parser.add_argument("--times", type=int, default=10, help="the peak's rate; default 10")
    parser.add_argument("--steps", type=int, default=10, help="of each picture; default 10")
    parser.add_argument("--peak-seconds", type=float, default=20, help="default 20")
    parser.add_argument("--seconds", type=float, default=60, help="of the overload; default 60")
    parser.add_argument("--longest", type=float, default=10, help="JUBAKO_MAX_WAIT; default 10")
    parser.add_argument("--save", action="store_true", help="write the document to benchmarks/results")
    options = parser.parse_args(arguments)
    report = Report("overload", {k: v for k, v in vars(options).items() if k != "save"})
    with served(JUBAKO_MAX_WAIT=str(options.longest), OMP_NUM_THREADS="1") as server:
        figures = asyncio.run(
            under_overload(
                server,
                clients=options.clients,
                times=options.times,
                steps=options.steps,
                peak=options.peak_seconds,
                seconds=options.seconds,
            )
        )
    report.say(f"{figures['peak_per_s']:.1f} pictures a second; asked for {options.times} times as many:")
    report.say(json.dumps(figures, indent=1))
    report.add(**figures)
    report.finish(save=options.save)


@dataclass(frozen=True)
class _Reply:
    status: int
    seconds: float
    ended: float
    promise: float | None
    retry_after: int | None


async def under_overload(
    server: Served, *, clients: int, times: float, steps: int, peak: float, seconds: float
) -> dict[str, Any]:
    """The figures: ``peak`` and ``seconds`` are how long each of the two lasts."""
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector) as client:
        await _closed(client, clients, steps, 5)
        at_peak = len(await _closed(client, clients, steps, peak)) / peak
        before = _cpu_seconds()
        replies = await _open(client, at_peak * times, steps, seconds)
        spent = {name: after - before.get(name, 0.0) for name, after in _cpu_seconds().items()}
    done = [reply for reply in replies if reply.status == 200]
    refused = [reply for reply in replies if reply.status not in {0, 200}]
    promised = [reply for reply in done if reply.promise is not None]
    kept = sum(reply.seconds <= (reply.promise or 0) for reply in promised)
    in_time = sum(reply.ended <= seconds for reply in done)
    return {
        "peak_per_s": at_peak,
        "asked_per_s": len(replies) / seconds,
        "done": len(done),
        "goodput_per_s": in_time / seconds,
        "goodput_share": in_time / seconds / at_peak,
        "refused": len(refused),
        "refusal_p50_s": percentile([reply.seconds for reply in refused], 0.5) if refused else None,
        "refusal_p99_s": percentile([reply.seconds for reply in refused], 0.99) if refused else None,
        "refusals_without_retry_after": sum(reply.retry_after is None for reply in refused),
        "promises": len(promised),
        "promises_kept_share": kept / len(promised) if promised else None,
        "statuses": dict(Counter(reply.status for reply in replies)),
        "cpu_seconds": spent,
    }


async def _closed(client: aiohttp.ClientSession, clients: int, steps: int, seconds: float) -> list[_Reply]:
    """The pictures that so many clients got in that time, each with one request at a time."""
    replies: list[_Reply] = []
    seeds, began = itertools.count(), perf_counter()

    async def ask() -> None:
        while perf_counter() < began + seconds:
            reply = await _reply(client, next(seeds), steps, began)
            if reply.ended <= seconds and reply.status == 200:
                replies.append(reply)

    await asyncio.gather(*(ask() for _ in range(clients)))
    return replies


async def _open(client: aiohttp.ClientSession, rate: float, steps: int, seconds: float) -> list[_Reply]:
    """What requests got that came so many a second on average, by chance (seed 0), in that time."""
    chance, began = random.Random(0), perf_counter()  # noqa: S311 # it spaces requests
    due, asked = 0.0, list[asyncio.Task[_Reply]]()
    while (due := due + chance.expovariate(rate)) < seconds:
        await asyncio.sleep(max(0.0, began + due - perf_counter()))
        asked.append(asyncio.create_task(_reply(client, len(asked), steps, began)))
    return await asyncio.wait_for(asyncio.gather(*asked), PATIENCE)


async def _reply(client: aiohttp.ClientSession, seed: int, steps: int, since: float) -> _Reply:
    fields = {"prompt": PROMPT, "num_inference_steps": steps, "seed": seed}
    began = perf_counter()
    try:
        async with client.post("/txt2img", json=fields) as reply:
            await reply.read()
    except aiohttp.ClientError:
        return _Reply(0, perf_counter() - began, perf_counter() - since, None, None)
    now, headers = perf_counter(), reply.headers
    promise, again = headers.get("x-promised-seconds"), headers.get("retry-after")
    own = float(promise) if promise else None, int(again) if again else None
    return _Reply(reply.status, now - began, now - since, *own)


def _cpu_seconds() -> dict[str, float]:
    """What this process and each of the server's has spent."""
    spent = {"client": sum(psutil.Process().cpu_times()[:2])}
    for process in psutil.Process().children(recursive=True):
        line = " ".join(process.cmdline())
        found = re.search(r"--service-name (\w+)", line)
        spent[found[1] if found else "supervisor"] = sum(process.cpu_times()[:2])
    return spent
