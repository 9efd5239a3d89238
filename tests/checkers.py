"""Small random safety checkers in the true layout, whose thresholds decide what they flag."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor

__all__ = ["EVERYTHING", "NOTHING", "as_published", "one_of_two", "plain", "write_checker"]

# No cosine is below the one or above the other.
EVERYTHING, NOTHING = -2.0, 2.0

_SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def write_checker(folder: Path, threshold: float) -> Path:
    """One that flags everything, or nothing."""
    model, processor = _made()
    with torch.no_grad():
        model.concept_embeds_weights.fill_(threshold)
    return _written(folder, model, processor)


def one_of_two(folder: Path, flagged: Image.Image, other: Image.Image) -> Path:
    """One whose only concept in reach is what tells the one picture from the other."""
    model, processor = _made()
    with torch.no_grad():
        pixels = processor([flagged, other], return_tensors="pt").pixel_values
        one, two = torch.nn.functional.normalize(model.visual_projection(model.vision_model(pixels)[1]))
        model.concept_embeds_weights.fill_(NOTHING)
        model.concept_embeds[0] = one - two
        model.concept_embeds_weights[0] = 0.0
    return _written(folder, model, processor)


def as_published(folder: Path) -> None:
    """Give the weights the names that published files have, and the numbers that they store."""
    file = folder / "model.safetensors"
    weights = {
        name.replace("vision_model.", "vision_model.vision_model."): weight
        for name, weight in load_file(file).items()
    }
    weights["vision_model.vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(weights, file)


def _made() -> tuple[Any, Any]:
    torch.manual_seed(0)
    vision = {**_SMALL, "image_size": 32, "patch_size": 8, "projection_dim": 8}
    model = StableDiffusionSafetyChecker(
        CLIPConfig(vision_config=vision, text_config=dict(_SMALL), projection_dim=8)
    )
    with torch.no_grad():
        # As large as trained ones, so that pictures are told apart.
        for weight in model.vision_model.parameters():
            weight.mul_(10 if weight.ndim > 1 else 1)
        model.special_care_embeds_weights.fill_(NOTHING)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return model.eval(), processor


def _written(folder: Path, model: Any, processor: Any) -> Path:
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def plain(level: int, side: int = 64) -> Image.Image:
    """A picture with a gradient from this level on."""
    ramp = np.linspace(level, (level + 120) % 256, side).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(ramp[None, :, None], (side, side, 3)).copy())
