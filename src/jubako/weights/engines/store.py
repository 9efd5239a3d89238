"""The directory of engines: each is built once, by one process, and is there whole or not at all.

``<key>`` is an engine; ``.<key>.<any>`` is one in the making, or on its way out, and never read.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar
from uuid import uuid4

from jubako.disk import room_in
from jubako.errors import JubakoError
from jubako.weights.engines.key import EngineKey
from jubako.weights.engines.locks import EngineLocks, Mark
from jubako.weights.engines.record import (
    EngineRecord,
    damage,
    engine_files,
    read_record,
    record_path,
    remove_strays,
    sync,
    write_record,
)

__all__ = ["Cleared", "Engine", "EngineStore", "Entry", "UnknownEngine"]

logger = logging.getLogger(__name__)

Session = TypeVar("Session")

_DIGEST = re.compile("[0-9a-f]{64}")
_SHORT = 12


class UnknownEngine(JubakoError):
    """No engine has this key or is of this model, or several keys begin so."""

    status = 404
    type = "invalid_request_error"
    code = "engine_not_found"


@dataclass(frozen=True)
class Engine(Generic[Session]):
    """A session and the directory that it reads; ``built`` tells whether that took a build.

    Until it is closed, or its process has ended, nobody removes the directory.
    """

    session: Session
    directory: Path
    built: bool
    mark: Mark

    def close(self) -> None:
        """Close the session, if it can be closed, and let go of the directory."""
        try:
            _close(self.session)
        finally:
            with suppress(FileNotFoundError):
                os.utime(record_path(self.directory))
            self.mark.remove()


@dataclass(frozen=True)
class Entry:
    """An engine in the store; ``used`` is when it was last, in seconds since 1970."""

    digest: str
    record: EngineRecord
    used: float
    in_use: bool


class Cleared(NamedTuple):
    """What was removed, and what was not because a process uses it."""

    removed: tuple[Entry, ...]
    in_use: tuple[Entry, ...]


class EngineStore:
    """Engines below ``root``, ``quota`` bytes of them. Safe to use from several threads and processes."""

    def __init__(self, root: Path, quota: int) -> None:
        self._root = root
        self._quota = quota
        self._locks = EngineLocks(root)

    def session(
        self, key: EngineKey, make: Callable[[Path], Session], *, model: str, slot: str
    ) -> Engine[Session]:
        """The session that ``make`` creates from the key's directory, in which the engines are.

        Without an engine, ``make`` is called first with an empty directory: there it has its session write
        all engine files, which takes minutes; that session is closed, by its ``close`` if it has one. Any
        other process that wants the same key waits meanwhile. An engine that is damaged, or from which
        ``make`` fails, is built anew, once; what ``make`` raises then is the caller's. DiskFull when there is
        no room for the files in ``JUBAKO_HOME``.
        """
        with room_in("JUBAKO_HOME"), self._locks.turn(key.digest):
            self._sweep(key.digest)
            engine = self._open(key.digest, make) or self._build(key, make, model, slot)
        if engine.built:
            self._make_room()
        return engine

    def entries(self) -> tuple[Entry, ...]:
        """All engines, the last used first."""
        found = []
        for folder in self._folders():
            if record := read_record(folder):
                with self._locks.free(folder.name) as is_free, suppress(FileNotFoundError):
                    used = record_path(folder).stat().st_mtime
                    found.append(Entry(folder.name, record, used, in_use=not is_free))
        return tuple(sorted(found, key=lambda entry: entry.used, reverse=True))

    def clear(self, names: Iterable[str] | None = None) -> Cleared:
        """Remove engines that nobody uses: by the beginnings of keys and by models' names, or all.

        UnknownEngine when a name fits none, before anything is removed.
        """
        entries = self.entries()
        if names is None:
            chosen = {entry.digest: entry for entry in entries}
        else:
            chosen = {entry.digest: entry for name in names for entry in _named(name, entries)}
        gone = {digest for digest in chosen if self._remove(digest)}
        if names is None:
            self._sweep_all()
        return Cleared(
            tuple(entry for digest, entry in chosen.items() if digest in gone),
            tuple(entry for digest, entry in chosen.items() if digest not in gone),
        )

    def _open(self, digest: str, make: Callable[[Path], Session]) -> Engine[Session] | None:
        """The engine that is there, None when it must be built."""
        folder = self._root / digest
        if not folder.exists():
            return None
        record = read_record(folder)
        reason = damage(folder, record) if record else "its record is missing or torn"
        if record is None or reason:
            logger.warning("engine %s is damaged and will be built anew: %s", digest[:_SHORT], reason)
            self._discard(folder)
            return None
        remove_strays(folder, record)
        try:
            session = make(folder)
        except Exception:
            # Its files are as they were built: if building fails as well, it is not they that are at fault.
            logger.warning("engine %s does not load and will be built anew", digest[:_SHORT], exc_info=True)
            return None
        os.utime(record_path(folder))
        return Engine(session, folder, built=False, mark=self._locks.mark(digest))

    def _build(
        self, key: EngineKey, make: Callable[[Path], Session], model: str, slot: str
    ) -> Engine[Session]:
        digest, created, began = key.digest, time.time(), time.perf_counter()
        folder, partial = self._root / digest, self._partial(digest)
        logger.info("engine %s for %s of %s is being built", digest[:_SHORT], slot, model)
        partial.mkdir()
        try:
            session = make(partial)
            if not any(engine_files(partial)):
                logger.warning("no engine file was written for %s of %s: nothing to keep", slot, model)
                return Engine(session, partial, built=True, mark=self._locks.mark(digest))
            _close(session)
            del session  # a GPU may have no room for it and the next one
            seconds = time.perf_counter() - began
            write_record(partial, key, model=model, slot=slot, created=created, seconds=seconds)
            if folder.exists():
                self._discard(folder)
            partial.replace(folder)
            sync(self._root)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        try:
            return Engine(make(folder), folder, built=True, mark=self._locks.mark(digest))
        except Exception:
            self._discard(folder)
            raise

    def _make_room(self) -> None:
        """Remove what killed builders left, and the least recently used engines until the rest fits.

        The one just built is in use by now, and so stays.
        """
        self._sweep_all()
        with self._locks.room():
            entries = self.entries()
            total = sum(entry.record.bytes for entry in entries)
            for entry in reversed(entries):
                if total <= self._quota:
                    return
                if self._remove(entry.digest):
                    logger.info("engine %s made room for others", entry.digest[:_SHORT])
                    total -= entry.record.bytes

    def _remove(self, digest: str) -> bool:
        """Whether the engine is gone: not while a process uses it."""
        with self._locks.free(digest) as is_free:
            if is_free and (self._root / digest).exists():
                self._discard(self._root / digest)
            return is_free

    def _discard(self, folder: Path) -> None:
        """Remove a directory in such a way that it is never there in part under its name."""
        partial = self._partial(folder.name)
        folder.replace(partial)
        shutil.rmtree(partial, ignore_errors=True)

    def _sweep(self, digest: str) -> None:
        """With the key's lock held: remove what builders left that were killed, and marks of the dead."""
        if not self._locks.is_used(digest):
            for partial in self._root.glob(f".{digest}.*"):
                shutil.rmtree(partial, ignore_errors=True)

    def _sweep_all(self) -> None:
        partials = (path.name.split(".")[1] for path in self._root.glob(".*.*"))
        for digest in set(filter(_DIGEST.fullmatch, partials)):
            with self._locks.free(digest) as is_free:
                if is_free:
                    self._sweep(digest)
        for folder in self._folders():
            if read_record(folder) is None:
                self._remove(folder.name)

    def _folders(self) -> tuple[Path, ...]:
        return tuple(path for path in self._root.glob("*") if _DIGEST.fullmatch(path.name))

    def _partial(self, digest: str) -> Path:
        return self._root / f".{digest}.{uuid4().hex}"


def _named(name: str, entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """The engines of a model, or the one whose key begins so."""
    if own := tuple(entry for entry in entries if entry.record.model == name):
        return own
    found = tuple(entry for entry in entries if entry.digest.startswith(name))
    if len(found) != 1:
        there = "several engines have" if found else "no engine has"
        raise UnknownEngine(
            f"{there} a key that begins with {name!r}, and none is of a model with this name; see "
            "`jubako engines list`"
        )
    return found


def _close(session: object) -> None:
    if callable(close := getattr(session, "close", None)):
        close()
