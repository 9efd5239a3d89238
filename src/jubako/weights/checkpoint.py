"""One safetensors file from outside: what its header tells, and the digest that its content is known by.

No tensor is read here, so that this needs no torch. A safetensors file begins with the length of its header
(eight bytes, little-endian) and the header itself: JSON that gives each tensor's type, shape and place.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from jubako.errors import UnusableWeights

__all__ = ["TensorHeader", "content_digest", "digest", "state", "tensors", "tensors_in"]

_LENGTH_BYTES = 8
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class TensorHeader:
    """What a header tells of one tensor; ``dtype`` in the words of the format: F32, F16, BF16, I64, …"""

    dtype: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        """How many numbers it has."""
        return math.prod(self.shape)

    @property
    def is_floating(self) -> bool:
        """Whether it takes the precision that is served; whole numbers keep theirs."""
        return self.dtype.startswith(("F", "BF"))


def tensors(file: Path) -> Mapping[str, TensorHeader]:
    """The tensors of a safetensors file by name; UnusableWeights when it is none."""
    return _tensors(*state(file))


def tensors_in(content: IO[bytes], longest: int) -> Mapping[str, TensorHeader]:
    """The tensors of an open safetensors file by name; UnusableWeights when it is none, or a torn one.

    ``longest`` are bytes of its header.
    """
    size = content.seek(0, os.SEEK_END)
    content.seek(0)
    found, end = _header(content, min(size, longest))
    if end != size:
        raise UnusableWeights("no safetensors file, or a torn one")
    return found


def digest(file: Path) -> str:
    """The SHA-256 that a file's content is known by.

    In the Hugging Face cache a file is a link to a blob that is named by it; any other file is read.
    """
    path = state(file)[0]
    if path.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", path.name):
        return path.name
    return content_digest(file)


def content_digest(file: Path) -> str:
    """The SHA-256 of what a file contains; it is read again only when its size or its time has changed."""
    now = state(file)
    with _turn(*now):  # many may ask for a file that was never read: the first one reads
        return _digest(*now)


def state(file: Path) -> tuple[Path, int, int]:
    """The file that it is or links to, its size and its time; UnusableWeights when there is none."""
    try:
        path = file.resolve()
        status = path.stat()
    except OSError as error:
        raise UnusableWeights(f"{file} can't be read: {error.strerror}") from error
    return path, status.st_size, status.st_mtime_ns


@lru_cache(4096)
def _turn(path: Path, size: int, mtime_ns: int) -> threading.Lock:  # noqa: ARG001 # one for each state of a file
    return threading.Lock()


@lru_cache(4096)
def _digest(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001 # they tell one state from the next
    try:
        with path.open("rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()
    except OSError as error:
        raise UnusableWeights(f"{path} can't be read: {error.strerror}") from error


@lru_cache(256)
def _tensors(path: Path, size: int, mtime_ns: int) -> Mapping[str, TensorHeader]:  # noqa: ARG001 # as above
    try:
        with path.open("rb") as content:
            return _header(content, min(size, _LONGEST_HEADER))[0]
    except UnusableWeights as error:
        raise UnusableWeights(f"{path} is {error.message}") from error
    except OSError as error:
        raise UnusableWeights(f"{path} can't be read: {error.strerror}") from error


def _header(content: IO[bytes], longest: int) -> tuple[Mapping[str, TensorHeader], int]:
    """The tensors of a file that is read from its beginning, and the place where the last one ends."""
    try:
        length = int.from_bytes(content.read(_LENGTH_BYTES), "little")
        # Any other file begins with a number that no header has: reading nothing makes it no JSON below.
        header = json.loads(content.read(length if length <= longest else 0))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        found = {
            name: TensorHeader(str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in entries.items()
        }
        return found, _LENGTH_BYTES + length + end
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
        raise UnusableWeights("no safetensors file, or a torn one") from error
