"""How the command line speaks with a running server. Every failure is one sentence."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jubako.errors import JubakoError

if TYPE_CHECKING:
    import httpx

__all__ = [
    "LostConnection",
    "ServerFailed",
    "answer",
    "asked",
    "events",
    "fetched",
    "followed",
    "listed",
    "write",
]

CONNECT_SECONDS = 5
KEY = "JUBAKO_API_KEY"


class ServerFailed(JubakoError):
    """The server can't be reached, or what it answered is not what was asked for."""


class LostConnection(ServerFailed):
    """The server can't be reached, or went away before its answer was whole."""


def answer(
    url: str, route: str, fields: Mapping[str, Any], files: Mapping[str, Path | Sequence[Path]]
) -> dict[str, Any]:
    """The reply to one request."""
    with _asked(url, route, **_body(fields, files)) as response:
        return _read(url, response)


def asked(url: str, route: str, method: str = "GET") -> dict[str, Any]:
    """The reply to a request without a body."""
    with _asked(url, route, method=method) as response:
        return _read(url, response)


def fetched(url: str, route: str) -> bytes:
    """A file."""
    with _asked(url, route, method="GET") as response:
        return response.read()


def followed(url: str, route: str, seen: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Numbers and data of the server-sent events behind the one that was seen last."""
    number = seen
    with _asked(url, route, method="GET", headers={"Last-Event-ID": str(seen)}) as response:
        for line in response.iter_lines():
            if line.startswith("id: "):
                number = int(line.removeprefix("id: "))
            elif line.startswith("data: "):
                yield number, json.loads(line.removeprefix("data: "))


def listed(url: str) -> dict[str, Any]:
    """The server's entry of each model, by name."""
    with _asked(url, "/v1/models", method="GET") as response:
        return {entry["id"]: entry for entry in _read(url, response)["data"]}


def events(
    url: str, route: str, fields: Mapping[str, Any], files: Mapping[str, Path]
) -> Iterator[dict[str, Any]]:
    """The data of each server-sent event. Leaving the loop closes the connection, which cancels the job."""
    with _asked(url, route, **_body({**fields, "stream": True}, files)) as response:
        for event in _parsed(response.iter_lines()):
            if "error" in event:
                raise ServerFailed(_sentence(event))
            yield event


def write(path: Path, content: bytes) -> None:
    """Write the file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ServerFailed(f"{path} can't be written: {error.strerror}") from error


def _body(fields: Mapping[str, Any], files: Mapping[str, Path | Sequence[Path]]) -> dict[str, Any]:
    if not files:
        return {"json": fields}
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
    uploads = [
        (name, (path.name, _content(path)))
        for name, paths in files.items()
        for path in ([paths] if isinstance(paths, Path) else paths)
    ]
    return {"data": texts, "files": uploads}


def _read(url: str, response: httpx.Response) -> dict[str, Any]:
    try:
        reply: dict[str, Any] = json.loads(response.read())
    except ValueError as error:
        raise ServerFailed(f"{url} answered, but not as a Jubako server does") from error
    return reply


@contextmanager
def _asked(
    url: str, route: str, method: str = "POST", headers: Mapping[str, str] | None = None, **body: Any
) -> Iterator[httpx.Response]:
    import httpx

    key = os.environ.get(KEY, "").strip()
    headers = {**(headers or {}), **({"Authorization": f"Bearer {key}"} if key else {})}

    # No limit on waiting: the picture may stand in a queue, and the server has its own deadline.
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    try:
        with httpx.stream(method, f"{url}{route}", timeout=timeout, headers=headers, **body) as response:
            if response.is_error:
                raise ServerFailed(_refusal(url, response.status_code, response.read()))
            yield response
    except httpx.ConnectError as error:
        raise LostConnection(
            f"no server answers at {url}; start one with scripts/serve, or give --url"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise LostConnection(f"the connection to {url} failed: {error or type(error).__name__}") from error


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ServerFailed(f"{path} can't be read: {error.strerror}") from error


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _refusal(url: str, status: int, body: bytes) -> str:
    try:
        hint = f"; set {KEY}" if status == 401 else ""
        return _sentence(json.loads(body)) + hint
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {status}, and not as a Jubako server does"


def _sentence(body: Mapping[str, Any]) -> str:
    return str(body["error"]["message"])
