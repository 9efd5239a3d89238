"""Writes down every outgoing connection of a server's processes, and every name that they look up.

A copy of this file stands as ``sitecustomize.py`` in front of their path. Python itself tells of the events,
whatever library makes them. Unix sockets, by which the services speak with each other, are left out.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

__all__ = ["recorded", "recording"]

VARIABLE = "RECORDED_CONNECTIONS"


def recording(folder: Path) -> dict[str, Any]:
    """What a process needs in its environment to have its connections written down in this folder."""
    path = folder / "path"
    path.mkdir(parents=True, exist_ok=True)
    shutil.copy(__file__, path / "sitecustomize.py")
    before = os.environ.get("PYTHONPATH")
    return {
        "PYTHONPATH": f"{path}{os.pathsep}{before}" if before else str(path),
        VARIABLE: str(folder / "connections"),
    }


def recorded(folder: Path) -> list[str]:
    """The lines so far: ``started`` for each process, else an event and where it went."""
    file = folder / "connections"
    return file.read_text(encoding="utf-8").splitlines() if file.exists() else []


def _write(line: str) -> None:
    with Path(os.environ[VARIABLE]).open("a", encoding="utf-8") as file:
        file.write(f"{line}\n")


def _hear(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        _write(f"connect {arguments[1][0]}:{arguments[1][1]}")
    elif event in {"socket.getaddrinfo", "socket.gethostbyname"}:
        _write(f"look up {arguments[0]}")


if __name__ == "sitecustomize" and VARIABLE in os.environ:
    _write("started")
    sys.addaudithook(_hear)
