"""Logs and traces of a real server: lines of JSON, spans at a collector, and in neither a prompt or a key."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from api_keys import KEYS, as_setting
from collector import Collector, Span, collecting
from server import ROOT, Server, serving

from jubako.catalog import load_catalog
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.services.family import _announce

PROMPT = "a red circle by the unmistakable-prompt"
REQUEST = {"prompt": PROMPT, "negative_prompt": f"no {PROMPT}", "num_inference_steps": 4, "seed": 1}
STAGES = ["queued", "prepared", "denoised", "decoded", "encoded"]
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with collecting() as collector:
        yield collector


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    """A server that logs at every level."""
    with serving(
        tmp_path_factory.mktemp("traced"),
        options=["--debug"],
        JUBAKO_FAMILIES="sd",
        JUBAKO_API_KEYS=as_setting(),
        JUBAKO_LOG_FORMAT="json",
        OTEL_EXPORTER_OTLP_ENDPOINT=collector.url,
        OTEL_BSP_SCHEDULE_DELAY="100",
    ) as server:
        yield server


def post(server: Server, path: str, fields: Any, **headers: str) -> httpx.Response:
    return httpx.post(
        f"{server.url}{path}", json=fields, headers={**KEYS["alice"].headers, **headers}, timeout=60
    )


def lines(server: Server) -> list[dict[str, Any]]:
    """The log so far, without what BentoML writes before it has imported the service."""
    whole, _, _ = server.log.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines() if "Importing service" not in line]


def access(server: Server, request_id: str, *services: str) -> dict[str, dict[str, Any]]:
    """BentoML's own lines of a request, by service; they are written after the answer was sent."""
    for _ in range(200):
        own = [line for line in lines(server) if line.get("request_id") == request_id]
        found = {line["service"]: line for line in own if line["logger"] == "bentoml.access"}
        if found.keys() == set(services):
            return found
        time.sleep(0.05)
    raise AssertionError(own)


def tree(spans: list[Span], root: Span) -> Any:
    """A span's service and name, and its children in the order of their starts."""
    children = sorted((span for span in spans if span.parent == root.id), key=lambda span: span.start)
    return (root.service, root.name, [tree(spans, child) for child in children])


def test_the_spans_of_a_picture_are_one_tree_across_two_processes(
    traced: Server, collector: Collector
) -> None:
    # The last flag: the client records it.
    reply = post(traced, "/txt2img", REQUEST, traceparent=f"00-{TRACE}-{PARENT}-01")
    job_id = reply.raise_for_status().headers["X-Job-Id"]

    def whole(spans: list[Span]) -> bool:
        mine = [span for span in spans if span.trace == TRACE]
        return len(mine) == 9 and len([span for span in spans if span.name == "forward"]) >= 4

    spans = collector.wait_for(whole)
    mine = [span for span in spans if span.trace == TRACE]
    (root,) = (span for span in mine if span.parent == PARENT)
    job_tree: Any = ("SD", "job", [("SD", stage, []) for stage in STAGES])
    called = ("SD", "POST /generate", [job_tree])
    assert tree(mine, root) == ("Gateway", "POST /txt2img", [("Gateway", "turn", []), called])
    assert len({span.process for span in mine}) == 2
    assert (
        root.attributes.items()
        >= {
            "http.route": "/txt2img",
            "http.status_code": 200,
            "jubako.request_id": reply.headers["X-Request-ID"],
            "jubako.job_id": job_id,
            "jubako.owner": "alice",
            "jubako.model": "tiny-sd",
        }.items()
    )
    (job,) = (span for span in mine if span.name == "job")
    assert job.attributes == {
        "jubako.job_id": job_id,
        "jubako.task": "txt2img",
        "jubako.family": "sd",
        "jubako.model": "tiny-sd",
        "jubako.width": 64,
        "jubako.height": 64,
        "jubako.steps": 4,
        "jubako.scheduler": "DDIMScheduler",
        "jubako.durable": False,
    }
    own = [span for span in mine if span.parent == job.id]
    assert all(job.start <= span.start <= span.end <= job.end for span in own)
    # Forwards have several jobs, and so no one parent.
    forwards = [span for span in spans if job.id in span.links]
    assert [(span.name, span.parent, span.trace == TRACE) for span in forwards] == [
        ("forward", "", False)
    ] * 4
    assert forwards[0].attributes == {
        "jubako.family": "sd",
        "jubako.size": 256,
        "jubako.rows": 2,
        "jubako.live_rows": 2,
    }
    denoised = next(span for span in own if span.name == "denoised")
    assert sum(span.end - span.start for span in forwards) <= denoised.end - denoised.start


def test_a_durable_job_is_a_trace_of_its_own_linked_to_its_request(
    traced: Server, collector: Collector
) -> None:
    reply = post(traced, "/v1/jobs", {"task": "txt2img", **REQUEST}, **{"X-Request-ID": "asked-for-it"})
    job_id = reply.json()["id"]

    def named(spans: list[Span], name: str, **attributes: str) -> list[Span]:
        wanted = {f"jubako.{key}": value for key, value in attributes.items()}
        return [span for span in spans if span.name == name and span.attributes.items() >= wanted.items()]

    spans = collector.wait_for(
        lambda spans: bool(
            named(spans, "durable job", job_id=job_id)
            and named(spans, "job", job_id=job_id)
            and named(spans, "POST /generate_events")
        )
    )
    (run,) = named(spans, "durable job", job_id=job_id)
    (asked,) = named(spans, "POST /v1/jobs", request_id="asked-for-it")
    assert run.links == [asked.id]
    assert (run.parent, run.trace == asked.trace) == ("", False)
    (made,) = named(spans, "job", job_id=job_id)
    assert made.trace == run.trace
    assert made.attributes["jubako.durable"] is True
    # Whatever is logged of it has the id of the request that it came with.
    told = [line for line in lines(traced) if line["message"] == f"job {job_id} ended"]
    assert [(line["service"], line["request_id"], line["job_id"], line["owner"]) for line in told] == [
        ("SD", "asked-for-it", job_id, "alice")
    ]
    assert told[0]["trace_id"] == made.trace


