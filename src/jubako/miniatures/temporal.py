"""The autoencoder of Stable Video Diffusion, grown out of tiny-sd's and speaking the same latents.

diffusers fixes its group norms at 32 groups where tiny-sd's have 8, so weights cannot simply be copied. The
outermost level is widened fourfold by copies, which keeps its groups and hence its colours; the inner norms
change, and a short distillation repairs that: the encoder learns tiny-sd's latents, the decoder the pictures.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder
from diffusers.models.resnet import SpatioTemporalResBlock
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from jubako.miniatures.autoencoder import EDGE_WEIGHT, SQUARE_WEIGHT
from jubako.miniatures.training import Group

BATCH = 12
LEARNING_RATE = 1.5e-3
LATENT_WEIGHT = 2.0
LATENT_NOISE = 0.3  # in units of the latents' spread: a decoder that has seen it forgives a denoiser's errors
CHANNELS = (64, 32, 64)
_ASYMMETRY = 0.1  # of a weight's spread; exact copies would stay copies for ever


def new_autoencoder(origin: AutoencoderKL) -> AutoencoderKLTemporalDecoder:
    """SVD's layout with tiny-sd's weights; what looks along time does nothing yet."""
    model = AutoencoderKLTemporalDecoder(
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=origin.config.latent_channels,
        sample_size=origin.config.sample_size,
        scaling_factor=origin.config.scaling_factor,
    )
    old = origin.state_dict()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            known = old.get(name.replace("spatial_res_block.", ""))
            if known is not None:
                value.copy_(_widened(known, value.shape))
        first, out_of = model.decoder.conv_in, origin.post_quant_conv
        first.weight.copy_(torch.einsum("omkl,mi->oikl", first.weight, out_of.weight[:, :, 0, 0]))
        first.bias += origin.decoder.conv_in.weight.sum((2, 3)) @ out_of.bias
        for block in _blocks(model):
            nn.init.zeros_(block.temporal_res_block.conv2.weight)
            nn.init.zeros_(block.temporal_res_block.conv2.bias)
        model.decoder.time_conv_out.weight.zero_()
        model.decoder.time_conv_out.weight[:, :, 1, 0, 0] = torch.eye(3)
        model.decoder.time_conv_out.bias.zero_()
    return model


class Distilled(nn.Module):
    """The autoencoder while it learns from frames and what tiny-sd's encoder says of them."""

    def __init__(
        self, model: AutoencoderKLTemporalDecoder, pixels: NDArray[np.uint8], latents: torch.Tensor
    ) -> None:
        super().__init__()
        self.model = model
        self._pixels, self._latents = pixels, latents
        for block in _blocks(model):
            block.temporal_res_block.requires_grad_(False)
            block.time_mixer.requires_grad_(False)
        model.decoder.time_conv_out.requires_grad_(False)
        model.decoder.mid_block.attentions.requires_grad_(False)

    def groups(self) -> list[Group]:
        return [Group([p for p in self.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=1e-4)]

    def losses(self, key: tuple[int, int], progress: float) -> tuple[torch.Tensor, dict[str, float]]:
        """Squares on the latents, and what tiny-sd's own decoder descended on the pictures."""
        rows = np.random.default_rng((*key, 9)).integers(0, len(self._pixels), BATCH)
        pictures = torch.from_numpy(self._pixels[rows]).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
        known = self._latents[rows].float()
        generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
        noise = torch.randn(known.shape, generator=generator) / self.model.config.scaling_factor
        latent = functional.mse_loss(self.model.encode(pictures).latent_dist.mean, known)
        with still(self.model):
            error = self.model.decode(known + LATENT_NOISE * noise, num_frames=1).sample - pictures
        pixel = error.abs().mean()
        edge = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        loss = pixel + SQUARE_WEIGHT * error.square().mean() + EDGE_WEIGHT * progress * edge
        return loss + LATENT_WEIGHT * latent, {
            "pixel": pixel.item(),
            "edge": edge.item(),
            "latent": latent.item(),
        }


@contextmanager
def still(model: AutoencoderKLTemporalDecoder) -> Iterator[None]:
    """Leave out the blocks that look along time, which costs a third less while they do nothing anyway."""
    blocks = [(block, block.temporal_res_block) for block in _blocks(model)]
    for block, _ in blocks:
        block.temporal_res_block = _Unchanged()
    try:
        yield
    finally:
        for block, temporal in blocks:
            block.temporal_res_block = temporal


class _Unchanged(nn.Module):
    def forward(self, hidden: torch.Tensor, _embedding: torch.Tensor | None) -> torch.Tensor:
        return hidden


def _blocks(model: nn.Module) -> list[SpatioTemporalResBlock]:
    return [module for module in model.modules() if isinstance(module, SpatioTemporalResBlock)]


def _widened(known: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """A weight, bias or gain repeated until it has the shape; repeated inputs share the old weight."""
    times = [new // old for new, old in zip(shape, known.shape, strict=True)]
    if max(times) == 1:
        return known
    wide = known.repeat(times) / (times[1] if len(times) > 1 else 1)
    return wide + _ASYMMETRY * wide.std() * torch.randn(shape) if len(times) > 1 else wide


def settings() -> dict[str, Any]:
    return {
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "channels": CHANNELS,
        "latent_weight": LATENT_WEIGHT,
        "latent_noise": LATENT_NOISE,
    }
