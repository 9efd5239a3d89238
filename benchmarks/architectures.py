"""Pipelines of known architectures with random weights, right for time, never for pictures; and as served."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from jubako.catalog import Model, load_catalog
from jubako.settings import load_settings

__all__ = ["ARCHITECTURES", "Architecture", "random_pipeline", "served_pipeline"]


@dataclass(frozen=True)
class Architecture:
    """The model of the catalog whose it is, its pipeline's class and what makes its components."""

    model: str
    pipeline: str
    components: Callable[[], dict[str, Any]]
    options: Mapping[str, Any] = field(default_factory=dict)
    on_cpu: bool = True


def _text_config(words: Any, width: int, layers: int, heads: int, **options: Any) -> Any:
    """CLIP's text model: the real vocabulary is a download, but any words' ids lie within the real table."""
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=49408,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
        **options,
    )


def _autoencoder(**options: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        **options,
    )


def _sd15() -> dict[str, Any]:
    """Stable Diffusion 1.5: the configs of its repository, 860 M parameters in the UNet."""
    from diffusers import PNDMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    from jubako.miniatures.tokenizer import new_tokenizer

    words = new_tokenizer()
    return {
        "tokenizer": words,
        "text_encoder": CLIPTextModel(_text_config(words, 768, 12, 12)),
        "unet": UNet2DConditionModel(
            sample_size=64,
            block_out_channels=(320, 640, 1280, 1280),
            layers_per_block=2,
            cross_attention_dim=768,
            attention_head_dim=8,
        ),
        "vae": _autoencoder(latent_channels=4, sample_size=512),
        "scheduler": PNDMScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            skip_prk_steps=True,
            steps_offset=1,
            set_alpha_to_one=False,
        ),
    }


def _sdxl() -> dict[str, Any]:
    """Stable Diffusion XL: the configs of its repository, 2.57 B parameters in the UNet."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    from jubako.miniatures.tokenizer import new_tokenizer

    words = new_tokenizer()
    return {
        "tokenizer": words,
        "tokenizer_2": words,
        "text_encoder": CLIPTextModel(_text_config(words, 768, 12, 12)),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(words, 1280, 32, 20, hidden_act="gelu")),
        "unet": UNet2DConditionModel(
            sample_size=128,
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            layers_per_block=2,
            cross_attention_dim=2048,
            attention_head_dim=(5, 10, 20),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ),
        "vae": _autoencoder(latent_channels=4, sample_size=1024, scaling_factor=0.13025),
        "scheduler": EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            steps_offset=1,
            timestep_spacing="leading",
        ),
    }


def _sd35_medium() -> dict[str, Any]:
    """Stable Diffusion 3.5 Medium without its T5, which runs once a prompt: 2.5 B in the transformer."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
    from transformers import CLIPTextModelWithProjection

    from jubako.miniatures.tokenizer import new_tokenizer

    words = new_tokenizer()
    return {
        "tokenizer": words,
        "tokenizer_2": words,
        "tokenizer_3": None,
        "text_encoder": CLIPTextModelWithProjection(_text_config(words, 768, 12, 12)),
        "text_encoder_2": CLIPTextModelWithProjection(_text_config(words, 1280, 32, 20, hidden_act="gelu")),
        "text_encoder_3": None,
        "transformer": SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        ),
        "vae": _autoencoder(
            latent_channels=16,
            sample_size=1024,
            scaling_factor=1.5305,
            shift_factor=0.0609,
            use_quant_conv=False,
            use_post_quant_conv=False,
        ),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
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


_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

ARCHITECTURES: Mapping[str, Architecture] = {
    "sd1.5": Architecture("sd1.5", "StableDiffusionPipeline", _sd15, _NO_CHECKER),
    "sdxl": Architecture(
        "sdxl", "StableDiffusionXLPipeline", _sdxl, {"add_watermarker": False}, on_cpu=False
    ),
    "sd3.5-medium": Architecture("sd3.5-medium", "StableDiffusion3Pipeline", _sd35_medium, on_cpu=False),
    "tiny": Architecture("tiny-sd", "StableDiffusionPipeline", _tiny, _NO_CHECKER),
}


def random_pipeline(
    architecture: Architecture,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    parts: Container[str] | None = None,
) -> Any:
    """A diffusers pipeline of this architecture with seeded random weights, made on the device.

    Of its modules it has only those that are named, where some are.
    """
    import diffusers
    from accelerate import init_empty_weights  # type: ignore[import-untyped] # it has no types

    # PyTorch's own initialization of billions of parameters takes longer than the benchmark's first figures.
    with init_empty_weights(include_buffers=False):
        components = architecture.components()
    generator = torch.Generator(device).manual_seed(seed)
    for name, component in components.items():
        if isinstance(component, torch.nn.Module) and parts is not None and name not in parts:
            components[name] = None
        elif isinstance(component, torch.nn.Module):
            _fill(component, device, dtype, generator)
            component.eval()
    pipeline = getattr(diffusers, architecture.pipeline)(**components, **architecture.options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def served_pipeline(model: Model) -> Any:
    """The model's own pipeline, as a family's process has it in memory."""
    from jubako.hardware import machine, require_device
    from jubako.probe import own_signals
    from jubako.weights.chooser import Chooser
    from jubako.weights.components import ComponentStore
    from jubako.weights.placement import resolve_dtype

    settings = load_settings()
    family = load_catalog(settings.catalog).families[model.family]
    here = machine(own_signals())
    device = torch.device(require_device(here, settings.device))
    chooser = Chooser(here, settings, device)
    choice = chooser.choose(model)
    dtype = resolve_dtype(choice.precision, model, device)
    store, runtime = ComponentStore(family.models), chooser.runtime(model, choice)
    return store.load(model, settings.home, device, dtype, runtime=runtime).pipeline


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
