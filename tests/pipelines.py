"""Small random pipelines in the real layouts: the oracle and the engine run the same weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}

# The scheduler configs of the real repositories.
SCHEDULERS: dict[str, Any] = {
    "sd1": lambda: PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1, set_alpha_to_one=False),
    "sd2": lambda: DDIMScheduler(
        **SD_BETAS,
        prediction_type="v_prediction",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
    ),
    "sd-turbo": lambda: EulerDiscreteScheduler(
        **SD_BETAS, timestep_spacing="trailing", steps_offset=1, timestep_type="discrete"
    ),
}


def tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every letter is a token."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.-'"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def sd_pipeline(kind: str = "sd1", seed: int = 0) -> StableDiffusionPipeline:
    """A random StableDiffusionPipeline of 64x64 pixels with the scheduler of that kind of model."""
    torch.manual_seed(seed)
    words = tokenizer()
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            bos_token_id=words.bos_token_id,
            eos_token_id=words.eos_token_id,
            pad_token_id=words.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=words,
        unet=unet.eval(),
        scheduler=SCHEDULERS[kind](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
