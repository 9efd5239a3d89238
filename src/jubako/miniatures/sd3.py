"""The miniature of Stable Diffusion 3: a small MMDiT on 16-channel latents, three text encoders.

It learns rectified flow. The first text encoder starts as tiny-sd's, which already says what stands where.
The T5's states are zeros for part of the captions, because the pipeline feeds zeros when it is dropped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from jubako.miniatures.captions import Latents, ask, slot_loss
from jubako.miniatures.text import SECOND_WIDTH, WIDTH, SlotHeads, deepened, second_text_encoder, tokens
from jubako.miniatures.training import Group

LENGTH = 32  # of every tokenizer; the longest decorated caption has 27 tokens
BATCH = 48
LEARNING_RATE = 1e-3
TEXT_LEARNING_RATE = 3e-4
DROPPED_SHARE = 0.35  # of the captions go without T5
SLOT_WEIGHT = 0.02
SHIFT = 3.0
# Layout is decided in the noisy half, hence a mean above 0 in the logit.
LOGIT_MEAN, LOGIT_SPREAD, EVEN_SHARE = 0.8, 1.1, 0.2
_JOINT_WIDTH = WIDTH + SECOND_WIDTH


def new_transformer() -> SD3Transformer2DModel:
    """All modulations start at zero, so that every block starts as the identity."""
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        num_attention_heads=5,
        attention_head_dim=32,
        caption_projection_dim=160,
        joint_attention_dim=_JOINT_WIDTH,
        pooled_projection_dim=_JOINT_WIDTH,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            if name.endswith((".linear", "proj_out")):
                nn.init.zeros_(module.weight)
            else:
                nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=_JOINT_WIDTH,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return T5EncoderModel(config)


def new_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


class TinySD3(nn.Module):
    """The parts trained together, and how the pipeline joins the three encoders' states."""

    def __init__(self, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, tokenizer_3: T5Tokenizer) -> None:
        super().__init__()
        self.transformer = new_transformer()
        self.text_encoder = deepened(encoder, tokenizer, projected=True)
        self.text_encoder_2 = second_text_encoder(tokenizer)
        self.text_encoder_3 = new_t5(tokenizer_3)
        self.heads = SlotHeads()
        self.tokenizer, self.tokenizer_3 = tokenizer, tokenizer_3

    def groups(self) -> list[Group]:
        textual = [self.text_encoder, self.text_encoder_2, self.text_encoder_3, self.heads]
        inner = {
            name: parameter
            for name, parameter in self.transformer.transformer_blocks.named_parameters()
            if parameter.ndim == 2 and "norm" not in name
        }
        chosen = {id(parameter) for parameter in inner.values()}
        return [
            Group(list(inner.values()), LEARNING_RATE, orthogonal=True),
            Group([p for p in self.transformer.parameters() if id(p) not in chosen], LEARNING_RATE),
            Group([p for part in textual for p in part.parameters()], TEXT_LEARNING_RATE),
        ]

    def embed(
        self, captions: list[str], with_t5: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """States of all encoders (B x 64 x 192), pooled (B x 192), and the token numbers of the first."""
        ids = tokens(self.tokenizer, captions, LENGTH)
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids, output_hidden_states=True)
        third = self.text_encoder_3(tokens(self.tokenizer_3, captions, LENGTH)).last_hidden_state
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        states = torch.cat([clip, third * with_t5.view(-1, 1, 1)], dim=1)
        return states, torch.cat([first.text_embeds, second.text_embeds], dim=-1), ids

    def losses(self, latents: Latents, key: tuple[int, int]) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean squared error of the velocity, and the first encoder's cross-entropy on the slots."""
        rng = np.random.default_rng((key[0], 3, key[1]))
        generator = torch.Generator().manual_seed(key[0] * 1_000_003 + key[1])
        asked = ask(latents, BATCH, rng)
        clean = latents.values[asked.rows].float()
        noise = torch.randn(clean.shape, generator=generator)
        share = _noise_shares(rng)
        with_t5 = torch.from_numpy((rng.random(BATCH) >= DROPPED_SHARE).astype(np.float32))
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            states, pooled, ids = self.embed(asked.captions, with_t5)
            predicted = self.transformer(
                hidden_states=torch.lerp(clean, noise, share.view(-1, 1, 1, 1)),
                timestep=share * 1000,
                encoder_hidden_states=states,
                pooled_projections=pooled,
            ).sample
        flow = functional.mse_loss(predicted.float(), noise - clean)
        slot = slot_loss(self.heads, states[:, :LENGTH, :WIDTH], ids, asked, latents)
        return flow + SLOT_WEIGHT * slot, {"flow": flow.item(), "slots": slot.item()}


def _noise_shares(rng: np.random.Generator) -> torch.Tensor:
    """Logit-normal shares of noise, some spread evenly."""
    shares = 1 / (1 + np.exp(-rng.normal(LOGIT_MEAN, LOGIT_SPREAD, BATCH)))
    shares = np.where(rng.random(BATCH) < EVEN_SHARE, rng.random(BATCH), shares)
    return torch.from_numpy(shares.astype(np.float32))


def settings() -> dict[str, Any]:
    return {
        "batch": BATCH,
        "learning_rate": LEARNING_RATE,
        "text_encoders_learning_rate": TEXT_LEARNING_RATE,
        "captions_without_t5": DROPPED_SHARE,
        "slot_weight": SLOT_WEIGHT,
        "noise": {"logit_mean": LOGIT_MEAN, "logit_spread": LOGIT_SPREAD, "even_share": EVEN_SHARE},
        "shift": SHIFT,
    }
