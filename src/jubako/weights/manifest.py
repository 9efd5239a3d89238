"""What a model's files must contain: SHA-256 that a pull has recorded, or that a list beside them has.

A file is read once, and again only when its size or its time has changed; what was read is remembered under
``JUBAKO_HOME``, so that a restart does not read gigabytes again. Needs no torch.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jubako.errors import UnusableWeights
from jubako.weights.checkpoint import content_digest, state
from jubako.weights.layout import INDEX

__all__ = ["LIST", "Manifest", "check", "damaged", "discard", "listed", "write_list"]

logger = logging.getLogger(__name__)

LIST = "SHA256SUMS"
"""A digest and a name a line, as ``sha256sum`` writes and checks it."""

_LINE = re.compile(r"(?P<digest>[0-9a-f]{64})[ ][ *](?P<name>.+)")


@dataclass(frozen=True)
class Manifest:
    """Files of one folder, by their names in it, with their SHA-256."""

    folder: Path
    digests: Mapping[str, str]


def check(manifests: Iterable[Manifest], home: Path, remedy: str) -> None:
    """UnusableWeights names the first file that is missing or has another content than it must."""
    for path in damaged(manifests, home):
        what = "is damaged: its content is not what its SHA-256 says" if path.is_file() else "is missing"
        raise UnusableWeights(f"{path} {what}; {remedy}")


def discard(file: Path) -> None:
    """Remove a file that was pulled, and the blob of the cache that it links to."""
    blob = file.resolve() if file.is_symlink() else None
    file.unlink(missing_ok=True)
    if blob is not None and blob.parent.name == "blobs":
        blob.unlink(missing_ok=True)


def damaged(manifests: Iterable[Manifest], home: Path) -> list[Path]:
    """The files that are missing or have another content than they must."""
    remembered = _Remembered(home)
    wanted = {each.folder / name: digest for each in manifests for name, digest in each.digests.items()}
    found = [
        path for path, digest in wanted.items() if not path.is_file() or remembered.digest(path) != digest
    ]
    remembered.save()
    return found


def listed(folder: Path) -> Manifest | None:
    """What the list in a folder says; None without one. UnusableWeights when it is none."""
    file = folder / LIST
    if not file.is_file():
        return None
    digests = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _LINE.fullmatch(line)
        if match is None or {"..", "/"} & set(Path(match["name"]).parts):
            raise UnusableWeights(
                f"{file} is no list of SHA-256 and names of files in its folder: {line[:100]!r}"
            )
        digests[match["name"]] = match["digest"]
    return Manifest(folder, digests)


def write_list(folder: Path) -> None:
    """List what a model is made of: the index, and all that lies in the folder's subfolders."""
    files = sorted(path for path in (folder / INDEX, *folder.glob("*/**/*")) if path.is_file())
    lines = (f"{content_digest(path)}  {path.relative_to(folder).as_posix()}\n" for path in files)
    (folder / LIST).write_text("".join(lines), encoding="utf-8")


class _Remembered:
    """The digests of files, and the size and the time that each had when it was read."""

    def __init__(self, home: Path) -> None:
        self._file = home / "weights" / "digests.json"
        self._known: dict[str, list[object]] = dict(_entries(self._file))
        self._changed = False

    def digest(self, file: Path) -> str:
        path, size, mtime_ns = state(file)
        entry = self._known.get(str(path))
        if entry is None or entry[:2] != [size, mtime_ns]:
            entry = self._known[str(path)] = [size, mtime_ns, content_digest(path)]
            self._changed = True
        return str(entry[2])

    def save(self) -> None:
        """Write down what was read, of files that are still there; where that can't be, it is read again."""
        if not self._changed:
            return
        there = {path: entry for path, entry in self._known.items() if Path(path).exists()}
        temporary = self._file.with_suffix(f".{os.getpid()}.tmp")
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(there, indent=1), encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            logger.warning(
                "%s can't be written (%s): the next start reads all weights again", self._file, error
            )
            temporary.unlink(missing_ok=True)


def _entries(file: Path) -> Iterator[tuple[str, list[object]]]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(known, dict):
        yield from (
            (path, entry) for path, entry in known.items() if isinstance(entry, list) and len(entry) == 3
        )
