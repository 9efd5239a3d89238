"""Moving scenes: one object of the captioned world that glides in a straight line while a clip lasts.

`motion_bucket_id` (0 to 255) says how far it goes from the first frame to the last; it goes to the right, or
to the left when it stands on the right. Lengths are fractions of the picture's side. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from jubako.miniatures.world import Layout, Scene, arrange, random_scene, render

FRAMES = 8
MOST_MOTION = 255
# Six pixels of 64, which are one and a half latents. Three times as far, a network of this size and training
# lets the object dissolve on its way.
FARTHEST = 0.1
_RIGHT_FROM = 0.6


@dataclass(frozen=True)
class Motion:
    """What moves and how far from first to last frame, as `motion_bucket_id` asks."""

    layout: Layout
    bucket: int
    dx: float

    def at(self, frame: int) -> Layout:
        """The scene at a frame: the way is walked in equal steps."""
        share = frame / (FRAMES - 1)
        (placed,) = self.layout.objects
        moved = replace(placed, x=placed.x + share * self.dx)
        return replace(self.layout, objects=(moved,))

    def frames(self, side: int = 64) -> list[Image.Image]:
        return [render(self.at(frame), side) for frame in range(FRAMES)]


@dataclass(frozen=True)
class Clips:
    """Scenes with their motions and pictures; pixels are uint8, N x frames x side x side x 3."""

    scenes: tuple[Scene, ...]
    motions: tuple[Motion, ...]
    pixels: NDArray[np.uint8]


def distance(bucket: int) -> float:
    """How far an object goes when this motion is asked for."""
    return FARTHEST * bucket / MOST_MOTION


def set_moving(layout: Layout, bucket: int) -> Motion:
    """Send the one object of a layout to the side on which there is room."""
    (placed,) = layout.objects
    way = distance(bucket)
    return Motion(layout, bucket, way if placed.x < _RIGHT_FROM else -way)


def random_motion(rng: np.random.Generator, bucket: int | None = None) -> tuple[Scene, Motion]:
    """A scene of one object and its motion; the bucket is drawn evenly unless given."""
    scene = random_scene(rng, 1)
    layout = arrange(scene, rng)
    if bucket is None:
        bucket = int(rng.integers(MOST_MOTION + 1))
    return scene, set_moving(layout, bucket)


def draw_clips(count: int, seed: int, side: int = 64) -> Clips:
    """Draw `count` clips; the same seed draws the same ones."""
    rng = np.random.default_rng((seed, 8))
    scenes, motions = [], []
    pixels = np.empty((count, FRAMES, side, side, 3), np.uint8)
    for i in range(count):
        scene, motion = random_motion(rng)
        pixels[i] = [np.asarray(frame) for frame in motion.frames(side)]
        scenes.append(scene)
        motions.append(motion)
    return Clips(tuple(scenes), tuple(motions), pixels)
