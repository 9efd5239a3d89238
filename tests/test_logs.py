"""The shape of log lines."""

from __future__ import annotations

import contextvars
import json
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import ValidationError

from jubako.job import Job
from jubako.logs import Annotation, JsonLines, about, facts, forget


def line(message: str, *arguments: Any, exc_info: Any = None) -> dict[str, Any]:
    """A record as it is written, and read again."""
    record = logging.LogRecord("jubako.x", logging.WARNING, __file__, 1, message, arguments, exc_info)
    assert Annotation().filter(record)
    text = JsonLines(lambda: "SD").format(record)
    assert "\n" not in text
    assert text.isascii()
    read: dict[str, Any] = json.loads(text)
    return read


@pytest.fixture
def apart() -> Callable[[Callable[[], None]], None]:
    """Runs something that knows nothing of other tests, and whose facts go no further."""
    return lambda work: contextvars.Context().run(work)


def test_a_line_is_one_object_whatever_its_message_is() -> None:
    told = line("two\nlines, %s and \ud800", "ünïcode")
    assert told["message"] == "two\nlines, ünïcode and \ud800"
    assert (told["level"], told["logger"], told["service"]) == ("WARNING", "jubako.x", "SD")
    assert told["time"][10] + told["time"][-1] == "TZ"
    assert not told.keys() & {"request_id", "trace_id", "exception"}


def test_facts_go_where_the_task_goes_and_no_further(apart: Callable[[Callable[[], None]], None]) -> None:
    def work() -> None:
        about(request_id="r", job_id="j", owner="alice", model="tiny-sd")
        assert (
            line("x").items()
            >= facts().items()
            == {
                "request_id": "r",
                "job_id": "j",
                "owner": "alice",
                "model": "tiny-sd",
            }.items()
        )
        about(owner=None)
        assert "owner" not in line("x")
        contextvars.copy_context().run(lambda: about(job_id="other"))
        assert facts()["job_id"] == "j"
        forget()
        assert not facts()

    before = facts()
    apart(work)
    assert facts() == before


def test_bentoml_s_text_ends_with_the_facts(apart: Callable[[Callable[[], None]], None]) -> None:
    def work() -> None:
        record = logging.makeLogRecord({"msg": "x", "trace_msg": " (trace=1)"})
        about(request_id="r", owner="alice")
        Annotation().filter(record)
        text = logging.Formatter("%(message)s%(trace_msg)s").format(record)
        assert text == "x (request_id=r,owner=alice) (trace=1)"

    apart(work)


def test_a_traceback_does_not_have_what_a_client_sent() -> None:
    sent = {"prompt": ["my secret, input_type=\nwish"], "nothing": "my secret wish"}
    try:
        Job.model_validate(sent)
    except ValidationError:
        told = line("refused", exc_info=sys.exc_info())
    assert "ValidationError" in told["exception"]
    assert "Extra inputs are not permitted" in told["exception"]
    assert "wish" not in told["exception"]
