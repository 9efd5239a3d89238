"""The routes of the gateway, read from the application itself: BentoML's own, mounted files, and ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

from server import ROOT

__all__ = ["Served", "served_routes"]


class Served(NamedTuple):
    """A method and a path, with its parameters in braces."""

    method: str
    path: str

    def at(self, value: str) -> str:
        """The path with its parameter filled in."""
        head, brace, rest = self.path.partition("{")
        return f"{head}{value}{rest.partition('}')[2]}" if brace else self.path


@cache
def served_routes() -> tuple[Served, ...]:
    """All of them but the probes."""
    sys.path.insert(0, str(ROOT))
    import service

    application = service.Gateway.to_asgi(is_main=True)
    found = set(_read(application.routes))
    assert Served("POST", "/txt2img") in found
    assert Served("GET", "/metrics") in found
    assert Served("GET", "/v1/jobs/{job_id}") in found
    return tuple(sorted(route for route in found if route.path not in {"/livez", "/readyz", "/healthz"}))


def _read(routes: Any, before: str = "") -> Iterator[Served]:
    for route in routes:
        path = before + route.path
        if inner := getattr(route, "routes", None):
            yield from _read(inner, path)
        elif methods := getattr(route, "methods", None):
            yield from (Served(method, path) for method in methods)
        else:
            yield Served("GET", f"{path}/index.css")
