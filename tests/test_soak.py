"""The soak: its gauge and its verdicts by themselves, and its short form against real servers."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from server import ROOT

from soak.gauge import Gauge
from soak.verdict import Verdict, told

LONG = pytest.mark.skipif(
    os.environ.get("JUBAKO_LONG_TESTS") != "1", reason="takes minutes: set JUBAKO_LONG_TESTS=1"
)


def test_a_figure_past_its_bound_breaks_the_goal_and_so_does_nothing_measured() -> None:
    assert Verdict("lost", 0, 0, 100).holds
    assert not Verdict("lost", 1, 0, 100).holds
    assert not Verdict("lost", 0, 0, 0).holds
    assert Verdict("share", 0.95, 0.9, 5, at_least=True).holds
    assert not Verdict("share", 0.85, 0.9, 5, at_least=True).holds
    assert told([Verdict("requests lost", 2, 0, 1000)]) == "BROKEN requests lost: 2 (at most 0; N = 1,000)"


def test_the_gauge_tells_a_process_that_grows_from_one_that_does_not() -> None:
    program = (
        "import sys; kept = [b'']\nfor line in sys.stdin: kept.append(b'x' * int(line)); print(flush=True)"
    )
    slopes = {}
    for leak in (0, 100_000):
        command = [sys.executable, "-c", program]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin
            assert process.stdout
            gauge = Gauge(process.pid)
            for served in range(100):
                print(leak, file=process.stdin, flush=True)
                process.stdout.readline()
                gauge.read(served)
            slopes[leak] = gauge.slopes()["supervisor"]
            assert gauge.grown() == 0
            process.stdin.close()
    assert slopes[0] < 1
    assert slopes[100_000] == pytest.approx(100, rel=0.1)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "phase",
    [
        "crowd",
        "left",
        "killed",
        *(pytest.param(name, marks=LONG) for name in ("leak", "started", "rolled", "overload")),
    ],
)
def test_the_short_form_reaches_its_goals(phase: str) -> None:
    """Of the overload only what does not depend on what else the machine does."""
    command = [sys.executable, "scripts/soak", "--short", "--only", phase]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    document = json.loads(done.stdout.splitlines()[-1])
    timed = [verdict["goal"] for verdict in document["verdicts"] if "share" in verdict["goal"]]
    timed += [verdict["goal"] for verdict in document["verdicts"] if verdict["goal"].startswith("seconds")]
    assert document["verdicts"]
    assert [goal for goal in document["broken"] if goal not in timed] == [], done.stdout + done.stderr
