"""What is left of a picture when all that files do to it is taken away: 64 bits, near for what looks alike.

The signs of the lowest frequencies (DCT) of the picture at 32 x 32: 40 of its brightness, 12 of each colour
difference, so that the same drawing in other colours is another one. A margin keeps what is flat from being
told apart by noise. Libraries for this (imagehash) bring PyWavelets and look at brightness alone.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional

__all__ = ["fingerprint"]

SIDE = 32
FREQUENCIES = 8
YCBCR = ((0.299, 0.587, 0.114), (-0.169, -0.331, 0.5), (0.5, -0.419, -0.081))
BITS = (40, 12, 12)  # of Y, Cb and Cr

# In levels of 255: frequencies that are weaker count as none.
MARGIN = 0.25

# Of larger pictures not every pixel is looked at.
ENOUGH = 256

# All but the mean, from low to high; by rows.
_ORDER = sorted(range(1, FREQUENCIES**2), key=lambda place: (sum(divmod(place, FREQUENCIES)), place))


def fingerprint(decoded: torch.Tensor) -> str:
    """16 hexadecimal digits of a picture [3, H, W] with values from 0 to 1; of a clip [frames, 3, H, W] those
    of its first and its middle frame; of an object's latents [n, d] none.
    """
    if decoded.ndim < 3:
        return ""
    frames = decoded[None] if decoded.ndim == 3 else decoded[[0, len(decoded) // 2]]
    return "".join(_digits(frame) for frame in frames)


def _digits(picture: torch.Tensor) -> str:
    every = max(1, min(picture.shape[1:]) // ENOUGH)
    small = functional.adaptive_avg_pool2d(picture[:, ::every, ::every].float().cpu(), SIDE)
    planes = torch.einsum("pc,chw->phw", torch.tensor(YCBCR), 255 * small)
    waves = _waves()
    frequencies = waves @ planes @ waves.T / SIDE**2
    bits = (frequencies.flatten(1)[:, _ORDER] > MARGIN).tolist()
    chosen = [bit for plane, count in zip(bits, BITS, strict=True) for bit in plane[:count]]
    return f"{int(''.join('01'[bit] for bit in chosen), 2):016x}"


def _waves() -> torch.Tensor:
    """The cosines of the lowest frequencies, [FREQUENCIES, SIDE]."""
    place = torch.arange(SIDE, dtype=torch.float32) + 0.5
    return torch.cos(math.pi / SIDE * torch.arange(FREQUENCIES, dtype=torch.float32)[:, None] * place)
