"""Files by their content: whatever has been written is there whole, under its SHA-256, or not at all."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["FileStore"]

# A file may be written just before the record that names it: what is younger than this is not swept away.
GRACE_SECONDS = 3600.0

_DIGEST = re.compile("[0-9a-f]{64}")


class FileStore:
    """A folder of files, shared by all gateways. Safe to use from several threads and processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, content: bytes) -> str:
        """Keep a file; its digest. Written under another name, synced, renamed: never half there."""
        digest = hashlib.sha256(content).hexdigest()
        path = self.path(digest)
        try:
            os.utime(path)
        except FileNotFoundError:
            _write(path, content)
        return digest

    def get(self, digest: str) -> bytes:
        """The file's content; FileNotFoundError when it is not here (any more)."""
        return self.path(digest).read_bytes()

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
