"""BentoML's counters have a row for each route, and none for each path."""

from __future__ import annotations

import re

import httpx
import pytest
from server import Server
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Mount, Route

from jubako.services.endpoints import endpoint_of


async def answer(_: object) -> Response:
    return Response()


INNER = Starlette(routes=[Route("/v1/jobs", answer), Route("/v1/jobs/{id}/events", answer)])
APP = Starlette(
    routes=[
        Route("/txt2img", answer, methods=["POST"]),
        Mount("/static", app=Response()),
        Mount("", app=INNER),
    ]
)


@pytest.mark.parametrize(
    ("path", "endpoint"),
    [
        ("/txt2img", "/txt2img"),
        ("/v1/jobs", "/v1/jobs"),
        ("/v1/jobs/0a1b/events", "/v1/jobs/{id}/events"),
        ("/v1/jobs/0a1b/madeup", "other"),
        ("/v1/images/madeup", "other"),
        ("/static/any", "/static/*"),
        ("/", "other"),
    ],
)
def test_a_path_is_counted_by_its_route(path: str, endpoint: str) -> None:
    scope = {"type": "http", "method": "GET", "path": path, "root_path": "", "headers": [], "app": APP}
    assert endpoint_of(scope) == endpoint


def test_no_id_and_nothing_made_up_is_in_the_counters(server: Server) -> None:
    for path in ("v1/jobs/madeup{}", "v1/jobs/1/madeup{}", "v1/images/madeup{}", "madeup{}", "v1/madeup{}/x"):
        for number in "ab":
            httpx.get(f"{server.url}/{path.format(number)}", timeout=10)
    text = httpx.get(f"{server.url}/metrics", timeout=10).text
    counted = set(re.findall(r'^bentoml_service_request_total\{endpoint="([^"]*)"', text, re.MULTILINE))
    assert {"/v1/jobs/{job_id}", "/readyz", "other"} <= counted
    assert not [endpoint for endpoint in counted if "madeup" in endpoint]
