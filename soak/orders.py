"""Pictures that are drawn alone first, so that each one drawn in a crowd can be told from all others."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiohttp
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jubako.miniatures.world import random_scene

__all__ = ["Order", "difference", "drawn_alone"]

Pixels = NDArray[np.int16]

# Of 255: what another company in the same forward may change by rounding.
ROUNDING = 2


@dataclass(frozen=True)
class Order:
    """A request for one picture, and the picture."""

    path: str
    fields: Mapping[str, Any]
    pixels: Pixels | None = field(default=None, repr=False, compare=False)

    def is_shown_by(self, content: bytes) -> bool:
        """Whether it is this order's picture, but for rounding."""
        if self.pixels is None:
            raise ValueError("the order was never drawn alone")
        return difference(_pixels(content), self.pixels) <= ROUNDING


async def drawn_alone(client: aiohttp.ClientSession, count: int, seed: int) -> list[Order]:
    """So many orders, no two alike, one in six from a picture; each asked for while nothing else is."""
    chance, scenes = Random(seed), np.random.default_rng(seed)  # noqa: S311 # seeds of pictures
    orders: list[Order] = []
    while len(orders) < count:
        fields = {
            "prompt": random_scene(scenes, 1).caption(),
            "seed": chance.randrange(2**32),
            "num_inference_steps": chance.choice((2, 3, 4)),
            "guidance_scale": chance.choice((1.0, 4.0)),
        }
        if len(orders) % 6 == 5:
            start = base64.b64encode(_colour(chance)).decode()
            order = Order("/img2img", {**fields, "image": start, "strength": 0.8})
        else:
            order = Order("/txt2img", fields)
        async with client.post(order.path, json=order.fields) as reply:
            reply.raise_for_status()
            orders.append(Order(order.path, order.fields, _pixels(await reply.read())))
    _require_unlike(orders)
    return orders


def difference(one: Pixels, other: Pixels) -> int:
    """The largest difference of a pixel, of 255; 255 for pictures of different sizes."""
    return int(np.abs(one - other).max()) if one.shape == other.shape else 255


def _require_unlike(orders: list[Order]) -> None:
    pictures = [order.pixels for order in orders if order.pixels is not None]
    for i, one in enumerate(pictures):
        if any(difference(one, other) <= 4 * ROUNDING for other in pictures[:i]):
            raise RuntimeError("two orders look alike, so that they could not be told apart")


def _pixels(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.int16)


def _colour(chance: Random) -> bytes:
    file = io.BytesIO()
    colour = chance.randrange(256), chance.randrange(256), chance.randrange(256)
    Image.new("RGB", (64, 64), colour).save(file, "PNG")
    return file.getvalue()
