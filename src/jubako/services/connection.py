"""One error shape for every answer, and word of clients that leave."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jubako import metrics
from jubako.errors import InvalidRequest, JubakoError, NoKey, refusal
from jubako.services.urgency import urgency, urgency_of

__all__ = ["ErrorShape", "answer", "client_gone"]

logger = logging.getLogger(__name__)

_receive: ContextVar[Receive] = ContextVar("receive")


def answer(error: JubakoError) -> JSONResponse:
    """An error as a response, with ``Retry-After`` where trying again makes sense."""
    metrics.ERRORS.add(code=error.code)
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if isinstance(error, NoKey):
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(), error.status, headers)


async def client_gone() -> None:
    """Return when the client of this request has disconnected. Await it after the body was read."""
    receive = _receive.get()
    while (await receive())["type"] != "http.disconnect":
        pass


class ErrorShape:
    """Turns every error body that is not ours, BentoML's and Starlette's, into the one shape."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass successes through as they stream; hold an error's body back until it is whole."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        _receive.set(receive)
        try:
            urgency.set(urgency_of(scope))
        except InvalidRequest as error:
            await answer(error)(scope, receive, send)
            return
        held: list[Message] = []
        started = False

        async def shaped(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if message["status"] >= 400:
                    held.append(message)
                    return
            if not held:
                await send(message)
                return
            held.append(message)
            if not message.get("more_body", False):
                await _send_shaped(held, scope, receive, send)

        try:
            await self.app(scope, receive, shaped)
        except Exception:
            # If it left here before a response, the client would wait for BentoML's timeout.
            logger.exception("an error left the application")
            if started:
                raise
            await answer(JubakoError("an unexpected error; the server's log says why"))(scope, receive, send)


async def _send_shaped(held: list[Message], scope: Scope, receive: Receive, send: Send) -> None:
    start, *parts = held
    body = b"".join(part.get("body", b"") for part in parts)
    content = _parsed(body)
    if _is_ours(content):
        for message in held:
            await send(message)
        return
    shaped = _shape(start["status"], content, body)
    kept = [(name, value) for name, value in start["headers"] if name.lower() in {b"allow", b"retry-after"}]
    response = JSONResponse(shaped, start["status"])
    response.raw_headers.extend(kept)
    await response(scope, receive, send)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _is_ours(content: Any) -> bool:
    error = content.get("error") if isinstance(content, dict) else None
    return isinstance(error, dict) and set(error) == {"message", "type", "param", "code"}


def _shape(status: int, content: Any, body: bytes) -> dict[str, Any]:
    if isinstance(content, dict) and isinstance(content.get("detail"), list) and content["detail"]:
        return refusal(content["detail"]).body()
    if isinstance(content, list) and content:
        content = content[0]
    message = content.get("error", content.get("detail")) if isinstance(content, dict) else None
    text = str(message or body.decode("utf-8", "replace") or "the request failed").strip()
    error = InvalidRequest(text) if status < 500 else JubakoError(text)
    shaped = error.body()
    shaped["error"]["code"] = _CODES.get(status, error.code)
    return shaped


_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    413: "too_large",
    415: "unsupported_media_type",
    429: "rate_limit_exceeded",
    503: "unavailable",
    504: "timeout",
}
