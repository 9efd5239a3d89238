"""Families on ports of their own: only the gateway gets in, and nobody with a pickle."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from pickles import Canary
from server import Server, serving

HERE = Path(__file__).parent
KEY = "jbk_secret-of-the-families-0123456789"
GIVEN = {"Authorization": f"Bearer {KEY}"}
METHODS = ("generate", "generate_batch", "generate_events", "cancel_job", "has_job", "describe")


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("family")
    with serving(folder, target="slow:Slow", cwd=HERE, JUBAKO_FAMILY_KEY=KEY) as family:
        yield family


def test_a_family_with_a_key_is_the_gateway_s_that_has_it(family: Server, tmp_path: Path) -> None:
    urls = f"slow={family.url}"
    with serving(
        tmp_path, target="slow:Gateway", cwd=HERE, JUBAKO_FAMILY_URLS=urls, JUBAKO_FAMILY_KEY=KEY
    ) as gateway:
        reply = gateway.post("/txt2img", {"prompt": "x", "seed": 7})
        assert (reply.status_code, reply.headers.get("x-seed")) == (200, "7")
        models = httpx.get(f"{gateway.url}/v1/models", timeout=10).json()["data"]
        assert [model["state"] for model in models if model["id"] == "sleeper"] == ["resident"]
        assert KEY not in gateway.log.read_text(encoding="utf-8") + family.log.read_text(encoding="utf-8")


@pytest.mark.parametrize("headers", [{}, {"Authorization": f"Bearer {KEY[:-1]}"}], ids=["none", "wrong"])
def test_nobody_else_gets_anything_from_a_family(family: Server, headers: dict[str, str]) -> None:
    for method in METHODS:
        reply = httpx.post(f"{family.url}/{method}", json={}, headers=headers)
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
    for path in ("/", "/metrics", "/docs.json", "/schema.json", "/static_content/index.css", "/nowhere"):
        assert httpx.get(f"{family.url}{path}", headers=headers).status_code == 401
        assert httpx.get(f"{family.url}{path}", headers=GIVEN).status_code not in {401, 403}, path
    assert httpx.get(f"{family.url}/readyz", headers=headers).status_code == 200


KINDS = ("application/vnd.bentoml+pickle", "APPLICATION/vnd.bentoml+pickle", "text/plain", "")
FORMS = (
    "multipart/form-data; boundary=x",
    "application/x-www-form-urlencoded",
    "application/vnd.apache.arrow",
)


def unpickled(url: str, canary: Canary) -> bool:
    """Whether any method of a service opens a pickle, by any type, with the key or without."""
    bare = pickle.dumps(canary)
    given: tuple[dict[str, str], ...] = (
        {},
        {"Buffer-Lengths": str(len(bare))},
        {"Payload-Container": "NdarrayContainer"},
    )
    with httpx.Client(base_url=url, timeout=10) as client:
        for method, kind, key, more in itertools.product(METHODS, (*KINDS, *FORMS), ({}, GIVEN), given):
            headers = {"Content-Type": kind, **more, **key}
            reply = client.post(f"/{method}", content=bare, headers=headers)
            assert reply.status_code in {401, 415}, (method, kind, reply.text)
    return canary.sang


def test_no_pickle_is_opened_on_a_family_s_port(family: Server, tmp_path: Path) -> None:
    assert not unpickled(family.url, Canary(tmp_path / "sang"))


def test_without_unix_sockets_the_processes_of_a_server_open_no_pickles_either(tmp_path: Path) -> None:
    """As on Linux under Windows, where each family of a server has a port of its own."""
    with serving(tmp_path / "served", target="slow:Gateway", cwd=HERE, BENTOML_NO_UDS="1") as gateway:
        ports = {
            connection.laddr.port
            for process in [gateway.process.pid, *children(gateway)]
            for connection in psutil.Process(process).net_connections("tcp")
            if connection.status == psutil.CONN_LISTEN
        }
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        families = [url for url in urls if is_family(url)]
        assert len(families) == 1
        assert gateway.post("/txt2img", {"prompt": "x"}).status_code == 200
        assert not unpickled(families[0], Canary(tmp_path / "sang"))


def children(server: Server) -> list[int]:
    return [process.pid for process in psutil.Process(server.process.pid).children(recursive=True)]


def is_family(url: str) -> bool:
    """Whether a family's service listens there, and not the manager or the gateway."""
    try:
        return "sleeper" in httpx.post(f"{url}/describe", json={}, timeout=1).json()
    except (httpx.HTTPError, ValueError):
        return False


@pytest.mark.parametrize(
    ("target", "host", "key"),
    [
        ("slow:Gateway", (), "JUBAKO_API_KEYS_FILE"),
        ("slow:Slow", ("--host", "0.0.0.0"), "JUBAKO_FAMILY_KEY"),  # noqa: S104 # it is to be refused
    ],
)
def test_a_public_address_is_not_served_without_keys(
    tmp_path: Path, target: str, host: tuple[str, ...], key: str
) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JUBAKO_")}
    own = {"BENTOML_HOME": str(tmp_path), "JUBAKO_HOME": str(tmp_path), "BENTOML_DO_NOT_TRACK": "1"}
    # A key for the other kind of service is none for this one.
    other = {"JUBAKO_FAMILY_KEY": KEY} if target == "slow:Gateway" else {"JUBAKO_API_KEYS": f"a {KEY} admin"}
    done = subprocess.run(
        [sys.executable, "-m", "bentoml", "serve", target, "--port", "0", *host],
        cwd=HERE,
        env={**kept, **own, **other},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    sentence = done.stderr.strip().splitlines()[-1]
    assert "is reached from other machines, and no keys are set" in sentence
    assert key in sentence
    assert "Traceback" not in done.stderr
