"""What Prometheus is told: the documented measures, and values that follow what was done."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from server import ROOT, Server, serving

from jubako.metrics import MEASURES

REQUEST = {"prompt": "a red circle", "num_inference_steps": 4, "seed": 1}


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of its own: its counters are this test's alone."""
    with serving(tmp_path_factory.mktemp("watched"), JUBAKO_FAMILIES="sd") as server:
        yield server


def values(server: Server, name: str) -> dict[tuple[tuple[str, str], ...], float]:
    text = httpx.get(f"{server.url}/metrics", timeout=10).raise_for_status().text
    return {
        tuple(sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def test_every_measure_is_documented() -> None:
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    table = re.findall(r"^\| `(jubako_\w+)` \| (\w+) \| (.*?) \| (.*) \|$", page, re.MULTILINE)
    assert table == [
        (
            f"jubako_{measure.name}" + ("_total" if measure.kind == "counter" else ""),
            measure.kind,
            ", ".join(f"`{label}`" for label in measure.labels),
            measure.says,
        )
        for measure in MEASURES
    ]


def test_the_dashboard_and_the_alerts_speak_of_measures_that_there_are() -> None:
    known = {
        f"jubako_{measure.name}{suffix}"
        for measure in MEASURES
        for suffix in {"counter": ["_total"], "gauge": [""], "histogram": ["_sum", "_count", "_bucket"]}[
            measure.kind
        ]
    }
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8").partition("## Alerts")[2]
    board = (ROOT / "deploy" / "grafana" / "jubako.json").read_text(encoding="utf-8")
    named = set(re.findall(r"jubako_\w+", page + board)) - {"jubako_"}
    assert named <= known
    assert len(set(re.findall(r"jubako_\w+", board))) >= 10


def test_counters_follow_what_was_done(watched: Server, tmp_path: Path) -> None:
    for _ in range(3):
        watched.post("/txt2img", REQUEST).raise_for_status()
    assert watched.post("/txt2img", {"prompt": "x", "steps": 0}).status_code == 400
    done = (("model", "tiny-sd"), ("outcome", "succeeded"))
    assert values(watched, "jubako_results_total")[done] == 3
    assert values(watched, "jubako_errors_total")[(("code", "invalid_value"),)] == 1
    assert sum(values(watched, "jubako_forward_seconds_count").values()) == 12
    assert values(watched, "jubako_forward_rows_sum")[(("family", "sd"),)] == 24
    stages = values(watched, "jubako_stage_seconds_count")
    assert {dict(labels)["stage"]: count for labels, count in stages.items()} == dict.fromkeys(
        ("queued", "prepared", "denoised", "decoded", "encoded"), 3
    )
    assert values(watched, "jubako_model_loads_total") == {(("model", "tiny-sd"),): 1}
    assert values(watched, "jubako_resident_bytes")[(("family", "sd"),)] > 10_000_000
    sd = (("family", "sd"),)
    deadline = time.monotonic() + 10  # the queues are looked at once a second
    while any(values(watched, name)[sd] for name in ("jubako_at_work", "jubako_live_rows")):
        assert time.monotonic() < deadline


def test_steps_of_cancelled_jobs_are_wasted(watched: Server) -> None:
    job = watched.post("/v1/jobs", {"task": "txt2img", **REQUEST, "num_inference_steps": 150}).json()
    here = f"{watched.url}{job['links']['self']}"
    while httpx.get(here).json()["step"] < 5:
        pass
    httpx.delete(here).raise_for_status()
    for _ in range(100):
        if (wasted := values(watched, "jubako_wasted_steps_total")) and sum(wasted.values()) >= 5:
            return
        httpx.get(f"{watched.url}/readyz")
    raise AssertionError(wasted)
