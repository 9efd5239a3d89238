"""What BentoML's processes log and trace, and the id by which a request is found in both.

A worker configures its logging before it imports the service's module, and asks for its tracer provider
after: the call in between is the one place where both can be had otherwise.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from bentoml._internal.container import BentoMLContainer
from bentoml._internal.context import server_context
from opentelemetry import trace
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jubako import logs, tracing
from jubako.job import new_id
from jubako.services.endpoints import bound_endpoints
from jubako.settings import Settings

__all__ = ["RequestId", "observe"]

HEADER = "X-Request-ID"
_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


def observe(settings: Settings) -> None:
    """Have this process log as is set, count by routes, and send spans if there is where to; twice is as good
    as once.
    """
    logs.configure(settings.log_format, _service)
    bound_endpoints()
    if _wanted(os.environ):
        BentoMLContainer.tracer_provider.set(_Provider())


def _service() -> str:
    return server_context.service_name or "supervisor"


def _wanted(environ: Mapping[str, str]) -> bool:
    endpoints = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
    off = environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true"
    return not off and any(environ.get(name) for name in endpoints)


class _Provider(trace.TracerProvider):
    """Ours in the place of BentoML's, made with its first tracer: before, no process knows its service."""

    def get_tracer(self, *arguments: Any, **options: Any) -> trace.Tracer:
        """A tracer whose spans are sent."""
        return _provider().get_tracer(*arguments, **options)


@cache
def _provider() -> trace.TracerProvider:
    from jubako.span_export import exporting

    provider = exporting(_service())
    tracing.use(provider.get_tracer("jubako"))
    return provider


class RequestId:
    """The gateway's outermost: the request's id is the client's X-Request-ID or made here, and sent back."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on with its id known to all that is logged and traced of it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get(HEADER, "")
        request_id = given if _ID.fullmatch(given) else new_id()
        logs.forget()
        logs.about(request_id=request_id)
        served = trace.get_current_span()

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
                if tracing.enabled():
                    _describe(served, scope)
            await send(message)

        await self.app(scope, receive, marked)


def _describe(served: trace.Span, scope: Scope) -> None:
    """Name a server's span by its route, without ids; a query may hold anything, and is left out."""
    served.set_attributes({f"{logs.PREFIX}{name}": value for name, value in logs.facts().items()})
    if route := getattr(scope.get("route"), "path_format", None):
        served.update_name(f"{scope['method']} {route}")
        served.set_attribute("http.route", route)
    if scope.get("query_string"):
        path = scope["path"]
        served.set_attributes({"http.url": path, "http.target": path, "url.query": ""})
