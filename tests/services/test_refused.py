"""A real server that refuses what its safety checker flags: every route, one of two pictures."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from checkers import one_of_two
from PIL import Image
from server import Server, serving

from jubako.catalog import load_catalog
from jubako.planning import plan
from jubako.request import TextToImage
from jubako.runner import Runner
from jubako.settings import load_settings

FLAGGED, CLEAN = ({"prompt": "a red circle", "steps": 4, "seed": seed} for seed in (7, 8))


def drawn(home: Path) -> list[Image.Image]:
    """Both pictures, by a runner that checks nothing."""
    catalog = load_catalog()
    runner = Runner(catalog.families["sd"], load_settings({"JUBAKO_HOME": str(home)}))
    jobs = [plan(TextToImage.model_validate(fields), catalog) for fields in (FLAGGED, CLEAN)]
    results = [asyncio.run(runner.generate(job)) for job in jobs]
    runner.close()
    return [Image.open(io.BytesIO(result.content)) for result in results]


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("strict")
    one_of_two(folder / "checker", *drawn(folder / "before"))
    licence = {"id": "mine", "url": "https://example.com/licence", "commercial": "yes"}
    checker = {"title": "A small one", "repo": None, "folder": "checker", "licence": licence}
    document = {"family": "sd", "checkers": {"safety-checker": checker}}
    (folder / "sd.yaml").write_text(yaml.safe_dump(document), encoding="utf-8")
    own: dict[str, Any] = {"JUBAKO_SAFETY": "refuse", "JUBAKO_CATALOG": str(folder)}
    with serving(folder / "server", JUBAKO_FAMILIES="sd", **own) as server:
        yield server


def finished(server: Server, fields: dict[str, Any]) -> dict[str, Any]:
    job = server.post("/v1/jobs", {"task": "txt2img", **fields}).json()
    while job["state"] not in {"succeeded", "failed"}:
        time.sleep(0.05)
        job = httpx.get(f"{server.url}/v1/jobs/{job['id']}", timeout=60).json()
    return dict(job)


@pytest.mark.parametrize("route", ["/txt2img", "/v1/images/generations"])
def test_what_is_flagged_is_refused_in_the_one_shape(strict: Server, route: str) -> None:
    reply = strict.post(route, FLAGGED)
    assert reply.status_code == 422, reply.text
    error = reply.json()["error"]
    assert (error["code"], error["type"], error["param"]) == (
        "content_refused",
        "invalid_request_error",
        None,
    )
    told = strict.post("/v1/images/generations", FLAGGED | {"stream": True}).text
    assert json.loads(told.rpartition("data: ")[2]) == {"error": error}
    assert "b64_json" not in told


def test_what_is_not_is_given_out_and_says_that_it_was_looked_at(strict: Server) -> None:
    reply = strict.post("/txt2img", CLEAN)
    assert (reply.status_code, reply.headers["X-Flagged"]) == (200, "false")
    assert strict.post("/v1/images/generations", CLEAN).json()["data"][0]["flagged"] is False
    (output,) = finished(strict, CLEAN)["outputs"]
    assert output["flagged"] is False


def test_a_job_of_what_is_flagged_fails_and_keeps_no_file(strict: Server) -> None:
    job = finished(strict, FLAGGED)
    assert (job["state"], job["error"]["code"], job["outputs"]) == ("failed", "content_refused", [])
    assert httpx.get(f"{strict.url}/v1/jobs/{job['id']}/result", timeout=60).status_code == 409
    events = httpx.get(f"{strict.url}/v1/jobs/{job['id']}/events", timeout=60).text
    assert "event: failed" in events
    assert '"preview"' not in events
