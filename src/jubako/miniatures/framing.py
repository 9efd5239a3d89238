"""Pictures with SDXL's micro-conditioning: some cut out of a larger frame, some blown up from a few pixels.

The six numbers beside a picture are its original height and width, the top and left of the crop, and the
height and width aimed at. The others have the numbers that a pipeline sends by default.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image

from jubako.miniatures.dataset import Drawn, draw
from jubako.miniatures.world import Layout, render

SIDE = 64
FARTHEST_CROP = 12
ORIGINAL_SIDES = (16, 24, 32, 40, 48)


@dataclass(frozen=True)
class Framed:
    """Pictures and the six numbers of each; the scenes and layouts are those of the whole frame."""

    data: Drawn
    time_ids: torch.Tensor


def draw_framed(count: int, seed: int, *, cropped_share: float, blown_up_share: float) -> Framed:
    data = draw(count, seed)
    rng = np.random.default_rng((seed, 5))
    time_ids = torch.tensor([[SIDE, SIDE, 0, 0, SIDE, SIDE]] * count, dtype=torch.float32)
    for i, layout in enumerate(data.layouts):
        chance = rng.random()
        if chance < cropped_share:
            top, left = (int(offset) for offset in rng.integers(0, FARTHEST_CROP + 1, 2))
            data.pixels[i] = np.asarray(cropped(layout, top, left))
            time_ids[i, 2:4] = torch.tensor([top, left])
        elif chance < cropped_share + blown_up_share:
            side = int(rng.choice(ORIGINAL_SIDES))
            data.pixels[i] = np.asarray(blown_up(layout, side))
            time_ids[i, :2] = side
    return Framed(data, time_ids)


def cropped(layout: Layout, top: int, left: int) -> Image.Image:
    """The picture that starts `top` and `left` pixels inside the frame; the background goes on behind it."""
    moved = tuple(replace(o, x=o.x - left / SIDE, y=o.y - top / SIDE) for o in layout.objects)
    return render(replace(layout, objects=moved), SIDE)


def blown_up(layout: Layout, side: int) -> Image.Image:
    return render(layout, side).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
