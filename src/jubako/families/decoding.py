"""The ways in which an autoencoder decodes: as it is, in tiles, in float32.

It may be shared by several models, and be encoding on another thread meanwhile, so nothing of it is changed:
its other ways are those of a copy, which shares its weights where it can.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

__all__ = ["in_float32", "in_tiles", "marked"]

LEAST_TILE = 8


def in_tiles(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    """Pictures [n, 3, H, W] of latents [n, c, h, w], decoded in tiles of half the longer side that overlap.

    An autoencoder that knows no tiles decodes in one piece.
    """
    if not hasattr(vae, "tiled_decode"):
        whole: torch.Tensor = vae.decode(latents, return_dict=False)[0]
        return whole
    tiling = copy.copy(vae)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    tiling.tile_latent_min_size = max(LEAST_TILE, (max(latents.shape[-2:]) + 1) // 2)
    tiling.tile_sample_min_size = factor * tiling.tile_latent_min_size
    tiled: torch.Tensor = tiling.tiled_decode(latents, return_dict=False)[0]
    return tiled


def marked(pictures: torch.Tensor) -> torch.Tensor:
    """The pictures, in which infinite numbers are none: clamping would make colours of them."""
    return pictures.masked_fill_(pictures.isinf(), torch.nan)


def in_float32(vae: Any) -> Any:
    """The autoencoder, or a copy where it is less precise; what runs a graph stays what it is."""
    if vae.dtype == torch.float32 or not any(True for _ in vae.parameters()):
        return vae
    return copy.deepcopy(vae).to(torch.float32)
