"""Small random pipelines in the real layouts: the oracle and the engine run the same weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

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
    "sdxl": lambda: EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="leading"),
    "sdxl-turbo": lambda: EulerAncestralDiscreteScheduler(
        **SD_BETAS, timestep_spacing="trailing", steps_offset=1
    ),
    "sdxl-lightning": lambda: EulerDiscreteScheduler(**SD_BETAS, steps_offset=1, timestep_spacing="trailing"),
    "sdxl-lightning-1step": lambda: EulerDiscreteScheduler(
        **SD_BETAS, steps_offset=1, timestep_spacing="trailing", prediction_type="sample"
    ),
    "sd3": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: every letter is a token."""
    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789,.-'"]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5TokenizerFast:
    """A T5 tokenizer of single letters."""
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,.-'"
    pieces = ["<pad>", "</s>", "<unk>", "▁", *letters]
    return T5TokenizerFast(vocab=[(piece, -float(i)) for i, piece in enumerate(pieces)], extra_ids=0)


def text_encoder(words: CLIPTokenizer, kind: Any = CLIPTextModel, width: int = 32) -> Any:
    """A random CLIP text model of two layers."""
    config = CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return kind(config).eval()


def autoencoder(latent_channels: int = 4, **config: Any) -> AutoencoderKL:
    """A random autoencoder of factor 8."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=latent_channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=64,
        **config,
    ).eval()


def unet(cross_attention_dim: int, in_channels: int = 4, **config: Any) -> UNet2DConditionModel:
    """A random UNet of two levels."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(32, 64),
        layers_per_block=1,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    ).eval()


def sd_pipeline(
    kind: str = "sd1", seed: int = 0, in_channels: int = 4, **unet_config: Any
) -> StableDiffusionPipeline:
    """A random Stable Diffusion of 64x64 pixels with the scheduler of that kind; nine channels inpaint."""
    torch.manual_seed(seed)
    words = tokenizer()
    pipeline_class = StableDiffusionPipeline if in_channels == 4 else StableDiffusionInpaintPipeline
    pipeline = pipeline_class(
        text_encoder=text_encoder(words),
        tokenizer=words,
        unet=unet(32, in_channels, **unet_config),
        vae=autoencoder(),
        scheduler=SCHEDULERS[kind](),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sdxl_pipeline(kind: str = "sdxl", seed: int = 0, in_channels: int = 4) -> StableDiffusionXLPipeline:
    """A random Stable Diffusion XL of 64x64 pixels with the scheduler of that kind; nine channels inpaint."""
    torch.manual_seed(seed)
    words = tokenizer()
    first, second = text_encoder(words), text_encoder(words, CLIPTextModelWithProjection, 48)
    pipeline_class = StableDiffusionXLPipeline if in_channels == 4 else StableDiffusionXLInpaintPipeline
    pipeline = pipeline_class(
        text_encoder=first,
        tokenizer=words,
        text_encoder_2=second,
        tokenizer_2=words,
        unet=unet(32 + 48, in_channels, **_text_time(pooled=48, ids=6)),
        vae=autoencoder(),
        scheduler=SCHEDULERS[kind](),
        force_zeros_for_empty_prompt=True,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def refiner_pipeline(base: StableDiffusionXLPipeline, seed: int = 1) -> StableDiffusionXLImg2ImgPipeline:
    """A random refiner over the larger text encoder and the autoencoder of the base, as the real one is."""
    torch.manual_seed(seed)
    pipeline = StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=base.text_encoder_2,
        tokenizer_2=base.tokenizer_2,
        unet=unet(48, **_text_time(pooled=48, ids=5)),
        vae=base.vae,
        scheduler=SCHEDULERS["sdxl"](),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _text_time(pooled: int, ids: int) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": pooled + 8 * ids,
        "use_linear_projection": True,
    }


def sd3_pipeline(
    seed: int = 0, t5: bool = True, second: int = 32, dual: tuple[int, ...] = ()
) -> StableDiffusion3Pipeline:
    """A random Stable Diffusion 3 of 64x64 pixels, on wish without its T5 encoder.

    ``second`` is the width of its second text encoder, ``dual`` the blocks with two attentions (3.5 Medium).
    """
    torch.manual_seed(seed)
    words, pieces = tokenizer(), t5_tokenizer()
    width = 64
    t5_config = T5Config(
        vocab_size=len(pieces), d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=4, is_gated_act=True
    )
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=width,
        caption_projection_dim=32,
        pooled_projection_dim=32 + second,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
        dual_attention_layers=dual,
    )
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        vae=autoencoder(
            16, use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06, scaling_factor=1.5
        ),
        text_encoder=text_encoder(words, CLIPTextModelWithProjection),
        tokenizer=words,
        text_encoder_2=text_encoder(words, CLIPTextModelWithProjection, second),
        tokenizer_2=words,
        text_encoder_3=T5EncoderModel(t5_config).eval() if t5 else None,
        tokenizer_3=pieces if t5 else None,
        scheduler=SCHEDULERS["sd3"](),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
