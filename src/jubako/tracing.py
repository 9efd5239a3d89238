"""Spans of requests, jobs, their stages and forwards. Without an exporter each costs one check, and no SDK.

BentoML makes the servers' own spans, of the gateway and of each family, and passes their context on; what is
here hangs from them. ``docs/operations.md`` has all names. No attribute holds a prompt, and no error's text.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from jubako.logs import PREFIX

__all__ = [
    "Attributes",
    "Link",
    "enabled",
    "fail",
    "link",
    "linked",
    "past",
    "span",
    "traceparent",
    "use",
]

Attributes = Mapping[str, str | float | bool]
Link = trace.SpanContext
"""Which span another one belongs to without being inside of it."""

_TRACE_CONTEXT = TraceContextTextMapPropagator()
_tracers: list[trace.Tracer] = []


def use(tracer: trace.Tracer) -> None:
    """Have this process make its spans with it, from here on."""
    _tracers[:] = [tracer]


def enabled() -> bool:
    """Whether spans are made here."""
    return bool(_tracers)


@contextmanager
def span(
    name: str, attributes: Attributes | None = None, *, asked_by: str | None = None
) -> Iterator[trace.Span | None]:
    """A span around what is in the block; None where none are made.

    With ``asked_by``, a traceparent, it begins a trace of its own that is linked to that span.
    """
    if not _tracers:
        yield None
        return
    with _tracers[0].start_as_current_span(
        name,
        None if asked_by is None else Context(),
        attributes=_named(attributes or {}),
        links=[trace.Link(told) for told in _links(asked_by)],
        # Their texts may quote what a client wrote.
        record_exception=False,
        set_status_on_exception=False,
    ) as made:
        yield made


def past(name: str, began: float, ended: float) -> None:
    """A child of the span at work, from and to these times of ``perf_counter``."""
    if _tracers:
        now = time.time_ns() - time.perf_counter_ns()
        begun = _tracers[0].start_span(name, start_time=now + int(began * 1e9))
        begun.end(now + int(ended * 1e9))


def linked(name: str, seconds: float, links: Sequence[Link], attributes: Attributes) -> None:
    """A span that has just ended, of no trace but linked to these."""
    if _tracers and links:
        now = time.time_ns()
        begun = _tracers[0].start_span(
            name,
            Context(),
            attributes=_named(attributes),
            links=[trace.Link(each) for each in links],
            start_time=now - int(seconds * 1e9),
        )
        begun.end(now)


def fail(made: trace.Span | None, code: str) -> None:
    """Say that a span ended in an error of this code."""
    if made is not None:
        made.set_attribute("error.type", code)
        made.set_status(trace.StatusCode.ERROR)


def link() -> Link | None:
    """The span at work, to be linked to; None where it goes nowhere."""
    if not _tracers:
        return None
    here = trace.get_current_span().get_span_context()
    return here if here.trace_flags.sampled else None


def traceparent() -> str | None:
    """The span at work in W3C's words, to be linked to by what runs later."""
    carrier: dict[str, str] = {}
    _TRACE_CONTEXT.inject(carrier)
    return carrier.get("traceparent")


def _links(asked_by: str | None) -> list[Link]:
    if asked_by is None:
        return []
    found = trace.get_current_span(_TRACE_CONTEXT.extract({"traceparent": asked_by})).get_span_context()
    return [found] if found.is_valid else []


def _named(attributes: Attributes) -> dict[str, str | float | bool]:
    return {PREFIX + name: value for name, value in attributes.items()}
