"""Log lines: what each says of the request and the job, and their shape where it is JSON.

What a line says of its request is W3C baggage: it goes with a task to what the task starts, and in a header
to the families. Nothing here logs by itself.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Literal

from opentelemetry import baggage, context, trace

__all__ = ["PREFIX", "Annotation", "JsonLines", "about", "configure", "facts", "forget"]

FACTS = ("request_id", "job_id", "owner", "model")
PREFIX = "jubako."
"""What their names begin with where others give names, too: in baggage, and in spans."""

# How pydantic shows what a client sent, which may be a prompt or a key.
_INPUT = re.compile(r"(?<=input_value=).*(?=, input_type=)")


def about(**known: str | None) -> None:
    """Have all that this task and what it starts log from here on say so; None takes a fact away.

    The facts are ``request_id``, ``job_id``, ``owner`` (the name of a key) and ``model``.
    """
    here = context.get_current()
    for name, value in known.items():
        key = PREFIX + name
        here = baggage.set_baggage(key, value, here) if value else baggage.remove_baggage(key, here)
    context.attach(here)


def facts() -> dict[str, str]:
    """What is known of the request and the job at work."""
    here = {name: baggage.get_baggage(PREFIX + name) for name in FACTS}
    return {name: str(value) for name, value in here.items() if value is not None}


def forget() -> None:
    """Know nothing: what came with a request from outside is the client's word, and not passed on."""
    context.attach(baggage.clear())


class Annotation(logging.Filter):
    """Adds the facts to BentoML's lines, and takes what a client sent out of its validation's tracebacks."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record through."""
        # BentoML's own filter has just made it of the span, and its format ends with it.
        if hasattr(record, "trace_msg") and (known := facts()):
            told = ",".join(f"{name}={value}" for name, value in known.items())
            record.trace_msg = f" ({told}){record.trace_msg}"
        if record.exc_info:
            text = record.exc_text or logging.Formatter().formatException(record.exc_info)
            record.exc_text = _INPUT.sub("…", text)
        return True


class JsonLines(logging.Formatter):
    """One JSON object a record, in ASCII; ``service`` names the process."""

    def __init__(self, service: Callable[[], str]) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """The record with what is known of its request and the span that it fell into."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            "service": self._service(),
        }
        line |= facts()
        if (span := trace.get_current_span().get_span_context()).is_valid:
            line |= {"trace_id": f"{span.trace_id:032x}", "span_id": f"{span.span_id:016x}"}
        if record.exc_info:
            line["exception"] = record.exc_text or self.formatException(record.exc_info)
        return json.dumps(line)


def configure(style: Literal["text", "json"], service: Callable[[], str]) -> None:
    """Set up this process's handlers, after BentoML did; twice is as good as once.

    In text BentoML's format stays, with the facts at the end.
    """
    # By itself it writes lines of its own shape to a handler of its own.
    if not (dbos := logging.getLogger("dbos")).handlers:
        dbos.addHandler(logging.NullHandler())
    # These quote clients: addresses with queries, where BentoML's lines have paths, and baggage that is none.
    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    logging.getLogger("opentelemetry.baggage").setLevel(logging.ERROR)
    if style == "json":
        logging.captureWarnings(True)
        for logger in _loggers():
            # Those that pass records on would have them written twice.
            if logger.propagate and logger is not logging.root:
                logger.handlers = [each for each in logger.handlers if isinstance(each, logging.NullHandler)]
        if not logging.root.handlers:
            logging.root.addHandler(logging.StreamHandler())
    for handler in {handler for logger in _loggers() for handler in logger.handlers}:
        if not any(isinstance(each, Annotation) for each in handler.filters):
            handler.addFilter(Annotation())
        if style == "json":
            handler.setFormatter(JsonLines(service))


def _loggers() -> Iterator[logging.Logger]:
    yield logging.root
    known = list(logging.root.manager.loggerDict.values())
    yield from (logger for logger in known if isinstance(logger, logging.Logger))
