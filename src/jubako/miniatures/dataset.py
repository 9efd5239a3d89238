"""Captioned pictures in bulk: the same seed draws the same scenes, captions and pixels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from jubako.miniatures.world import Layout, Scene, arrange, random_scene, render


@dataclass(frozen=True)
class Drawn:
    """Scenes with their layouts and pictures; pixels are uint8, N x side x side x 3."""

    scenes: tuple[Scene, ...]
    layouts: tuple[Layout, ...]
    pixels: NDArray[np.uint8]

    def batch(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Pictures as float32 in [-1, 1], B x 3 x side x side."""
        return torch.from_numpy(self.pixels[rows]).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def draw(count: int, seed: int, two_share: float = 0.6, side: int = 64) -> Drawn:
    """Draw `count` scenes, a share of them with two objects."""
    rng = np.random.default_rng(seed)
    scenes, layouts = [], []
    pixels = np.empty((count, side, side, 3), np.uint8)
    for i in range(count):
        scene = random_scene(rng, 2 if rng.random() < two_share else 1)
        layout = arrange(scene, rng)
        pixels[i] = np.asarray(render(layout, side))
        scenes.append(scene)
        layouts.append(layout)
    return Drawn(tuple(scenes), tuple(layouts), pixels)
