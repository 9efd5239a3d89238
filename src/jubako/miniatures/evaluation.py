"""Asks a pipeline for pictures of random scenes and lets the pixel checker judge them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image

from jubako.miniatures.autoencoder import reconstruct
from jubako.miniatures.dataset import draw
from jubako.miniatures.reader import Verdict, judge, read
from jubako.miniatures.world import Scene, random_scene

_BATCH = 20


@dataclass(frozen=True)
class Judged:
    """One prompt, the picture made of it, and what the checker says."""

    scene: Scene
    picture: Image.Image
    verdict: Verdict


def prompts(count: int, objects: int, seed: int) -> list[Scene]:
    """Complete scenes of the grammar, from a stream of random numbers that training never uses."""
    rng = np.random.default_rng((seed, 77, objects))
    return [random_scene(rng, objects) for _ in range(count)]


def evaluate(
    pipeline: DiffusionPipeline,
    scenes: list[Scene],
    *,
    steps: int,
    guidance: float,
    seed: int,
    **asked: Any,
) -> list[Judged]:
    """Generate one picture for each scene, with its own seed, and judge it; `asked` goes to the pipeline."""
    judged = []
    for start in range(0, len(scenes), _BATCH):
        part = scenes[start : start + _BATCH]
        numbers = range(start, start + len(part))
        pictures = pipeline(
            [scene.caption() for scene in part],
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + n) for n in numbers],
            **asked,
        ).images
        judged += [Judged(s, p, judge(read(p), s)) for s, p in zip(part, pictures, strict=True)]
    return judged


def figures(judged: list[Judged]) -> dict[str, float]:
    """Shares of pictures all right, and right in each part.

    A wrong count of objects fails every part but the background.
    """
    parts = ("ok", "count", "colour", "shape", "size", "background", "position")
    return {part: round(float(np.mean([getattr(j.verdict, part) for j in judged])), 4) for part in parts}


def autoencoder_figures(model: AutoencoderKL, count: int, seed: int) -> dict[str, float]:
    """The gate: shares of reconstructions read right, for one and for two objects."""
    data = draw(count, seed, two_share=0.5)
    right: dict[int, list[bool]] = {1: [], 2: []}
    for scene, pixels in zip(data.scenes, reconstruct(model, data), strict=True):
        right[len(scene.items)].append(judge(read(Image.fromarray(pixels)), scene).ok)
    share = {f"{'one' if n == 1 else 'two'}_object_ok": round(float(np.mean(right[n])), 4) for n in right}
    return {"scenes": count, "ok": round(float(np.mean(right[1] + right[2])), 4), **share}


def contact_sheet(judged: list[Judged], columns: int = 12, zoom: int = 2) -> Image.Image:
    """Pictures in rows, each in a frame: green when right, red when wrong."""
    side = judged[0].picture.width * zoom + 6
    sheet = Image.new("RGB", (columns * side, -(-len(judged) // columns) * side))
    for i, one in enumerate(judged):
        framed = Image.new("RGB", (side - 2, side - 2), "lime" if one.verdict.ok else "magenta")
        size = (side - 6, side - 6)
        framed.paste(one.picture.resize(size, Image.Resampling.NEAREST), (2, 2))
        sheet.paste(framed, ((i % columns) * side, (i // columns) * side))
    return sheet
