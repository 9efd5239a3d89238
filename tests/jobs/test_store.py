"""Files by content: whole or not there, shared, swept when nobody has them."""

from __future__ import annotations

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jubako.errors import DiskFull, ResultGone
from jubako.jobs.store import FileStore


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "files")


def files(store: FileStore) -> list[Path]:
    return sorted(path for path in store._folder.rglob("*") if path.is_file())


def test_a_file_is_kept_under_its_digest(store: FileStore) -> None:
    digest = store.put(b"picture")
    assert digest == hashlib.sha256(b"picture").hexdigest()
    assert store.get(digest) == b"picture"
    assert files(store) == [store.path(digest)]


def test_the_same_content_is_kept_once_however_many_write_it_at_once(store: FileStore) -> None:
    with ThreadPoolExecutor(8) as threads:
        digests = set(threads.map(store.put, [b"x" * 100_000] * 40))
    assert len(digests) == 1
    assert len(files(store)) == 1


def test_what_was_not_written_whole_is_not_there(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskFull, match="JUBAKO_HOME"):
        store.put(b"picture")
    assert files(store) == []
    monkeypatch.undo()
    assert store.get(store.put(b"picture")) == b"picture"


@pytest.mark.parametrize("name", ["../../etc/passwd", "", "a" * 63, "A" * 64, f"{'a' * 64}/.."])
def test_only_digests_are_names(store: FileStore, name: str) -> None:
    with pytest.raises(ValueError, match="no digest"):
        store.path(name)


def test_sweeping_takes_what_nobody_has_and_is_not_young(store: FileStore) -> None:
    kept, old, young = (store.put(content) for content in (b"kept", b"old", b"young"))
    for digest in (kept, old):
        os.utime(store.path(digest), (0, time.time() - 7200))
    assert store.sweep([kept], grace=3600) == 1
    assert files(store) == sorted([store.path(kept), store.path(young)])


def test_writing_a_file_again_keeps_it_from_being_swept(store: FileStore) -> None:
    digest = store.put(b"picture")
    os.utime(store.path(digest), (0, time.time() - 7200))
    store.put(b"picture")
    assert store.sweep([], grace=3600) == 0


@pytest.mark.parametrize("left", [b"", b"pict", b"pictuse", b"picture and more"])
def test_a_file_that_a_crash_has_torn_is_not_given_out_and_mended_by_the_next(
    store: FileStore, left: bytes
) -> None:
    digest = store.put(b"picture")
    store.path(digest).write_bytes(left)
    with pytest.raises(ResultGone, match="damaged on the server's disk"):
        store.get(digest)
    assert store.put(b"picture") == digest
    assert store.get(digest) == b"picture"


def test_a_file_that_is_not_there_is_gone(store: FileStore) -> None:
    with pytest.raises(ResultGone, match="is gone"):
        store.find("a" * 64)
