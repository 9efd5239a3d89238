"""A collector of spans: what an OpenTelemetry exporter sends by HTTP, taken apart."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

__all__ = ["Collector", "Span", "collecting"]


@dataclass(frozen=True)
class Span:
    """A span as it came; ``links`` are the ids of the spans that it is linked to. Times are nanoseconds."""

    service: str
    process: str
    name: str
    kind: int
    trace: str
    id: str
    parent: str
    start: int
    end: int
    attributes: dict[str, Any]
    links: list[str]
    failed: bool


@dataclass
class Collector:
    """All that came so far, as spans and as bytes."""

    url: str
    spans: list[Span] = field(default_factory=list)
    content: bytes = b""

    def wait_for(self, enough: Callable[[list[Span]], bool], seconds: float = 20) -> list[Span]:
        """The spans as soon as there are enough."""
        deadline = time.monotonic() + seconds
        while not enough(self.spans):
            assert time.monotonic() < deadline, sorted({(span.service, span.name) for span in self.spans})
            time.sleep(0.05)
        return list(self.spans)

    def take(self, content: bytes) -> None:
        """Take an export apart."""
        self.content += content
        for resource in ExportTraceServiceRequest.FromString(content).resource_spans:
            named = _values(resource.resource.attributes)
            self.spans += [
                Span(
                    named["service.name"],
                    named.get("service.instance.id", ""),
                    span.name,
                    span.kind,
                    span.trace_id.hex(),
                    span.span_id.hex(),
                    span.parent_span_id.hex(),
                    span.start_time_unix_nano,
                    span.end_time_unix_nano,
                    _values(span.attributes),
                    [link.span_id.hex() for link in span.links],
                    span.status.code == 2,
                )
                for scope in resource.scope_spans
                for span in scope.spans
            ]


def _values(attributes: Any) -> dict[str, Any]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in attributes}


@contextmanager
def collecting() -> Iterator[Collector]:
    """A collector on a port of its own, until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            if self.path == "/v1/traces":
                collector.take(body)
            self.send_response(200 if self.path == "/v1/traces" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}")
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield collector
        finally:
            server.shutdown()
            thread.join()
