"""Real prompts to a real server: the pictures show what was asked, each caller gets its own."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from server import Server

from jubako.miniatures.reader import shows
from jubako.miniatures.world import COLOURS, SHAPES


def picture(response: httpx.Response) -> Image.Image:
    assert response.status_code == 200, response.text
    (data,) = response.json()["data"]
    return Image.open(io.BytesIO(base64.b64decode(data["b64_json"])))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_picture_shows_what_was_asked(server: Server, seed: int) -> None:
    caption = "a large red circle on the left of a blue background"
    verdict = shows(picture(server.generate(caption, seed=seed)), caption)
    assert verdict.ok, verdict.misses


def mixed_requests(n: int) -> list[dict[str, Any]]:
    """Captions that all differ, with step counts, schedulers, guidance and places mixed."""
    schedulers = ("DDIM", "Euler", "DPM++ 2M", "UniPC")
    requests = []
    for i in range(n):
        colour = list(COLOURS)[i % 8]
        background = list(COLOURS)[(i + 1 + i // 8) % 8]
        shape, place = SHAPES[i % 5], ("left", "right", "top", "bottom")[i % 4]
        requests.append(
            {
                "prompt": f"a large {colour} {shape} on the {place} of a {background} background",
                "seed": 100 + i,
                "num_inference_steps": 15 + i % 11,
                "scheduler": schedulers[i % 4],
                "guidance_scale": (1.5, 2.0, 3.0)[i % 3],
            }
        )
    return requests


def test_32_concurrent_mixed_requests_all_return_their_own_picture(server: Server) -> None:
    requests = mixed_requests(32)
    assert len({request["prompt"] for request in requests}) == 32

    async def together() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
            posts = (client.post("/v1/images/generations", json=request) for request in requests)
            return await asyncio.gather(*posts)

    pictures = [picture(response) for response in asyncio.run(together())]
    alone = [picture(server.generate(**request)) for request in requests]
    for request, ours, expected in zip(requests, pictures, alone, strict=True):
        difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(expected, dtype=int)).max()
        assert difference <= 1, f"{request['prompt']}: differs by {difference}/255 from the same job alone"
    own = [shows(ours, request["prompt"]).ok for request, ours in zip(requests, pictures, strict=True)]
    others = [shows(ours, requests[(i + 1) % 32]["prompt"]).ok for i, ours in enumerate(pictures)]
    # The model itself misses some captions; a picture that another caller asked for would miss nearly all.
    assert sum(own) >= 26, f"{sum(own)} of 32 show their own caption"
    assert sum(others) == 0


def test_a_client_that_goes_away_frees_its_rows(server: Server) -> None:
    """A picture asked for right after a large one was abandoned does not wait for it."""
    long = {"prompt": "a red circle", "num_inference_steps": 150, "width": 128, "height": 128, "n": 10}
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/images/generations", long, timeout=1)
    for _ in range(100):
        log = server.log.read_text(encoding="utf-8", errors="replace")
        if log.count("path=/cancel_job") >= 10:
            break
        httpx.get(f"{server.url}/livez")
    assert log.count("path=/cancel_job") >= 10, "the family was not told of the ten abandoned jobs"
    response = server.post("/txt2img", {"prompt": "a red circle", "num_inference_steps": 2})
    phases = dict(part.split(";dur=") for part in response.headers["server-timing"].split(", "))
    assert float(phases["queued"]) < 1000
