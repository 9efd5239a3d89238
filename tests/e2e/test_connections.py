"""The way between gateway and family: nothing is lost on it, and a family that is away harms no one else.

With BentoML's own settings 8 to 14 per cent of these calls fail, because its proxy closes its connections
after 100 requests without waiting for those in flight.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest
from server import Server, serving

HERE = Path(__file__).parent
CALLERS, CALLS = 16, 2000


@contextmanager
def slow_gateway(folder: Path, *, by_url: bool) -> Iterator[Server]:
    urls = ""
    with ExitStack() as stack:
        if by_url:
            family = stack.enter_context(serving(folder / "family", target="slow:Slow", cwd=HERE))
            urls = f"slow={family.url}"
        gateway = serving(folder / "gateway", target="slow:Gateway", cwd=HERE, JUBAKO_FAMILY_URLS=urls)
        yield stack.enter_context(gateway)


async def call_many(server: Server) -> Counter[int]:
    """The status codes of all calls."""
    codes: Counter[int] = Counter()
    remaining = iter(range(CALLS))

    async def caller(client: httpx.AsyncClient) -> None:
        for seed in remaining:
            response = await client.post("/txt2img", json={"prompt": "x", "seed": seed})
            codes[response.status_code] += 1
            if response.status_code == 200:
                assert response.headers["x-seed"] == str(seed), "a reply went to the wrong caller"

    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        await asyncio.gather(*(caller(client) for _ in range(CALLERS)))
    return codes


@pytest.mark.timeout(420)
def test_2000_calls_by_16_callers_all_succeed_over_the_socket_and_by_url(tmp_path: Path) -> None:
    async def both(socket: Server, url: Server) -> tuple[Counter[int], Counter[int]]:
        return await asyncio.gather(call_many(socket), call_many(url))

    with (
        slow_gateway(tmp_path / "socket", by_url=False) as socket,
        slow_gateway(tmp_path / "url", by_url=True) as url,
    ):
        for codes in asyncio.run(both(socket, url)):
            assert codes == {200: CALLS}


def test_the_gateway_answers_within_a_second_while_a_family_loads(tmp_path: Path) -> None:
    with serving(tmp_path, target="slow:Gateway", cwd=HERE, wait=False, SLOW_LOAD_SECONDS="10") as server:
        wait_for_gateway(server)
        for _ in range(10):
            status, seconds = probe(server)
            assert status == 503
            assert seconds < 1, f"the probe took {seconds:.2f} s"
            time.sleep(0.2)
        assert httpx.get(f"{server.url}/v1/models", timeout=5).status_code == 200
        server.wait_until_ready(60)
        assert server.post("/txt2img", {"prompt": "x"}).status_code == 200


def test_a_family_that_is_down_is_a_503_with_retry_after(tmp_path: Path) -> None:
    with ExitStack() as stack:
        family = stack.enter_context(serving(tmp_path / "family", target="slow:Slow", cwd=HERE))
        gateway = stack.enter_context(
            serving(
                tmp_path / "gateway",
                target="slow:Gateway",
                cwd=HERE,
                JUBAKO_FAMILY_URLS=f"slow={family.url}",
            )
        )
        assert gateway.post("/txt2img", {"prompt": "x"}).status_code == 200
        family.process.terminate()
        family.process.wait(20)
        status, seconds = probe(gateway)
        assert (status, seconds < 1) == (503, True)
        response = gateway.post("/txt2img", {"prompt": "x"})
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) > 0
        assert response.json()["error"]["code"] == "family_unavailable"
        assert httpx.get(f"{gateway.url}/v1/models", timeout=5).status_code == 200


def test_more_waiting_calls_than_a_proxy_has_connections_hold_up_no_probe_and_no_cancel(
    tmp_path: Path,
) -> None:
    async def crowd(server: Server) -> Counter[int]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:
            request = {"prompt": "x", "num_inference_steps": 30}
            calls = [asyncio.ensure_future(client.post("/txt2img", json=request)) for _ in range(130)]
            await asyncio.sleep(1)
            status, seconds = await asyncio.to_thread(probe, server)
            assert (status, seconds < 1) == (200, True)
            calls.pop(0).cancel()
            await asyncio.sleep(0.5)
            assert "path=/cancel_job" in server.log.read_text(encoding="utf-8")
            return Counter(reply.status_code for reply in await asyncio.gather(*calls))

    with serving(tmp_path, target="slow:Gateway", cwd=HERE) as server:
        assert asyncio.run(crowd(server)) == {200: 129}


def test_a_family_s_own_port_refuses_pickles(tmp_path: Path) -> None:
    with serving(tmp_path, target="slow:Slow", cwd=HERE) as family:
        response = httpx.post(
            f"{family.url}/generate",
            content=b"\x80\x04N.",
            headers={"content-type": "application/vnd.bentoml+pickle"},
        )
        assert response.status_code == 415


def probe(server: Server) -> tuple[int, float]:
    started = time.monotonic()
    status = httpx.get(f"{server.url}/readyz", timeout=10).status_code
    return status, time.monotonic() - started


def wait_for_gateway(server: Server) -> None:
    """Return when the gateway's own process answers, whatever it says."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(f"{server.url}/livez", timeout=1).raise_for_status()
        except httpx.HTTPError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(server.tail())
