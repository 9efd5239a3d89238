"""Under which name BentoML's own counters count a request: its route, where they would take its path.

A job's id is in its path, and strangers make up any: rows without end take memory without end.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from starlette.routing import BaseRoute, Match, Mount, Route
from starlette.types import Receive, Scope, Send

__all__ = ["bound_endpoints", "endpoint_of"]

OTHER = "other"


def endpoint_of(scope: Scope) -> str:
    """The path of the request's route, with its parameters in braces; ``other`` where there is none."""
    for path, route in _routes(scope["app"]):
        if route.matches(scope)[0] is not Match.NONE:
            return path
    return OTHER


@cache
def _routes(app: Any) -> Sequence[tuple[str, BaseRoute]]:
    return tuple(_named(app.routes))


def _named(routes: Sequence[BaseRoute]) -> Iterator[tuple[str, BaseRoute]]:
    for route in routes:
        if isinstance(route, Mount) and not route.path and route.routes:
            yield from _named(route.routes)
        elif isinstance(route, Mount):
            yield f"{route.path}/*", route
        elif isinstance(route, Route):
            yield route.path, route


def bound_endpoints() -> None:
    """Have BentoML's middleware count by those names in this process; twice is as good as once."""
    from bentoml._internal.server.http.instruments import RunnerTrafficMetricsMiddleware as Counting

    original = Counting.__call__
    if getattr(original, "bounded", False):
        return

    async def bounded(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/metrics":
            await original(self, scope, receive, send)
            return

        async def app(_: Scope, receive: Receive, send: Send) -> None:
            await self.app(scope, receive, send)

        if not self._is_setup:
            self._setup()
        counting = copy.copy(self)
        counting.app = app
        await original(counting, {**scope, "path": endpoint_of(scope)}, receive, send)

    bounded.bounded = True  # type: ignore[attr-defined] # as of the supervision
    Counting.__call__ = bounded
