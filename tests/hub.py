"""A small Hugging Face hub on this machine: the part of its HTTP API that fetching a model uses.

As on the real one, big files live elsewhere: the hub answers with their SHA-256 and a redirect to another
host, here the name `localhost` of the same server.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

__all__ = ["ADMITTED", "STRANGER", "Asked", "Hub", "Repository", "hub", "sha256"]

ADMITTED, STRANGER = "hf_admitted", "hf_stranger"

Access = Literal["open", "gated", "private"]


@dataclass(frozen=True)
class Asked:
    """One request that came in; the names of its headers in lower case."""

    method: str
    host: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Repository:
    """Files by name, at one commit. ``claimed`` overrides the sizes that the listing tells."""

    files: dict[str, bytes]
    access: Access = "open"
    claimed: dict[str, int] = field(default_factory=dict)

    @property
    def commit(self) -> str:
        """The commit of ``main``."""
        digest = hashlib.sha1(usedforsecurity=False)
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + hashlib.sha256(content).digest())
        return digest.hexdigest()

    def listing(self) -> list[dict[str, Any]]:
        """The files as the API tells them."""
        return [self._sibling(name, content) for name, content in self.files.items()]

    def _sibling(self, name: str, content: bytes) -> dict[str, Any]:
        size = self.claimed.get(name, len(content))
        lfs = {"sha256": sha256(content), "size": size, "pointerSize": 134} if is_big(name) else None
        return {"rfilename": name, "size": size, "blobId": git_id(content), **({"lfs": lfs} if lfs else {})}


class Hub(ThreadingHTTPServer):
    """The server: repositories by name, a log of what was asked, and what goes wrong with big files."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.asked: list[Asked] = []
        # Each entry spoils one answer with a big file.
        self.faults: list[Literal["break off", "stall", "damage"]] = []
        self.stalled = threading.Event()
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.server_port}"

    def fetched(self) -> list[str]:
        """The names of the files whose content was asked for, in order."""
        paths = [asked.path for asked in self.asked if asked.method == "GET" and "/resolve/" in asked.path]
        return [path.split("/resolve/")[1].split("/", 1)[1] for path in paths]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is part of the tests, not news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 # the base class names it
        """Say nothing; requests are noted in ``asked``."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path).lstrip("/")
        host = self.headers["Host"].split(":")[0]
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append(Asked(self.command, host, path, headers))
        if host == "localhost":
            self._send_big(path)
        elif path.startswith("api/models/"):
            name, _, revision = path.removeprefix("api/models/").partition("/revision/")
            self._with_repository(name, revision, None)
        else:
            name, _, rest = path.partition("/resolve/")
            revision, _, file = rest.partition("/")
            self._with_repository(name, revision, file)

    def _with_repository(self, name: str, revision: str, file: str | None) -> None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        repository = self.server.repositories.get(name)
        if token not in {"", ADMITTED, STRANGER}:
            self._refuse(401, {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repository is None or (repository.access == "private" and token != ADMITTED):
            self._refuse(404, {"X-Error-Code": "RepoNotFound"}) if token else self._refuse(401, {})
        elif revision not in {"main", repository.commit}:
            self._refuse(404, {"X-Error-Code": "RevisionNotFound"})
        elif file is None:
            info = {"id": name, "sha": repository.commit, "siblings": repository.listing()}
            self._send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
        elif repository.access == "gated" and token != ADMITTED:
            self._refuse(403 if token else 401, {"X-Error-Code": "GatedRepo"})
        elif file not in repository.files:
            self._refuse(404, {"X-Error-Code": "EntryNotFound"})
        else:
            self._send_file(repository, file)

    def _send_file(self, repository: Repository, file: str) -> None:
        content = repository.files[file]
        headers = {"X-Repo-Commit": repository.commit}
        if not is_big(file):
            self._send(200, {**headers, "ETag": f'"{git_id(content)}"'}, content)
            return
        digest = sha256(content)
        headers |= {
            "X-Linked-Etag": f'"{digest}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"http://localhost:{self.server.server_port}/{digest}",
        }
        self._send(302, headers, b"")

    def _send_big(self, digest: str) -> None:
        contents = [c for r in self.server.repositories.values() for c in r.files.values()]
        content = next(content for content in contents if sha256(content) == digest)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        fault = self.server.faults.pop(0) if self.server.faults and self.command == "GET" else None
        if fault == "damage":
            content = content[:-1] + bytes([content[-1] ^ 1])
        part = content[start:]
        ranged = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        if fault in {"break off", "stall"}:
            self._send(206 if start else 200, ranged, part[: len(part) // 2], length=len(part))
            if fault == "stall":
                self.server.stalled.set()
                self.server.closing.wait(60)
            self.close_connection = True
        else:
            self._send(206 if start else 200, ranged, part)

    def _refuse(self, status: int, headers: Mapping[str, str]) -> None:
        self._send(status, headers, b'{"error": "no"}')

    def _send(
        self, status: int, headers: Mapping[str, str], body: bytes, *, length: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def is_big(name: str) -> bool:
    """Whether the hub keeps the file outside of git."""
    return name.endswith((".safetensors", ".bin", ".ckpt", ".onnx"))


def sha256(content: bytes) -> str:
    """The name of a big file's content."""
    return hashlib.sha256(content).hexdigest()


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub that listens until the block ends."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            server.shutdown()
            thread.join()
