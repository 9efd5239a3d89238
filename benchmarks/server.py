"""A server of a benchmark's own."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

__all__ = ["served"]

ROOT = Path(__file__).resolve().parent.parent
READY_SECONDS = 180


@contextmanager
def served(**settings: str) -> Iterator[str]:
    """The gateway and the family of the embedded model, on a free port with a home of their own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [sys.executable, "-m", "bentoml", "serve", "service:Gateway", *address]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as home, (Path(home) / "log").open("wb") as log:
        own = {"BENTOML_HOME": f"{home}/bentoml", "JUBAKO_HOME": f"{home}/jubako", "JUBAKO_FAMILIES": "sd"}
        environment = {**os.environ, **own, "BENTOML_DO_NOT_TRACK": "1", **settings}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait_until_ready(url)
            yield url
        finally:
            process.terminate()
            process.wait(60)


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
