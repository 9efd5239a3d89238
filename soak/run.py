"""`scripts/soak`: a server under load and faults, with every goal counted.

A crowd of clients of every kind, of which each picture is compared with the same one drawn alone; the same
with a leak planted, which must be found; clients that all leave at once; a family that is killed again and
again; a server that is asked right after its start; a rolling restart of two replicas; ten times more
requests than can be served.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Sequence
from typing import Any

import aiohttp

from benchmarks.overload import under_overload
from benchmarks.report import Report
from benchmarks.server import Served, served
from soak.crowd import Crowd, Tally
from soak.faults import clients_left, family_killed, rolled, started
from soak.gauge import Gauge
from soak.orders import drawn_alone
from soak.verdict import Verdict, told

__all__ = ["main"]

# Goals are written down for this much growth: megabytes per 1,000 requests.
SLOPE = 0.5
SHORT = {
    "requests": 200,
    "orders": 12,
    "leak_requests": 150,
    "leak_bytes": 400_000,
    "clients": 20,
    "killing": 12.0,
    "starts": 2,
    "probes": 60,
    "overload": 15.0,
}


def main(arguments: Sequence[str]) -> int:
    """Run it with these command line arguments; the exit status is 1 when a goal is not reached."""
    parser = argparse.ArgumentParser(prog="scripts/soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of all that chance decides; default 1")
    parser.add_argument("--short", action="store_true", help="a minute or two of each, for every change")
    parser.add_argument(
        "--only", choices=tuple(_PHASES), action="append", help="only this phase; may be repeated"
    )
    parser.add_argument("--requests", type=int, default=10_000, help="of the crowd; default 10000")
    parser.add_argument("--orders", type=int, default=60, help="different pictures of theirs; default 60")
    parser.add_argument(
        "--leak-requests", type=int, default=2_000, help="of the crowd with a leak; default 2000"
    )
    parser.add_argument("--leak-bytes", type=int, default=20_000, help="leaked by a request; default 20000")
    parser.add_argument("--clients", type=int, default=100, help="that leave at once; default 100")
    parser.add_argument("--killing", type=float, default=120, help="seconds of it; default 120")
    parser.add_argument("--starts", type=int, default=20, help="of a server; default 20")
    parser.add_argument("--probes", type=int, default=400, help="during the restart, at least; default 400")
    parser.add_argument("--overload", type=float, default=60, help="seconds of it; default 60")
    parser.add_argument("--save", action="store_true", help="write the document to benchmarks/results")
    options = parser.parse_args(arguments)
    if options.short:
        vars(options).update(SHORT)
    report = Report("soak", {k: v for k, v in vars(options).items() if k != "save"})
    verdicts: list[Verdict] = []
    for phase in options.only or _PHASES:
        report.say(f"{phase} …")
        found = asyncio.run(_PHASES[phase](options))
        report.say(told(found))
        verdicts += found
    broken = [verdict.goal for verdict in verdicts if not verdict.holds]
    report.add(verdicts=[vars(verdict) | {"holds": verdict.holds} for verdict in verdicts], broken=broken)
    report.finish(save=options.save)
    return 1 if broken else 0


async def _crowd(options: argparse.Namespace) -> list[Verdict]:
    with served(OMP_NUM_THREADS="1", JUBAKO_MAX_WAIT="600") as server:
        tally, gauge = await _come(server, options, options.requests)
    for kind in ("lost", "doubled", "mixed_up", "unexpected"):
        for each in getattr(tally, kind)[:5]:
            print(f"  {kind}: {each}")
    print(f"  asked: {json.dumps(tally.asked)}")
    slopes = gauge.slopes()
    return [
        Verdict("requests lost", len(tally.lost), 0, tally.total),
        Verdict("jobs that ended twice", len(tally.doubled), 0, tally.asked["job"]),
        Verdict("pictures that were another's", len(tally.mixed_up), 0, tally.compared),
        Verdict("answers of another kind than expected", len(tally.unexpected), 0, tally.total),
        *(
            Verdict(f"MB that {name} grows per 1,000 requests", slope, SLOPE, gauge.count)
            for name, slope in slopes.items()
            if not options.short  # so few requests tell nothing
        ),
        Verdict("threads and files more than before", gauge.grown(), 8, gauge.count),
    ]


async def _leak(options: argparse.Namespace) -> list[Verdict]:
    """The gauge must see the planted leak, of which it is told nothing."""
    leak = str(options.leak_bytes)
    with served("soak.leaky:Gateway", OMP_NUM_THREADS="1", JUBAKO_MAX_WAIT="600", SOAK_LEAK=leak) as server:
        _, gauge = await _come(server, options, options.leak_requests)
    slope = gauge.slopes()["Gateway"]
    return [Verdict("MB that the leaking gateway grows per 1,000 requests", slope, SLOPE, gauge.count, True)]


async def _come(server: Served, options: argparse.Namespace, requests: int) -> tuple[Tally, Gauge]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(server.url, connector=connector) as client:
        orders = await drawn_alone(client, options.orders, options.seed)
        gauge = Gauge(server.process.pid)
        return await Crowd(client, orders, options.seed).come(requests, 16, gauge), gauge


async def _left(options: argparse.Namespace) -> list[Verdict]:
    with served(OMP_NUM_THREADS="1", JUBAKO_MAX_WAIT="3600") as server:
        await clients_left(server, 4, 3)
        return await clients_left(server, options.clients, 3)


async def _killed(options: argparse.Namespace) -> list[Verdict]:
    with served(OMP_NUM_THREADS="1", JUBAKO_FAMILIES="sd,sdxl") as server:
        return await family_killed(server, options.killing, 5)


async def _started(options: argparse.Namespace) -> list[Verdict]:
    return await started(options.starts, 5)


async def _rolled(options: argparse.Namespace) -> list[Verdict]:
    return await rolled(options.probes)


async def _overload(options: argparse.Namespace) -> list[Verdict]:
    with served(OMP_NUM_THREADS="1", JUBAKO_MAX_WAIT="10") as server:
        peak = 20 if options.overload > 20 else 8
        figures = await under_overload(
            server, clients=8, times=10, steps=10, peak=peak, seconds=options.overload
        )
    return [
        Verdict(
            "share of the peak's pictures at ten times its requests",
            figures["goodput_share"],
            0.9,
            figures["done"],
            True,
        ),
        Verdict(
            "seconds to a refusal, of 99 in 100", figures["refusal_p99_s"] or 0.0, 0.1, figures["refused"]
        ),
        Verdict(
            "refusals that don't say when to come again",
            figures["refusals_without_retry_after"],
            0,
            figures["refused"],
        ),
        Verdict(
            "share of promises kept", figures["promises_kept_share"] or 0.0, 0.99, figures["promises"], True
        ),
    ]


_PHASES: dict[str, Any] = {
    "crowd": _crowd,
    "leak": _leak,
    "left": _left,
    "killed": _killed,
    "started": _started,
    "rolled": _rolled,
    "overload": _overload,
}
