"""Under which name BentoML's own counters count a path: they would keep rows of each that was ever asked for.

A job's id is in its path, and strangers may make up any: rows without end take memory without end.
"""

from __future__ import annotations

import copy
import re
from typing import Any

from starlette.types import Receive, Scope, Send

from jubako.services.scopes import is_probe, needed

__all__ = ["bound_endpoints", "endpoint_of"]

OTHER = "other"
_ID = re.compile(r"^(/v1/(?:jobs|videos|fine_tuning/jobs|adapters|models))/[^/]+(/[a-z]+)?$")


def endpoint_of(method: str, path: str) -> str:
    """The route's path with its id left out, or ``other`` where there is no such route."""
    if is_probe(method, path):
        return path
    if not needed(method, path):
        return OTHER
    if path == "/v1/videos/sync" or (found := _ID.match(path)) is None:
        return path if path.count("/") <= 3 else OTHER
    return f"{found[1]}/{{id}}{found[2] or ''}"


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
        await original(
            counting, {**scope, "path": endpoint_of(scope["method"], scope["path"])}, receive, send
        )

    bounded.bounded = True  # type: ignore[attr-defined]
    Counting.__call__ = bounded
