"""Starts ``bentoml serve`` and says in one line when and where it is ready. ``scripts/serve`` runs this."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

__all__ = ["main"]

PROBE_SECONDS = 0.25


def main() -> int:
    """Serve until interrupted; the exit status is the server's."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=False)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=3000)
    arguments, others = parser.parse_known_args()
    root = Path(__file__).parent.parent.parent
    command = [sys.executable, "-m", "bentoml", "serve", "service:Gateway"]
    address = ["--host", arguments.host, "--port", str(arguments.port)]
    url = f"http://{arguments.host}:{arguments.port}"
    if _answers(url):
        print(f"Something answers at {url} already; choose another --port", file=sys.stderr)
        return 1
    started = time.monotonic()
    server = subprocess.Popen([*command, *address, *others], cwd=root)
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, lambda *_: server.terminate())
    while server.poll() is None:
        if _ready(url):
            print(f"Jubako is ready at {url} after {time.monotonic() - started:.0f} s", flush=True)
            break
        time.sleep(PROBE_SECONDS)
    return server.wait()


def _answers(url: str) -> bool:
    try:
        httpx.get(f"{url}/livez", timeout=1)
    except httpx.TransportError:
        return False
    return True


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
