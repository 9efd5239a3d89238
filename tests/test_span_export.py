"""Which spans are sent: by a real provider, into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased, Sampler

from jubako import tracing
from jubako.span_export import Selection

SAMPLED, UNSAMPLED = (f"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-0{flag}" for flag in (1, 0))


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Sampler], list[str]]]:
    """Makes spans from here on, selected by this sampler; gives the names of those that were sent before."""
    memory = InMemorySpanExporter()

    def begin(roots: Sampler) -> list[str]:
        provider = TracerProvider(Selection(roots), shutdown_on_exit=False)
        provider.add_span_processor(SimpleSpanProcessor(memory))
        monkeypatch.setattr(tracing, "_tracers", [provider.get_tracer("test")])
        return [span.name for span in memory.get_finished_spans()]

    yield begin
    memory.clear()


def names(sent: Callable[[Sampler], list[str]]) -> list[str]:
    return sent(ALWAYS_OFF)


def test_probes_and_single_messages_are_left_out(sent: Callable[[Sampler], list[str]]) -> None:
    sent(ParentBased(ALWAYS_ON))
    with tracing.span("GET /readyz"), tracing.span("inside"):
        assert tracing.link() is None
    with tracing.span("POST /generate_events"), tracing.span("POST /generate_events http send"):
        pass
    assert names(sent) == ["POST /generate_events"]


@pytest.mark.parametrize("roots", [ALWAYS_ON, ALWAYS_OFF], ids=["all", "none"])
def test_what_is_linked_goes_with_what_it_is_linked_to(
    sent: Callable[[Sampler], list[str]], roots: Sampler
) -> None:
    sent(ParentBased(roots))
    with tracing.span("wanted", asked_by=SAMPLED):
        link = tracing.link()
        tracing.past("stage", 0.0, 1.0)
    with tracing.span("unwanted", asked_by=UNSAMPLED):
        assert tracing.link() is None
        tracing.past("unwanted stage", 0.0, 1.0)
    assert link is not None
    tracing.linked("forward", 0.1, [link], {"rows": 2})
    # No job of it is sent.
    tracing.linked("unwanted forward", 0.1, [], {"rows": 2})
    assert names(sent) == ["stage", "wanted", "forward"]


def test_a_root_that_nothing_asked_for_is_the_sampler_s(sent: Callable[[Sampler], list[str]]) -> None:
    for roots, name in ((ALWAYS_ON, "kept"), (ALWAYS_OFF, "dropped")):
        sent(ParentBased(roots))
        with tracing.span(name, asked_by=""):
            pass
        with tracing.span(name, asked_by="no traceparent at all"):
            pass
    assert names(sent) == ["kept", "kept"]


def test_without_a_tracer_nothing_is_made() -> None:
    assert not tracing.enabled()
    with tracing.span("x", {"a": 1}) as span:
        assert span is None
        tracing.fail(span, "cancelled")
        assert (tracing.link(), tracing.traceparent()) == (None, None)


def test_a_span_s_traceparent_is_what_w3c_says(sent: Callable[[Sampler], list[str]]) -> None:
    sent(ParentBased(ALWAYS_ON))
    with tracing.span("x") as span:
        assert span is not None
        here = span.get_span_context()
        assert tracing.traceparent() == f"00-{here.trace_id:032x}-{here.span_id:016x}-{here.trace_flags:02x}"
