"""Real servers in subprocesses, each with a port, a BentoML home and a log of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

__all__ = ["ROOT", "Server", "free_port", "serving"]

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass(frozen=True)
class Server:
    """A running ``bentoml serve``."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def ready(self, timeout: float = 2.0) -> bool:
        """Whether the readiness probe says so within the timeout."""
        try:
            return httpx.get(f"{self.url}/readyz", timeout=timeout).status_code == 200
        except httpx.TransportError:
            return False

    def wait_until_ready(self, seconds: float = 120) -> None:
        """Return when the server is ready; fail with the end of its log when it never is."""
        deadline = time.monotonic() + seconds
        while not self.ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"not ready:\n{self.tail()}")
            time.sleep(0.2)

    def tail(self) -> str:
        """The end of the log."""
        return self.log.read_text(encoding="utf-8", errors="replace")[-4000:]

    def post(self, path: str, fields: Mapping[str, Any], timeout: float = 60) -> httpx.Response:
        """POST JSON."""
        return httpx.post(f"{self.url}{path}", json=fields, timeout=timeout)

    def generate(self, prompt: str, **fields: Any) -> httpx.Response:
        """POST to OpenAI's route."""
        return self.post("/v1/images/generations", {"prompt": prompt, **fields})


@contextmanager
def serving(
    folder: Path,
    *,
    target: str = "service:Gateway",
    cwd: Path = ROOT,
    python: Path = Path(sys.executable),
    wait: bool = True,
    options: Sequence[str] = (),
    port: int | None = None,
    **environ: str,
) -> Iterator[Server]:
    """Serve a target until the block ends; ``folder`` takes the server's home and log."""
    port = port or free_port()
    folder.mkdir(parents=True, exist_ok=True)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("JUBAKO_")},
        "BENTOML_HOME": str(folder / "bentoml"),
        "JUBAKO_HOME": str(folder / "jubako"),
        "BENTOML_DO_NOT_TRACK": "1",
        # The families' small models gain nothing from a second thread, and tests run beside them.
        "OMP_NUM_THREADS": "1",
        **environ,
    }
    log = folder / "server.log"
    address = ["--host", "127.0.0.1", "--port", str(port)]
    command = [str(python), "-m", "bentoml", "serve", target, *address, *options]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=cwd, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        if wait:
            server.wait_until_ready()
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
