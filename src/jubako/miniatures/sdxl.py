"""The miniature of Stable Diffusion XL, grown out of tiny-sd.

SDXL reads the last state but one of both text encoders, without the final norm. A layer more puts tiny-sd's
last state there, and the norm's gain goes into the keys and values of the UNet. What is new starts at zero:
what the second encoder says, and what the pooled caption and the six numbers of the micro-conditioning add.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from jubako.miniatures.captions import Latents, ask, slot_loss
from jubako.miniatures.denoiser import BATCH, SCHEDULE, SHAPE, SLOT_WEIGHT, noised
from jubako.miniatures.text import SECOND_WIDTH, WIDTH, SlotHeads, deepened, second_text_encoder, tokens
from jubako.miniatures.training import Group

UNET_LEARNING_RATE = 5e-4
TEXT_LEARNING_RATE = 1e-4
NUMBERS_LEARNING_RATE = 3e-3
ZEROED_SHARE = 0.7  # of the empty captions are zeros, as without a negative prompt; the rest is encoded
_NUMBER_WIDTH = 32


def new_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        **SHAPE,
        cross_attention_dim=WIDTH + SECOND_WIDTH,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=_NUMBER_WIDTH,
        projection_class_embeddings_input_dim=6 * _NUMBER_WIDTH + SECOND_WIDTH,
    )


def new_scheduler() -> EulerDiscreteScheduler:
    return EulerDiscreteScheduler(**SCHEDULE, steps_offset=1)


class TinySDXL(nn.Module):
    """The parts of `tiny-sdxl` that are trained together, joined as the pipeline joins them."""

    def __init__(self, origin: StableDiffusionPipeline) -> None:
        super().__init__()
        self.tokenizer = origin.tokenizer
        self.text_encoder = deepened(origin.text_encoder, self.tokenizer, projected=False)
        self.text_encoder_2 = second_text_encoder(self.tokenizer)
        self.heads = SlotHeads()
        self.unet = new_unet()
        _grow(self.unet, origin)

    def groups(self) -> list[Group]:
        fresh = [self.unet, self.text_encoder_2, self.heads]
        return [
            Group([p for part in fresh for p in part.parameters()], UNET_LEARNING_RATE),
            Group(list(self.text_encoder.parameters()), TEXT_LEARNING_RATE),
        ]

    def framing_groups(self) -> list[Group]:
        """The UNet alone, its way in for the numbers fastest; the text encoders are held from here on."""
        for part in (self.text_encoder, self.text_encoder_2, self.heads):
            part.requires_grad_(False)
        numbers = set(self.unet.add_embedding.parameters())
        return [
            Group([p for p in self.unet.parameters() if p not in numbers], UNET_LEARNING_RATE),
            Group(list(self.unet.add_embedding.parameters()), NUMBERS_LEARNING_RATE),
        ]

    def embed(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States of both encoders (B x 77 x 192), the second's pooled ones (B x 64), the token numbers."""
        ids = tokens(self.tokenizer, captions)
        first = self.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        second = self.text_encoder_2(ids, output_hidden_states=True)
        return torch.cat([first, second.hidden_states[-2]], dim=-1), second.text_embeds, ids

    def losses(
        self, latents: Latents, time_ids: torch.Tensor, key: tuple[int, int]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the velocity, and the first encoder's cross-entropy on the slots."""
        rng = np.random.default_rng((key[0], 4, key[1]))
        asked = ask(latents, BATCH, rng)
        made = noised(latents.values[asked.rows].float(), key, rng)
        zeroed = [caption == "" and rng.random() < ZEROED_SHARE for caption in asked.captions]
        heard = 1 - torch.tensor(zeroed, dtype=torch.float32).unsqueeze(1)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states, pooled, ids = self.embed(asked.captions)
            added = {"text_embeds": pooled * heard, "time_ids": time_ids[asked.rows]}
            predicted = self.unet(
                made.values, made.timesteps, states * heard.unsqueeze(2), added_cond_kwargs=added
            ).sample
        velocity = functional.mse_loss(predicted.float(), made.velocity)
        slot = slot_loss(self.heads, states[:, :, :WIDTH], ids, asked, latents)
        return velocity + SLOT_WEIGHT * slot, {"velocity": velocity.item(), "slots": slot.item()}


@torch.no_grad()
def _grow(unet: UNet2DConditionModel, origin: StableDiffusionPipeline) -> None:
    """Give the UNet the weights of tiny-sd's, so that it starts by drawing what that draws."""
    old = origin.unet.state_dict()
    gain = _norm_gain(origin)
    for name, value in unet.state_dict().items():
        if name.endswith(("attn2.to_k.weight", "attn2.to_v.weight")):
            value.zero_()
            value[:, :WIDTH] = old[name] * gain
        elif name in old:
            value.copy_(old[name].view(value.shape))
    nn.init.zeros_(unet.add_embedding.linear_2.weight)
    nn.init.zeros_(unet.add_embedding.linear_2.bias)


def _norm_gain(origin: StableDiffusionPipeline) -> torch.Tensor:
    """What the text encoder's final norm multiplies by, given the spread of the padding after a caption."""
    ids = tokens(origin.tokenizer, ["a red circle on the left of a blue background"])
    states = origin.text_encoder(ids, output_hidden_states=True).hidden_states[-1]
    gain: torch.Tensor = origin.text_encoder.final_layer_norm.weight / states[0, 20:].std(-1).mean()
    return gain


def settings() -> dict[str, Any]:
    return {
        "batch": BATCH,
        "learning_rate": UNET_LEARNING_RATE,
        "text_encoder_learning_rate": TEXT_LEARNING_RATE,
        "numbers_learning_rate": NUMBERS_LEARNING_RATE,
        "zeroed_of_empty_captions": ZEROED_SHARE,
        "slot_weight": SLOT_WEIGHT,
        "schedule": SCHEDULE,
    }
