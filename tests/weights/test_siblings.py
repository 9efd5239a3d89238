"""Which model's configs a checkpoint of a real size is read with; only its header is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints_sd3 import sd3_transformer
from diffusers import SD3Transformer2DModel, UNet2DConditionModel
from entries import entry

from jubako.catalog import load_catalog
from jubako.weights.siblings import siblings


def _sd3_config(blocks: int, positions: int, **config: Any) -> dict[str, Any]:
    return {
        "num_layers": blocks,
        "num_attention_heads": blocks,
        "caption_projection_dim": 64 * blocks,
        "pos_embed_max_size": positions,
        "attention_head_dim": 64,
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        **config,
    }


SDXL_UNET = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
REFINER_UNET = {
    **SDXL_UNET,
    "block_out_channels": (384, 768, 1536, 1536),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": 4,
    "attention_head_dim": (6, 12, 24, 24),
    "cross_attention_dim": 1280,
    "projection_class_embeddings_input_dim": 2560,
}


@pytest.mark.parametrize(
    ("family", "name", "config"),
    [
        ("sd", "sd1.4", {"cross_attention_dim": 768}),
        ("sd", "sd2", {"cross_attention_dim": 1024, "use_linear_projection": True}),
        ("sdxl", "sdxl", SDXL_UNET),
        ("sdxl", "sdxl-refiner", REFINER_UNET),
        ("sd3", "sd3-medium", _sd3_config(24, 192)),
        (
            "sd3",
            "sd3.5-medium",
            _sd3_config(24, 384, qk_norm="rms_norm", dual_attention_layers=tuple(range(13))),
        ),
        ("sd3", "sd3.5-large", _sd3_config(38, 192, qk_norm="rms_norm")),
    ],
)
def test_the_real_sizes_find_their_configs(
    tmp_path: Path, family: str, name: str, config: dict[str, Any]
) -> None:
    """A file of SD 3 holds the table of positions too, which is no parameter: up to a tenth more numbers."""
    with torch.device("meta"):
        if family == "sd3":
            state = sd3_transformer(SD3Transformer2DModel(**config))
        else:
            state = UNet2DConditionModel(sample_size=64, **config).state_dict()
    header = {
        f"model.diffusion_model.{each}": {"dtype": "F16", "shape": [*tensor.shape], "data_offsets": [0, 0]}
        for each, tensor in state.items()
    }
    text = json.dumps(header).encode()
    (tmp_path / "header.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    fitting = siblings(
        entry("mine", name, file=tmp_path / "header.safetensors"), load_catalog().families[family].models
    )
    assert fitting[0].name == name
