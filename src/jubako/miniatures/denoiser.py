"""The denoiser: a UNet trained jointly with the text encoder on cached latents, predicting velocity.

The noise schedule ends at a signal-to-noise ratio of practically zero (sigma 62) without any special flag, so
that backgrounds follow the prompt and every stock scheduler runs on the stock config.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from jubako.miniatures.captions import EMPTY_SHARE, Latents, ask, slot_loss
from jubako.miniatures.text import WIDTH, SlotHeads, new_text_encoder, tokens
from jubako.miniatures.training import Group

BATCH = 48
UNET_LEARNING_RATE = 1e-3
TEXT_LEARNING_RATE = 3e-4
SLOT_WEIGHT = 0.02
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}
SHAPE: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (64, 128),
    "layers_per_block": (1, 2),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 16,
    "attention_head_dim": 4,  # the number of heads, by diffusers' old misnomer
}


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**SHAPE, cross_attention_dim=WIDTH)


class TinySD(nn.Module):
    """The parts of `tiny-sd` that are trained together."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.unet = new_unet()
        self.text_encoder: CLIPTextModel = new_text_encoder(tokenizer)
        self.heads = SlotHeads()
        self.tokenizer = tokenizer

    def groups(self) -> list[Group]:
        textual = [*self.text_encoder.parameters(), *self.heads.parameters()]
        return [
            Group(list(self.unet.parameters()), UNET_LEARNING_RATE),
            Group(textual, TEXT_LEARNING_RATE),
        ]

    def losses(self, latents: Latents, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the velocity, and the text encoder's cross-entropy on the slots."""
        rng = np.random.default_rng((key[0], 2, key[1]))
        asked = ask(latents, BATCH, rng)
        ids = tokens(self.tokenizer, asked.captions)
        made = noised(latents.values[asked.rows].float(), key, rng)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            hidden = self.text_encoder(ids).last_hidden_state
            predicted = self.unet(made.values, made.timesteps, hidden).sample
        velocity = functional.mse_loss(predicted.float(), made.velocity)
        slot = slot_loss(self.heads, hidden, ids, asked, latents)
        return velocity + SLOT_WEIGHT * slot, {"velocity": velocity.item(), "slots": slot.item()}


@dataclass(frozen=True)
class Noised:
    """Latents at random times of the schedule, and the velocity that leads from the noise to them."""

    values: torch.Tensor
    timesteps: torch.Tensor
    velocity: torch.Tensor


def noised(clean: torch.Tensor, key: tuple[int, int], rng: np.random.Generator) -> Noised:
    """Noise of its own for every seed and step in `key`; the times come from `rng`."""
    generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.from_numpy(_timesteps(len(clean), rng))
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    signal, spread = alphas.sqrt(), (1 - alphas).sqrt()
    return Noised(signal * clean + spread * noise, timesteps, signal * noise - spread * clean)


def _timesteps(count: int, rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Even, with two in five from the band (sigma 2 to 20) in which layout and binding are decided."""
    even, band = rng.integers(0, 1000, count), rng.integers(450, 880, count)
    return np.where(rng.random(count) < 0.4, band, even)


def settings() -> dict[str, Any]:
    return {
        "batch": BATCH,
        "learning_rate": UNET_LEARNING_RATE,
        "text_encoder_learning_rate": TEXT_LEARNING_RATE,
        "empty_captions": EMPTY_SHARE,
        "slot_weight": SLOT_WEIGHT,
        "schedule": SCHEDULE,
    }
