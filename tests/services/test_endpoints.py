"""BentoML's counters have a row for each route, and none for each path."""

from __future__ import annotations

import re

import httpx
import pytest
from server import Server

from jubako.services.endpoints import endpoint_of


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/txt2img", "other"),
        ("/v1/jobs", "/v1/jobs"),
        ("/v1/jobs/0a1b", "/v1/jobs/{id}"),
        ("/v1/jobs/0a1b/events", "/v1/jobs/{id}/events"),
        ("/v1/jobs/a/b/c/d", "other"),
        ("/v1/nothing", "other"),
        ("/readyz", "/readyz"),
    ],
)
def test_a_path_is_counted_by_its_route(path: str, endpoint: str) -> None:
    assert endpoint_of("GET", path) == endpoint


def test_no_id_and_nothing_made_up_is_in_the_counters(server: Server) -> None:
    for number in range(5):
        httpx.get(f"{server.url}/v1/jobs/made-up-{number}", timeout=10)
        httpx.get(f"{server.url}/made-up-{number}", timeout=10)
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    counted = set(re.findall(r'^bentoml_service_request_total\{endpoint="([^"]*)"', text, re.MULTILINE))
    assert "/v1/jobs/{id}" in counted
    assert "other" in counted
    assert not [endpoint for endpoint in counted if "made-up" in endpoint]
