"""A disk of a few megabytes for programs that tests start, to be filled up and emptied again.

It is a tmpfs in a mount namespace of its own, so it needs no root where Linux lets anybody have such.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

__all__ = ["SmallDisk", "small_disk"]

_PAGE = 4096


@dataclass(frozen=True)
class SmallDisk:
    """A disk that only what is started with ``python`` has at ``place``; tests reach it at ``here``."""

    place: Path
    here: Path
    python: Path

    def fill(self, spare: int = 0) -> None:
        """Leave no more than so many bytes free."""
        with (self.here / "filling").open("ab", buffering=0) as filling:
            for size in (64 * _PAGE, _PAGE):
                with contextlib.suppress(OSError):
                    while True:
                        filling.write(bytes(size))
            if spare:
                filling.truncate(max(0, filling.tell() - spare))

    def empty(self) -> None:
        """Take away what it was filled with."""
        (self.here / "filling").unlink()

    @contextmanager
    def filled(self, spare: int = 0) -> Iterator[None]:
        """Full until the block ends, but for so many bytes."""
        self.fill(spare)
        try:
            yield
        finally:
            self.empty()


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[SmallDisk]:
    """A disk until the block ends; where Linux gives none, the test is skipped."""
    if shutil.which("unshare") is None or shutil.which("nsenter") is None:
        pytest.skip("no small disk without unshare and nsenter")
    place = folder / "disk"
    place.mkdir()
    script = f"mount -t tmpfs -o size={megabytes}m tmpfs {shlex.quote(str(place))} && echo ready && exec cat"
    holder = subprocess.Popen(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert holder.stdout
    assert holder.stderr
    try:
        if holder.stdout.readline() != b"ready\n":
            pytest.skip(f"no small disk can be mounted here: {holder.stderr.read().decode().strip()}")
        python = folder / "python"
        enter = f"nsenter --preserve-credentials --user --mount --target {holder.pid} --"
        there = """sh -c 'cd "$0" && exec "$@"' "$PWD" """
        python.write_text(f'#!/bin/sh\nexec {enter} {there} {shlex.quote(sys.executable)} "$@"\n')
        python.chmod(0o755)
        yield SmallDisk(place, Path(f"/proc/{holder.pid}/root{place}"), python)
    finally:
        holder.communicate()