def test_a_failed_job_s_span_has_its_code_and_not_its_text(traced: Server, collector: Collector) -> None:
    job = post(traced, "/v1/jobs", {"task": "txt2img", **REQUEST, "num_inference_steps": 150}).json()
    here = f"{traced.url}/v1/jobs/{job['id']}"
    headers = KEYS["alice"].headers
    while httpx.get(here, headers=headers).json()["step"] < 1:
        time.sleep(0.02)
    httpx.delete(here, headers=headers).raise_for_status()

    def ended(spans: list[Span]) -> list[Span]:
        return [
            span
            for span in spans
            if span.name == "durable job" and span.attributes["jubako.job_id"] == job["id"]
        ]

    (run,) = ended(collector.wait_for(lambda spans: bool(ended(spans))))
    assert (run.failed, run.attributes["error.type"]) == (True, "cancelled")


def test_a_request_is_found_by_its_id_in_the_lines_of_both_processes(traced: Server) -> None:
    reply = post(traced, "/txt2img", REQUEST, **{"X-Request-ID": "find-me/1"}).raise_for_status()
    assert reply.headers["X-Request-ID"] == "find-me/1"
    told = access(traced, "find-me/1", "Gateway", "SD")
    for line in told.values():
        assert line["job_id"] == reply.headers["X-Job-Id"]
        assert (line["owner"], line["model"], line["level"]) == ("alice", "tiny-sd", "INFO")
    assert told["Gateway"]["trace_id"] == told["SD"]["trace_id"]
    assert told["Gateway"]["span_id"] != told["SD"]["span_id"]


@pytest.mark.parametrize("given", ["", "two words", "x" * 129, 'a","owner":"root'])
def test_an_id_that_is_none_is_replaced_and_a_refused_request_has_one(traced: Server, given: str) -> None:
    reply = httpx.post(
        f"{traced.url}/txt2img",
        json=REQUEST,
        # What a client says of itself in baggage is not believed.
        headers={"X-Request-ID": given, "baggage": "jubako.owner=root,jubako.job_id=forged"},
    )
    assert reply.status_code == 401
    made = reply.headers["X-Request-ID"]
    assert made != given
    assert len(made) == 32
    assert not access(traced, made, "Gateway")["Gateway"].keys() & {"owner", "job_id"}


def test_no_prompt_and_no_key_is_logged_or_traced_at_any_level(traced: Server, collector: Collector) -> None:
    post(traced, "/v1/images/generations", {**REQUEST, "n": 2, "stream": True}).raise_for_status()
    for wrong in ({"nothing": PROMPT}, {"steps": PROMPT}, {"seed": PROMPT}, {"loras": PROMPT}):
        assert post(traced, "/txt2img", {**REQUEST, **wrong}).status_code == 400
        assert post(traced, "/v1/images/generations", {**REQUEST, **wrong}).status_code == 400
    cut = httpx.post(
        f"{traced.url}/txt2img?prompt={PROMPT}",
        content=f'{{"prompt": "{PROMPT}',
        headers=KEYS["alice"].headers,
    )
    assert cut.status_code == 400
    wrong_key = {
        "Authorization": f"Bearer {KEYS['alice'].secret}x",
        "baggage": f"{PROMPT},x={PROMPT}",
        "X-Request-ID": PROMPT,
    }
    mark = httpx.post(f"{traced.url}/txt2img", json=REQUEST, headers=wrong_key).headers["X-Request-ID"]
    collector.wait_for(lambda spans: any(span.attributes.get("jubako.request_id") == mark for span in spans))
    said = lines(traced)
    assert {line["service"] for line in said} == {"supervisor", "Gateway", "SD"}
    assert "DEBUG" in {line["level"] for line in said}
    log = traced.log.read_text(encoding="utf-8")
    for secret in ("unmistakable", *(key.secret for key in KEYS.values())):
        assert secret not in log
        assert secret.encode() not in collector.content


def test_prompts_are_logged_where_that_is_set(caplog: pytest.LogCaptureFixture) -> None:
    job = plan(TextToImage(prompt=PROMPT), load_catalog())
    with caplog.at_level(logging.DEBUG):
        _announce(job, prompts=False)
        assert not caplog.records
        _announce(job, prompts=True)
    assert PROMPT in caplog.text
    assert job.id in caplog.text


def test_lines_of_text_have_the_id_as_well(server: Server) -> None:
    reply = server.post("/txt2img", {"prompt": "a red circle", "num_inference_steps": 1})
    known = f"(request_id={reply.headers['X-Request-ID']},job_id={reply.headers['X-Job-Id']},model=tiny-sd)"
    for _ in range(200):
        if server.log.read_text(encoding="utf-8").count(known) == 2:
            return
        time.sleep(0.05)
    raise AssertionError(server.tail())


def test_what_makes_spans_imports_no_sdk() -> None:
    code = "import jubako.tracing, jubako.logs, sys; print([m for m in sys.modules if 'telemetry.sdk' in m])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]"
