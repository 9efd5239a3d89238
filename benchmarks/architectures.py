"""Pipelines of known architectures with random weights: right for time, never for pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["ARCHITECTURES", "random_pipeline"]


def _sd15() -> dict[str, Any]:
    """Stable Diffusion 1.5: the configs of its repository, 860 M parameters in the UNet."""
    from diffusers import AutoencoderKL, PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from jubako.miniatures.tokenizer import new_tokenizer

    # The real vocabulary is a download; any words do for time, and their ids lie within the real table.
    words = new_tokenizer()
    text_encoder = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=768,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        projection_dim=768,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )
    return {
        "tokenizer": words,
        "text_encoder": CLIPTextModel(text_encoder),
        "unet": UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
            latent_channels=4,
            sample_size=512,
        ),
        "scheduler": PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
    }


def _tiny() -> dict[str, Any]:
    """The miniature that ships with the project."""
    from jubako.miniatures.autoencoder import new_autoencoder
    from jubako.miniatures.denoiser import new_unet
    from jubako.miniatures.export import new_scheduler
    from jubako.miniatures.text import new_text_encoder
    from jubako.miniatures.tokenizer import new_tokenizer

    words = new_tokenizer()
    return {
        "tokenizer": words,
        "text_encoder": new_text_encoder(words),
        "unet": new_unet(),
        "vae": new_autoencoder(),
        "scheduler": new_scheduler(),
    }


ARCHITECTURES: Mapping[str, Callable[[], dict[str, Any]]] = {"sd1.5": _sd15, "tiny": _tiny}


def random_pipeline(architecture: str, device: torch.device, dtype: torch.dtype, seed: int) -> Any:
    """A StableDiffusionPipeline of this architecture with seeded random weights, made on the device."""
    from accelerate import init_empty_weights  # type: ignore[import-untyped] # it has no types
    from diffusers import StableDiffusionPipeline

    # PyTorch's own initialization of 860 M parameters takes longer than the benchmark's first figures.
    with init_empty_weights(include_buffers=False):
        components = ARCHITECTURES[architecture]()
    generator = torch.Generator(device).manual_seed(seed)
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            _fill(component, device, dtype, generator)
            component.eval()
    pipeline = StableDiffusionPipeline(
        **components, safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def _fill(
    component: torch.nn.Module, device: torch.device, dtype: torch.dtype, generator: torch.Generator
) -> None:
    """Give every parameter values: matrices as PyTorch's layers draw them, norms one, biases zero."""
    for module in component.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            values = torch.empty(parameter.shape, device=device, dtype=dtype)
            if values.dim() > 1:
                bound = values[0].numel() ** -0.5
                values.uniform_(-bound, bound, generator=generator)
            else:
                values.fill_(float(name == "weight"))
            setattr(module, name, torch.nn.Parameter(values, requires_grad=False))
