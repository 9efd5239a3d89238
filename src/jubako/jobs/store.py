"""Files by their content: whatever has been written is there whole, under its SHA-256, or not at all.

What a disk has damaged since is not given out: each read compares.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from jubako.disk import room_in
from jubako.errors import ResultGone

__all__ = ["FileStore"]

# A file may be written just before the record that names it: what is younger than this is not swept away.
GRACE_SECONDS = 3600.0

_DIGEST = re.compile("[0-9a-f]{64}")


class FileStore:
    """A folder of files, shared by all gateways. Safe to use from several threads and processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, content: bytes) -> str:
        """Keep a file; its digest. Written under another name, synced, renamed: never half there.

        DiskFull when there is no room for it.
        """
        digest = hashlib.sha256(content).hexdigest()
        path = self.path(digest)
        try:
            os.utime(path)
            kept = _digest(path) == digest
        except FileNotFoundError:
            kept = False
        if not kept:
            with room_in("JUBAKO_HOME"):
                _write(path, content)
        return digest

    def get(self, digest: str) -> bytes:
        """The file's content; ResultGone as :meth:`find`."""
        return self.find(digest).read_bytes()

    def find(self, digest: str) -> Path:
        """Where the file is; ResultGone when it is not there (any more), or has another content."""
        path = self.path(digest)
        try:
            found = _digest(path)
        except FileNotFoundError as error:
            raise ResultGone("a file of this job is gone") from error
        if found != digest:
            raise ResultGone("a file of this job was damaged on the server's disk; submit the job again")
        return path

    def path(self, digest: str) -> Path:
        """Where a file is, or would be."""
        if not _DIGEST.fullmatch(digest):
            raise ValueError(f"{digest!r} is no digest")
        return self._folder / digest[:2] / digest

    def sweep(self, kept: Iterable[str], grace: float = GRACE_SECONDS) -> int:
        """Remove all files but these and what is young; how many went."""
        kept, oldest, gone = set(kept), time.time() - grace, 0
        for path in self._files():
            try:
                if path.name not in kept and path.stat().st_mtime < oldest:
                    path.unlink()
                    gone += 1
            except FileNotFoundError:  # another gateway sweeps as well
                continue
        return gone

    def _files(self) -> Iterator[Path]:
        return (path for path in self._folder.glob("??/*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
