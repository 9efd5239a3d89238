"""A client for requests that no library would send as they are."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Sequence
from urllib.parse import urlsplit

from api_keys import KEYS
from server import Server

__all__ = ["Headers", "RawClient"]

Headers = Sequence[tuple[str, str]]
Answer = tuple[int, http.client.HTTPMessage, bytes]


class RawClient:
    """Sends requests as they are written: nothing is made straight or refused on the way."""

    def __init__(self, server: Server) -> None:
        address = urlsplit(server.url)
        self.host = address.netloc
        self._address = address.hostname or "", address.port or 0
        self._socket: socket.socket | None = None

    def ask(self, method: str, path: str, headers: Headers = ()) -> Answer:
        """The answer to a request without a body."""
        lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        for _ in range(2):
            try:
                return self._answer("\r\n".join(lines).encode("latin-1"), method)
            except (ConnectionError, http.client.HTTPException):
                # It had hung up after the last one.
                self.close()
        raise AssertionError(f"{method} {path} was not answered")

    def _answer(self, request: bytes, method: str) -> Answer:
        if self._socket is None:
            self._socket = socket.create_connection(self._address, timeout=30)
        self._socket.sendall(request)
        response = http.client.HTTPResponse(self._socket, method=method)
        response.begin()
        body = response.read()
        if response.will_close:
            self.close()
        return response.status, response.headers, body

    def close(self) -> None:
        """Hang up."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def key(self, name: str | None, *more: tuple[str, str]) -> Headers:
        """The headers of a request with this key."""
        own = KEYS[name].headers.items() if name else ()
        return (("Host", self.host), *own, *more)
