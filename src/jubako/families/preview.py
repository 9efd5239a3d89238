"""What a picture under denoising looks like so far, without decoding it: a linear map of latents to colours.

A pixel of the latents of the Stable Diffusion models holds little more than the mean colour of its place, so
an affine map of its channels shows it. The map is fitted to the model's own autoencoder, once, by least
squares over drawn patches of colour, so no table of constants has to be kept for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

__all__ = ["ColourMap", "fitted"]

# Pictures, and pixels of the latents of a picture's side and of a patch's. Wholly flat pictures would leave
# open what the channels that hold edges are to be shown as.
PICTURES, SIDE, PATCH = 8, 8, 4
LEVELS = (-1.0, -0.5, 0.0, 0.5, 1.0)

# Channels that these pictures leave unused would get any weight without this, in parts of the mean spread.
RIDGE = 1e-3


@dataclass(frozen=True)
class ColourMap:
    """Colours of -1 to 1 are ``weights`` [3, c] times the channels of a pixel, plus ``bias`` [3]."""

    weights: torch.Tensor
    bias: torch.Tensor

    def __call__(self, latents: torch.Tensor) -> torch.Tensor:
        """A picture [3, h, w] from 0 to 1 on the CPU, of latents [c, h, w]."""
        colours = torch.einsum("oc,chw->ohw", self.weights, latents.float().cpu())
        return ((colours + self.bias[:, None, None]) / 2 + 0.5).clamp(0, 1)


def fitted(encode: Callable[[torch.Tensor], torch.Tensor], factor: int) -> ColourMap:
    """The map of an autoencoder by its ``encode``: pictures [n, 3, H, W] of -1 to 1 to latents [n, c, h, w].

    ``factor`` is how many pixels of a picture's side are one of the latents'.
    """
    pictures = _patches(factor)
    colours = _pixels(functional.avg_pool2d(pictures, factor))
    latents = _pixels(encode(pictures).float().cpu())
    inputs, wanted = latents - latents.mean(0), colours - colours.mean(0)
    spread = inputs.T @ inputs
    damped = spread + RIDGE * spread.diagonal().mean() * torch.eye(len(spread), dtype=spread.dtype)
    weights = torch.linalg.solve(damped, inputs.T @ wanted).T
    bias = colours.mean(0) - weights @ latents.mean(0)
    return ColourMap(weights.float(), bias.float())


def _patches(factor: int) -> torch.Tensor:
    """Pictures [n, 3, H, W] of -1 to 1 in patches of colour that are shifted against the latents' grid."""
    generator = torch.Generator("cpu").manual_seed(0)
    count, size = SIDE // PATCH, PATCH * factor
    levels = torch.randint(len(LEVELS), (PICTURES, 3, count, count), generator=generator)
    pictures = functional.interpolate(torch.tensor(LEVELS)[levels], scale_factor=size)
    return torch.stack([picture.roll((i, i), (1, 2)) for i, picture in enumerate(pictures, 1)])


def _pixels(pictures: torch.Tensor) -> torch.Tensor:
    """The pixels of pictures [n, c, h, w] in lines, [n * h * w, c]."""
    return pictures.double().movedim(1, -1).flatten(0, -2)
