"""What one training step is asked to draw: which pictures, in which words, and some of them in none."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from jubako.miniatures.dataset import Drawn
from jubako.miniatures.text import SlotHeads, Slots, slots, spoken

EMPTY_SHARE = 0.1


@dataclass(frozen=True)
class Latents:
    """What a denoiser's training draws from: scaled latents (N x C x 16 x 16, float16), scenes, slots."""

    values: torch.Tensor
    data: Drawn
    slots: Slots

    @staticmethod
    def of(values: torch.Tensor, data: Drawn) -> Latents:
        return Latents(values, data, slots(data.layouts))


@dataclass(frozen=True)
class Asked:
    """A step's rows and captions; `said` are the positions whose caption is not empty."""

    rows: NDArray[np.int64]
    captions: list[str]
    said: torch.Tensor


def ask(latents: Latents, count: int, rng: np.random.Generator) -> Asked:
    rows = rng.integers(0, len(latents.values), count)
    empty = rng.random(count) < EMPTY_SHARE
    captions = ["" if e else spoken(latents.data.scenes[i], rng) for i, e in zip(rows, empty, strict=True)]
    return Asked(rows, captions, torch.from_numpy(np.flatnonzero(~empty)))


def slot_loss(
    heads: SlotHeads, states: torch.Tensor, ids: torch.Tensor, asked: Asked, latents: Latents
) -> torch.Tensor:
    """Cross-entropy of what `heads` read off the text encoder's states, without the empty captions."""
    target = latents.slots.rows(torch.from_numpy(asked.rows)[asked.said])
    end = int(ids[0, -1])  # the last token of every caption, and all the padding
    return heads.loss(states[asked.said].float(), ids[asked.said], end, target)
