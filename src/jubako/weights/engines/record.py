"""What is in an engine's directory: ``engine.json`` names each file with its size and its SHA-256.

Providers write engines in place, so that after a crash a file may be there in part; one that the record does
not vouch for is never read.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from jubako.weights.engines.key import EngineKey

__all__ = [
    "EngineRecord",
    "RecordedFile",
    "damage",
    "engine_files",
    "read_record",
    "record_path",
    "remove_strays",
    "sync",
    "write_record",
]


class RecordedFile(BaseModel):
    """One file of an engine as it was when the build had ended."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    sha256: str


class EngineRecord(BaseModel):
    """An engine that is whole: what it was built from and for, when, in how many seconds, and its files.

    ``slot`` is the part of the pipeline that the graph stands for, ``created`` is in seconds since 1970.
    """

    model_config = ConfigDict(frozen=True)

    key: EngineKey
    model: str
    slot: str
    created: float
    seconds: float
    bytes: int
    files: Mapping[str, RecordedFile]


def record_path(folder: Path) -> Path:
    """Where an engine's record lies; the time of this file is that of the engine's last use."""
    return folder / "engine.json"


def read_record(folder: Path) -> EngineRecord | None:
    """The record of an engine; None when there is none, or another engine's."""
    try:
        record = EngineRecord.model_validate_json(record_path(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, ValidationError):
        return None
    return record if record.key.digest == folder.name else None


def write_record(
    folder: Path, key: EngineKey, *, model: str, slot: str, created: float, seconds: float
) -> None:
    """Record what a build has left, and see to it that all of it outlasts a loss of power."""
    files = {}
    for path in engine_files(folder):
        name = path.relative_to(folder).as_posix()
        files[name] = RecordedFile(bytes=path.stat().st_size, sha256=_sha256(path))
    record = EngineRecord(
        key=key,
        model=model,
        slot=slot,
        created=created,
        seconds=round(seconds, 3),
        bytes=sum(file.bytes for file in files.values()),
        files=files,
    )
    record_path(folder).write_text(record.model_dump_json(indent=1), encoding="utf-8")
    for path in (*folder.rglob("*"), folder):
        sync(path)


def damage(folder: Path, record: EngineRecord) -> str | None:
    """What is wrong with an engine's files; None when each is as it was recorded. Reads all of them."""
    for name, file in record.files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if (size := path.stat().st_size) != file.bytes:
            return f"{name} has {size} bytes instead of {file.bytes}"
        if _sha256(path) != file.sha256:
            return f"{name} has another content than was built"
    return None


def remove_strays(folder: Path, record: EngineRecord) -> None:
    """Remove what was added after the build, in place: nothing tells whether such a file is whole."""
    for path in list(engine_files(folder)):
        if path.relative_to(folder).as_posix() not in record.files:
            path.unlink(missing_ok=True)


def engine_files(folder: Path) -> Iterator[Path]:
    """The files that a provider wrote."""
    record = record_path(folder)
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and path != record)


def _sha256(path: Path) -> str:
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
