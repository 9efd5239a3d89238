"""How urgent a request is and until when it is wanted: by its headers."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import cast, get_args

from starlette.datastructures import Headers
from starlette.types import Scope

from jubako.errors import InvalidRequest
from jubako.fair_queue import Priority

__all__ = ["Urgency", "urgency", "urgency_of"]

DEADLINE, PRIORITY = "X-Request-Deadline", "X-Priority"


@dataclass(frozen=True)
class Urgency:
    """What the client says of it; ``within`` are seconds."""

    priority: Priority = "interactive"
    within: float | None = None


urgency: ContextVar[Urgency] = ContextVar("urgency", default=Urgency("batch"))  # noqa: B039 # it is frozen
"""That of the request at work; what nobody waits for is batch."""


def urgency_of(scope: Scope) -> Urgency:
    """That of an HTTP request; InvalidRequest names the header that is wrong."""
    headers = Headers(scope=scope)
    priority = headers.get(PRIORITY, "interactive")
    if priority not in get_args(Priority):
        raise InvalidRequest(
            f"{PRIORITY}: {priority!r} is none of {', '.join(get_args(Priority))}", param=PRIORITY
        )
    return Urgency(cast("Priority", priority), _seconds(headers.get(DEADLINE)))


def _seconds(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise InvalidRequest(
            f"{DEADLINE}: {text!r} is no number of seconds from now, above 0", param=DEADLINE
        )
    return seconds
