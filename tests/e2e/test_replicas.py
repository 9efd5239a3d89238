"""A family of two replicas behind one gateway: both are used, and either may die or stop under load."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from server import Server, free_port, serving

HERE = Path(__file__).parent
KEY = "jbk_secret-of-the-families-0123456789"
CALLERS = 8

pytestmark = pytest.mark.timeout(420)


class Cluster:
    """Two replicas on ports that stay theirs, and their gateway."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self._starts = 0
        self.ports = {"a": free_port(), "b": free_port()}
        self.replicas: dict[str, Server] = {}
        for name in self.ports:
            self.start(name)
        urls = "slow=" + "|".join(f"http://127.0.0.1:{port}" for port in self.ports.values())
        self.gateway = self.serve("gateway", target="dozing:Gateway", JUBAKO_FAMILY_URLS=urls)
        self.gateway.wait_until_ready()
        for replica in self.replicas.values():
            replica.wait_until_ready()

    def serve(self, name: str, **options: Any) -> Server:
        self._starts += 1
        key = {"JUBAKO_FAMILY_KEY": KEY} | options
        server = serving(self._folder / f"{name}{self._starts}", cwd=HERE, wait=False, **key)
        return self._stack.enter_context(server)

    def start(self, name: str) -> Server:
        """Start a replica, in a folder of its own, so that its log tells of this start only."""
        port = self.ports[name]
        self.replicas[name] = self.serve(name, target="dozing:Slow", port=port, JUBAKO_STOP_DELAY="2")
        return self.replicas[name]

    def both(self) -> None:
        """Return when both get work."""
        for name, replica in list(self.replicas.items()):
            if replica.process.poll() is not None:
                self.start(name)
        for replica in self.replicas.values():
            replica.wait_until_ready()
            wait_until(lambda replica=replica: self.gets_work(replica))

    def gets_work(self, replica: Server) -> bool:
        before = given(replica)
        for seed in range(2):
            self.gateway.post("/txt2img", {"prompt": "x", "seed": seed, "num_inference_steps": 1})
        return given(replica) > before


def given(replica: Server, path: str = "/generate") -> int:
    """How many pictures it has made since it was started."""
    return replica.log.read_text(encoding="utf-8").count(f"path={path},")


def kill(server: Server) -> None:
    for process in [*psutil.Process(server.process.pid).children(recursive=True), server.process]:
        os.kill(process.pid, signal.SIGKILL)
    server.process.wait()


def wait_until(true: Any, seconds: float = 120) -> float:
    """Seconds until it was."""
    started = time.monotonic()
    while not true():
        assert time.monotonic() < started + seconds
        time.sleep(0.1)
    return time.monotonic() - started


@contextmanager
def load(gateway: Server) -> Iterator[Counter[int]]:
    """Callers that ask as long as the block lasts; the status codes of all that they are answered."""
    codes: Counter[int] = Counter()
    stop = threading.Event()

    def call(first: int) -> None:
        with httpx.Client(base_url=gateway.url, timeout=60) as client:
            seed = first
            while not stop.is_set():
                reply = client.post("/txt2img", json={"prompt": "x", "seed": seed})
                codes[reply.status_code] += 1
                if reply.status_code == 200:
                    assert reply.headers["x-seed"] == str(seed)
                seed += CALLERS

    threads = [threading.Thread(target=call, args=(first,)) for first in range(CALLERS)]
    for thread in threads:
        thread.start()
    try:
        yield codes
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(tmp_path_factory.mktemp("cluster"), stack)


def test_both_get_work_in_proportion(cluster: Cluster) -> None:
    cluster.both()
    before = {name: given(replica) for name, replica in cluster.replicas.items()}
    with load(cluster.gateway) as codes:
        wait_until(lambda: codes[200] >= 40)
    assert codes.keys() == {200}
    shares = {name: given(replica) - before[name] for name, replica in cluster.replicas.items()}
    assert min(shares.values()) > 0.35 * sum(shares.values()), shares


def test_one_that_is_killed_costs_no_request_and_gets_work_again_when_it_is_back(cluster: Cluster) -> None:
    cluster.both()
    with load(cluster.gateway) as codes:
        wait_until(lambda: codes[200] >= 20)
        kill(cluster.replicas["a"])
        again = cluster.start("a")
        again.wait_until_ready()
        took = wait_until(lambda: given(again) > 0)
    assert codes.keys() == {200}, codes
    assert took < 4, took
    retried = httpx.get(f"{cluster.gateway.url}/metrics").text
    assert 'jubako_retries_total{family="slow"}' in retried


def test_all_are_stopped_in_turn_and_no_request_is_lost(cluster: Cluster) -> None:
    cluster.both()
    with load(cluster.gateway) as codes:
        stop_under_load(cluster.replicas["b"], codes)
        again = cluster.start("b")
        again.wait_until_ready()
        wait_until(lambda: given(again) > 0)
        stop_under_load(cluster.replicas["a"], codes)
        wait_until(lambda: codes.total() >= 200)
    assert codes.keys() == {200}, codes


def stop_under_load(replica: Server, codes: Counter[int]) -> None:
    asked = codes.total()
    wait_until(lambda: codes.total() >= asked + 20)
    replica.process.terminate()
    replica.process.wait(60)


def test_durable_jobs_stay_on_their_replica_when_the_gateway_dies(cluster: Cluster) -> None:
    cluster.both()
    body = {"task": "txt2img", "prompt": "x", "num_inference_steps": 60}
    jobs = [cluster.gateway.post("/v1/jobs", body | {"seed": seed}).json()["id"] for seed in range(6)]
    wait_until(lambda: all(shown(cluster.gateway, job).get("progress", 0) > 0 for job in jobs))
    (gateway,) = [
        process
        for process in psutil.Process(cluster.gateway.process.pid).children(recursive=True)
        if "Gateway" in process.cmdline()
    ]
    gateway.kill()
    wait_until(lambda: all(shown(cluster.gateway, job).get("state") == "succeeded" for job in jobs))
    logs = [replica.log.read_text(encoding="utf-8") for replica in cluster.replicas.values()]
    begun = [[log.count(f"job {job} ended") for log in logs] for job in jobs]
    assert all(sum(places) == 1 for places in begun), begun
    assert {places[0] for places in begun} == {0, 1}


def shown(gateway: Server, job_id: str) -> dict[str, Any]:
    """The job as it stands; nothing while the gateway is away."""
    try:
        return dict(httpx.get(f"{gateway.url}/v1/jobs/{job_id}", timeout=5).raise_for_status().json())
    except httpx.HTTPError:
        return {}


def test_a_gateway_with_another_key_is_told_503_and_its_log_says_why(cluster: Cluster) -> None:
    urls = f"slow=http://127.0.0.1:{cluster.ports['a']}"
    stranger = cluster.serve(
        "stranger", target="dozing:Gateway", JUBAKO_FAMILY_URLS=urls, JUBAKO_FAMILY_KEY=KEY[::-1]
    )
    wait_until(lambda: answers(stranger))
    reply = stranger.post("/txt2img", {"prompt": "x"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "family_unavailable")
    assert "retry-after" in reply.headers
    assert "it refuses this gateway's JUBAKO_FAMILY_KEY (401)" in stranger.log.read_text(encoding="utf-8")


def answers(server: Server) -> bool:
    try:
        return httpx.get(f"{server.url}/livez", timeout=1).status_code == 200
    except httpx.HTTPError:
        return False
