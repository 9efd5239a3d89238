"""A server of a benchmark's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil

__all__ = ["Served", "served"]

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 180
STOP_SECONDS = 60


@dataclass(frozen=True)
class Served:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[bytes]

    def workers(self, service: str) -> list[psutil.Process]:
        """The processes of one of its services."""
        return [each for each in psutil.Process(self.process.pid).children() if service in _words(each)]


@contextmanager
def served(target: str = "service:Gateway", port: int | None = None, **settings: str) -> Iterator[Served]:
    """The gateway and its families, that of SD unless set, on a port with a home of their own."""
    port = port or _free_port()
    command = [sys.executable, "-m", "bentoml", "serve", target, "--host", "127.0.0.1", "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as home, (Path(home) / "log").open("wb") as log:
        own = {"BENTOML_HOME": f"{home}/bentoml", "JUBAKO_HOME": f"{home}/jubako", "JUBAKO_FAMILIES": "sd"}
        environment = {**os.environ, "BENTOML_DO_NOT_TRACK": "1", **own, **settings}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(url)
            yield Served(url, process)
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Its workers are in sessions of their own: none may outlive it."""
    if process.poll() is not None:
        return
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    finally:
        for each in workers:
            with suppress(psutil.NoSuchProcess):
                each.kill()
        process.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _words(process: psutil.Process) -> list[str]:
    try:
        words: list[str] = process.cmdline()
    except psutil.Error:  # it is just ending
        return []
    return words


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/readyz", timeout=2).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.25)
    raise TimeoutError(f"the server at {url} is not ready")
