"""Small random video pipelines in the real layouts: the oracle and the engine run the same weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLTemporalDecoder,
    DDIMScheduler,
    EulerDiscreteScheduler,
    MotionAdapter,
    StableVideoDiffusionPipeline,
    UNetSpatioTemporalConditionModel,
)
from pipelines import sd_pipeline
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from jubako.weights.sv3d import StableVideo3DPipeline

WIDTH = 32


def svd_scheduler() -> EulerDiscreteScheduler:
    """That of the real repositories."""
    return EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        interpolation_type="linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        steps_offset=1,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )


def image_encoder() -> CLIPVisionModelWithProjection:
    """A random CLIP vision model of 224 pixels in 16 patches."""
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=224,
        patch_size=56,
    )
    return CLIPVisionModelWithProjection(config).eval()


def video_unet(numbers: int = 3) -> UNetSpatioTemporalConditionModel:
    """A random UNet over space and time that is told so many numbers."""
    return UNetSpatioTemporalConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * numbers,
        layers_per_block=1,
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4),
        num_frames=5,
    ).eval()


def svd_pipeline(seed: int = 0, **vae: Any) -> StableVideoDiffusionPipeline:
    """A random Stable Video Diffusion of 64x64 pixels."""
    torch.manual_seed(seed)
    pipeline = StableVideoDiffusionPipeline(
        vae=AutoencoderKLTemporalDecoder(
            block_out_channels=(32, 32, 32, 32),
            down_block_types=("DownEncoderBlock2D",) * 4,
            layers_per_block=1,
            latent_channels=4,
            sample_size=64,
            **vae,
        ).eval(),
        image_encoder=image_encoder(),
        unet=video_unet(),
        scheduler=svd_scheduler(),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frame_autoencoder(**config: Any) -> AutoencoderKL:
    """A random autoencoder of pictures, of the sizes of :func:`svd_pipeline`'s."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        **config,
    ).eval()


def sv3d_pipeline(seed: int = 0) -> StableVideo3DPipeline:
    """A random SV3D_u of 64x64 pixels: an autoencoder of pictures, and one number that is told."""
    torch.manual_seed(seed)
    pipeline = StableVideo3DPipeline(
        vae=frame_autoencoder(),
        image_encoder=image_encoder(),
        unet=video_unet(numbers=1),
        scheduler=svd_scheduler(),
        feature_extractor=CLIPImageProcessor(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def motion_adapter(seed: int = 3, **config: Any) -> MotionAdapter:
    """Random motion modules for :func:`pipelines.sd_pipeline`."""
    torch.manual_seed(seed)
    small = {
        "block_out_channels": (32, 64),
        "motion_layers_per_block": 1,
        "motion_num_attention_heads": 8,
        "motion_norm_num_groups": 8,
        "motion_max_seq_length": 24,
        "use_motion_mid_block": False,
    }
    adapter = MotionAdapter(**small | config).eval()
    # diffusers begins with motion modules that change nothing.
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return adapter


def animatediff_pipeline(seed: int = 0) -> AnimateDiffPipeline:
    """A random AnimateDiff of 64x64 pixels over the small Stable Diffusion."""
    base = sd_pipeline(seed=seed)
    pipeline = AnimateDiffPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=base.unet,
        motion_adapter=motion_adapter(),
        scheduler=DDIMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="linear",
            steps_offset=1,
            clip_sample=False,
            set_alpha_to_one=False,
            timestep_spacing="linspace",
        ),
    )
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
