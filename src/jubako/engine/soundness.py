"""Whether what came out is a picture at all: numbers that are none, and pictures of a single colour.

It is looked at once a job, beside the denoiser's thread, where the picture leaves the device anyway. Numbers
that are none are certain; a single colour may be what was asked for, but is also what an autoencoder paints
whose numbers overflow.
"""

from __future__ import annotations

import logging

import torch

from jubako.engine.samples import Sample
from jubako.errors import NotFinite

__all__ = ["sound"]

logger = logging.getLogger(__name__)

# Colours that are as near to each other are one in a file.
SAME = 0.5 / 255


@torch.inference_mode()
def sound(sample: Sample, decoded: torch.Tensor, model: str) -> torch.Tensor:
    """What was decoded of a sample, on the CPU; where that is in doubt, what float32 makes of its latents.

    NotFinite says whose numbers are none, and what to do, when there is nothing to make a picture of.
    """
    decoded = decoded.cpu()
    finite, flat = _looked_at(decoded)
    if finite and not flat:
        return decoded
    # Whatever is no number in latents spreads over all that is decoded of them.
    if not finite and not sample.latents.isfinite().all():
        raise NotFinite(f"the denoiser of {model} {_WHAT}; {_remedy(sample.latents.dtype, model)}")
    seen = "a single colour" if finite else "numbers that are none"
    logger.warning("%s: %s came out of its autoencoder; decoding again in float32", model, seen)
    again = (sample.decode or sample.denoiser.decode)(sample.latents, upcast=True)[0].cpu()
    finite, _ = _looked_at(again)
    if not finite:
        raise NotFinite(
            f"the autoencoder of {model} {_WHAT}, in float32 too; its weights may be broken: fetch them again"
        )
    return again


_WHAT = "gave numbers that are none (NaN or infinite)"


def _remedy(dtype: torch.dtype, model: str) -> str:
    if dtype == torch.float32:
        return "it runs in float32 already: its weights, an adapter or an extreme guidance may be the cause"
    return f"a wider precision may help: JUBAKO_PRECISION={model}=float32"


def _looked_at(decoded: torch.Tensor) -> tuple[bool, bool]:
    """Whether all numbers are some, and whether a picture in it has a single colour.

    Pictures are [3, H, W], clips [frames, 3, H, W]; an object's latents [n, d] have no colours.
    """
    if decoded.ndim < 3:
        return bool(decoded.isfinite().all()), False
    least, most = decoded.flatten(-2).float().aminmax(dim=-1)
    spread = (most - least).amax(dim=-1)
    return bool(spread.isfinite().all()), bool((spread < SAME).any())
