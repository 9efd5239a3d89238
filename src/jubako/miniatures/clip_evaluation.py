"""Asks a pipeline for clips of random pictures and lets the checker of clips judge them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image

from jubako.miniatures.clip_reader import ClipVerdict, clip_figures, judge_clip
from jubako.miniatures.motion import MOST_MOTION, Motion, random_motion


@dataclass(frozen=True)
class JudgedClip:
    """What was asked, the frames made of it, and what the checker says."""

    motion: Motion
    frames: list[Image.Image]
    verdict: ClipVerdict


def clip_requests(count: int, seed: int) -> list[Motion]:
    """Pictures to be set in motion, from a stream of random numbers that training never uses.

    Only their first frames and buckets are asked for; the buckets are spread evenly.
    """
    rng = np.random.default_rng((seed, 78))
    buckets = np.linspace(0, MOST_MOTION, count).round().astype(int)
    return [random_motion(rng, int(bucket))[1] for bucket in buckets]


def evaluate_clips(
    pipeline: StableVideoDiffusionPipeline,
    motions: Sequence[Motion],
    *,
    steps: int,
    guidance: float,
    seed: int,
    **asked: Any,
) -> list[JudgedClip]:
    """Make one clip of each first frame, with its own seed, and judge it; `asked` goes to the pipeline."""
    judged = []
    for number, motion in enumerate(motions):
        picture = motion.frames()[0]
        frames = pipeline(
            picture,
            motion_bucket_id=motion.bucket,
            num_inference_steps=steps,
            max_guidance_scale=guidance,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + number),
            **asked,
        ).frames[0]
        judged.append(JudgedClip(motion, frames, judge_clip(frames, picture)))
    return judged


def figures_of_clips(judged: Sequence[JudgedClip]) -> dict[str, float]:
    return clip_figures([one.verdict for one in judged], [one.motion.bucket for one in judged])


def clip_sheet(judged: Sequence[JudgedClip], columns: int = 3) -> Image.Image:
    """Clips in columns, the picture before its frames, each in a frame: green when right, red when wrong."""
    side, gap = judged[0].frames[0].width, 4
    width, height = (len(judged[0].frames) + 1) * (side + 2) + gap, side + 2 * gap
    sheet = Image.new("RGB", (columns * (width + gap), -(-len(judged) // columns) * height))
    for i, one in enumerate(judged):
        strip = Image.new("RGB", (width, height - gap), "lime" if one.verdict.ok else "magenta")
        for n, frame in enumerate([one.motion.frames(side)[0], *one.frames]):
            strip.paste(frame, (n * (side + 2) + 2, 2))
        sheet.paste(strip, ((i % columns) * (width + gap), (i // columns) * height))
    return sheet
