"""Where spans go: by OTLP over HTTP, to where OpenTelemetry's own variables say. The SDK comes in with it."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from time import monotonic

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, SERVICE_NAMESPACE, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.sampling import Decision, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind, TraceState, get_current_span
from opentelemetry.util.types import Attributes

__all__ = ["Selection", "exporting"]

_PROBES = {f"GET {path}" for path in ("/livez", "/readyz", "/healthz", "/metrics")}
# The instrumentation's spans of single messages, of which a stream has one for each step.
_MESSAGES = tuple(f" {kind} {way}" for kind in ("http", "websocket") for way in ("send", "receive"))


# A process that ends begins no export later than this. One at work takes OTEL_EXPORTER_OTLP_TIMEOUT at most.
END_SECONDS = 2.0


class Selection(Sampler):
    """Leaves out probes and single messages; what is linked goes with what it is linked to."""

    def __init__(self, others: Sampler) -> None:
        """``others`` decides on all else."""
        self._others = others

    def should_sample(  # noqa: PLR0917 # the SDK's signature
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Attributes = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Whether a span is made, and sent."""
        if name in _PROBES or name.endswith(_MESSAGES):
            return SamplingResult(Decision.DROP)
        if links and not get_current_span(parent_context).get_span_context().is_valid:
            sampled = any(link.context.trace_flags.sampled for link in links)
            return SamplingResult(Decision.RECORD_AND_SAMPLE if sampled else Decision.DROP, attributes)
        return self._others.should_sample(
            parent_context, trace_id, name, kind, attributes, links, trace_state
        )

    def get_description(self) -> str:
        """What it is."""
        return f"Selection({self._others.get_description()})"


class _Exporter(OTLPSpanExporter):
    until = inf

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        return super().export(spans) if monotonic() < self.until else SpanExportResult.FAILURE


class _Processor(BatchSpanProcessor):
    """By itself it holds a process up for half a minute when nobody takes its spans."""

    def __init__(self, exporter: _Exporter) -> None:
        super().__init__(exporter)
        self._last = exporter

    def shutdown(self) -> None:
        self._last.until = monotonic() + END_SECONDS
        super().shutdown()  # type: ignore[no-untyped-call]


def exporting(service: str) -> TracerProvider:
    """What makes the spans of a service's process, and sends them."""
    named = Resource.create({SERVICE_NAME: service, SERVICE_NAMESPACE: "jubako"})
    provider = TracerProvider(resource=named.merge(OTELResourceDetector().detect()))
    provider.sampler = Selection(provider.sampler)
    provider.add_span_processor(_Processor(_Exporter()))
    return provider
