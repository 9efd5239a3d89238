"""Headers that tell browsers what not to do with an answer; on every one."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BrowserHeaders"]

# A page of this server runs its own scripts only: none that stands inside it, and none from elsewhere.
_OF_PAGES = (
    "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "media-src 'self' blob:; object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
# A picture or a clip is its own page when a browser opens it.
_OF_FILES = "default-src 'none'; img-src 'self'; media-src 'self'; frame-ancestors 'none'"

_ALWAYS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class BrowserHeaders:
    """Adds them to all that leaves the application."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass everything on, with the headers at the start of each answer."""

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                is_page = headers.get("content-type", "").startswith("text/html")
                headers.update(_ALWAYS)
                headers["Content-Security-Policy"] = _OF_PAGES if is_page else _OF_FILES
            await send(message)

        await self.app(scope, receive, guarded)
