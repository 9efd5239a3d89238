"""Who may touch an engine: locks of files, which the kernel takes back when a process dies, however it does.

A key's lock is held while its engine is built, checked, opened or removed; by at most one process. A mark is
held by each process for as long as it has the engine open.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from filelock import BaseFileLock, FileLock, Timeout

__all__ = ["EngineLocks", "Mark"]

logger = logging.getLogger(__name__)


class Mark:
    """That this process has an engine open."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = FileLock(path, thread_local=False)
        self._lock.acquire()

    def remove(self) -> None:
        """The engine may go now; a second time this does nothing."""
        self._path.unlink(missing_ok=True)
        self._lock.release()


class EngineLocks:
    """The locks and marks of all engines below a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @contextmanager
    def turn(self, digest: str) -> Iterator[None]:
        """The key's lock, for which another process's whole build may have to be waited."""
        lock = self._lock(digest)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            logger.info("engine %s: waiting for the process that builds or opens it", digest[:12])
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def free(self, digest: str) -> Iterator[bool]:
        """Whether no process builds, opens or uses the engine; if so, none does before this ends."""
        lock = self._lock(digest)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield False
            return
        try:
            yield not self.is_used(digest)
        finally:
            lock.release()

    @contextmanager
    def room(self) -> Iterator[None]:
        """One process at a time makes room, or two would remove twice as much as they have to."""
        with self._lock("room"):
            yield

    def mark(self, digest: str) -> Mark:
        """Say that this process has the engine open; with the key's lock held, while nobody looks."""
        return Mark(self._folder("users") / f"{digest}.{uuid4().hex}")

    def is_used(self, digest: str) -> bool:
        """With the key's lock held: whether a live process has the engine open."""
        used = False
        for path in self._folder("users").glob(f"{digest}.*"):
            try:
                with FileLock(path, timeout=0):
                    path.unlink(missing_ok=True)
            except Timeout:
                used = True
        return used

    def _lock(self, name: str) -> BaseFileLock:
        # Its file stays: who waits for it would be left with the lock of a file that has no name any more.
        return FileLock(self._folder("locks") / name)

    def _folder(self, name: str) -> Path:
        folder = self._root / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder
