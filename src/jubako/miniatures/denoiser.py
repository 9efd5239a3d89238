"""The denoiser: a UNet trained jointly with the text encoder on cached latents, predicting velocity.

The noise schedule ends at a signal-to-noise ratio of practically zero (sigma 62) without any special flag, so
that backgrounds follow the prompt and every stock scheduler runs on the stock config.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer

from jubako.miniatures.dataset import Drawn
from jubako.miniatures.text import WIDTH, SlotHeads, Slots, slots, spoken, tokens
from jubako.miniatures.training import (
    Average,
    Budget,
    Progress,
    Record,
    learning_rate,
    load_checkpoint,
    save_checkpoint,
)

BATCH = 48
UNET_LEARNING_RATE = 1e-3
TEXT_LEARNING_RATE = 3e-4
EMPTY_SHARE = 0.1
SLOT_WEIGHT = 0.02
CHECKPOINT_EVERY = 250
WATCH_EVERY = 1000
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
}


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(64, 128),
        layers_per_block=(1, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
        attention_head_dim=4,  # the number of heads, by diffusers' old misnomer
    )


@dataclass
class Denoiser:
    """The parts trained together; `step` counts the joint steps."""

    unet: UNet2DConditionModel
    text_encoder: CLIPTextModel
    heads: SlotHeads
    step: int = 0

    def module(self) -> torch.nn.ModuleList:
        return torch.nn.ModuleList([self.unet, self.text_encoder, self.heads])


@dataclass(frozen=True)
class Latents:
    """Everything the joint training draws from: scaled latents (N x 4 x 16 x 16, float16), scenes, slots."""

    values: torch.Tensor
    data: Drawn
    slots: Slots

    @staticmethod
    def of(values: torch.Tensor, data: Drawn) -> Latents:
        return Latents(values, data, slots(data.layouts))


def train_denoiser(
    model: Denoiser,
    tokenizer: CLIPTokenizer,
    latents: Latents,
    *,
    budget: Budget,
    seed: int,
    checkpoint: Path,
    watch: Callable[[Denoiser, Average], None],
) -> Record:
    """Train until the budget is spent and leave the averaged weights in `model`; resumes from `checkpoint`.

    `watch` is called every thousand steps with the model and its average.
    """
    modules = model.module()
    textual = [*model.text_encoder.parameters(), *model.heads.parameters()]
    optimizer = torch.optim.AdamW(
        [
            {"params": list(model.unet.parameters()), "peak": UNET_LEARNING_RATE},
            {"params": textual, "peak": TEXT_LEARNING_RATE},
        ],
        betas=(0.9, 0.99),
        weight_decay=0.01,
    )
    average, progress = Average(modules), Progress("denoiser", budget)
    if state := load_checkpoint(checkpoint):
        modules.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values, model.step = state["average"], progress.resume(state)
    alphas = DDIMScheduler(**SCHEDULE).alphas_cumprod
    while budget.progress(model.step) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(group["peak"], model.step, budget.progress(model.step))
        velocity, slot = _losses(model, tokenizer, latents, alphas, seed)
        optimizer.zero_grad(set_to_none=True)
        with sdpa_kernel(SDPBackend.MATH):
            (velocity + SLOT_WEIGHT * slot).backward()
        torch.nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        average.update(modules, model.step)
        model.step += 1
        progress.report(model.step, (("velocity", velocity.item()), ("slots", slot.item())))
        done = budget.progress(model.step) >= 1
        if model.step % CHECKPOINT_EVERY == 0 or done:
            state = {
                "model": modules.state_dict(),
                "optimizer": optimizer.state_dict(),
                "average": average.values,
            }
            save_checkpoint(checkpoint, state | progress.state(model.step))
        if model.step % WATCH_EVERY == 0 and not done:
            watch(model, average)
    average.copy_to(modules)
    return progress.record(model.step)


def _losses(
    model: Denoiser, tokenizer: CLIPTokenizer, latents: Latents, alphas: torch.Tensor, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared error of the velocity, and the text encoder's cross-entropy on the slots."""
    rng = np.random.default_rng((seed, 2, model.step))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + model.step)
    rows = rng.integers(0, len(latents.values), BATCH)
    empty = rng.random(BATCH) < EMPTY_SHARE
    captions = ["" if e else spoken(latents.data.scenes[i], rng) for i, e in zip(rows, empty, strict=True)]
    ids = tokens(tokenizer, captions)
    clean = latents.values[rows].float()
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.from_numpy(_timesteps(rng))
    signal = alphas[timesteps].sqrt().view(-1, 1, 1, 1)
    spread = (1 - alphas[timesteps]).sqrt().view(-1, 1, 1, 1)
    with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
        hidden = model.text_encoder(ids).last_hidden_state
        predicted = model.unet(signal * clean + spread * noise, timesteps, hidden).sample
    velocity = functional.mse_loss(predicted.float(), signal * noise - spread * clean)
    said = torch.from_numpy(np.flatnonzero(~empty))
    target = latents.slots.rows(torch.from_numpy(rows)[said])
    slot = model.heads.loss(hidden[said].float(), ids[said], int(tokenizer.eos_token_id), target)
    return velocity, slot


def _timesteps(rng: np.random.Generator) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Even, with two in five from the band (sigma 2 to 20) in which layout and binding are decided."""
    even, band = rng.integers(0, 1000, BATCH), rng.integers(450, 880, BATCH)
    return np.where(rng.random(BATCH) < 0.4, band, even)
