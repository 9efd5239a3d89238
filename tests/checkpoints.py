"""A pipeline as one checkpoint in the layout of the original trainers, as it is shared most."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from checkpoints_sd3 import sd3_text_encoders, sd3_transformer

__all__ = ["original", "original_vae"]

State = dict[str, torch.Tensor]

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.": "ln_final.",
    "encoder.layers.": "transformer.resblocks.",
    ".layer_norm": ".ln_",
    ".self_attn.": ".attn.",
    ".mlp.fc1.": ".mlp.c_fc.",
    ".mlp.fc2.": ".mlp.c_proj.",
}


def original(pipeline: Any) -> State:
    """All weights of a pipeline of SD 1, 2 or 3, SDXL or its refiner under the names of their first releases.

    SD 2 is told from 1 by its UNet's linear projections. Its text encoder comes with what diffusers leaves
    out of it: a last block and a projection, which it never uses.
    """
    if (transformer := getattr(pipeline, "transformer", None)) is not None:
        denoiser, text = sd3_transformer(transformer), sd3_text_encoders(pipeline)
    else:
        denoiser, text = _renamed(pipeline.unet, _unet_name(pipeline.unet)), _text_encoders(pipeline)
    vae = original_vae(pipeline.vae)
    return (
        _prefixed("model.diffusion_model.", denoiser)
        | _prefixed("first_stage_model.", vae)
        | _prefixed("", text)
    )


def original_vae(vae: Any) -> State:
    """The weights of an autoencoder of pictures."""
    state = _renamed(vae, _vae_name(len(vae.config.block_out_channels)))
    # There the attention's layers are convolutions of one pixel.
    pixel = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight")
    return {
        name: tensor[:, :, None, None] if pixel.search(name) else tensor for name, tensor in state.items()
    }


def _text_encoders(pipeline: Any) -> State:
    first, second = pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)
    if second is None and pipeline.unet.config.use_linear_projection:
        state = _open_clip(first)
        width = first.config.hidden_size
        unused = {"text_projection": torch.ones(width, width), "logit_scale": torch.ones(())}
        for name, tensor in state.items():
            if name.startswith("transformer.resblocks.0."):
                unused[name.replace(".0.", ".23.", 1)] = torch.ones_like(tensor)
        return _prefixed("cond_stage_model.model.", state | unused)
    if second is None:
        return _prefixed("cond_stage_model.transformer.text_model.", _clip(first))
    if first is None:
        return _prefixed("conditioner.embedders.0.model.", _open_clip(second))
    clip = _prefixed("conditioner.embedders.0.transformer.text_model.", _clip(first))
    return clip | _prefixed("conditioner.embedders.1.model.", _open_clip(second))


def _prefixed(prefix: str, state: Mapping[str, torch.Tensor]) -> State:
    return {prefix + name: tensor.contiguous() for name, tensor in state.items()}


def _renamed(module: torch.nn.Module, rename: Callable[[str], str]) -> State:
    return {rename(name): tensor for name, tensor in module.state_dict().items()}


def _unet_name(unet: Any) -> Callable[[str], str]:
    layers = unet.config.layers_per_block

    def place(match: re.Match[str]) -> str:
        way, block, kind, number = match[1], int(match[2]), match[3], int(match[4])
        if way == "down":
            index = 1 + block * (layers + 1) + (layers if kind == "downsamplers" else number)
            return (
                f"input_blocks.{index}." + {"resnets": "0", "attentions": "1", "downsamplers": "0.op"}[kind]
            )
        index = block * (layers + 1) + (layers if kind == "upsamplers" else number)
        upsampler = "2" if hasattr(unet.up_blocks[block], "attentions") else "1"
        return f"output_blocks.{index}." + {"resnets": "0", "attentions": "1", "upsamplers": upsampler}[kind]

    def rename(name: str) -> str:
        in_resnet = ".resnets." in name
        name = re.sub(r"^(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)", place, name).replace(".op.conv.", ".op.")
        name = _replaced_start(name, _UNET)
        return _replaced_part(name, _RESNET) if in_resnet else name

    return rename


def _vae_name(levels: int) -> Callable[[str], str]:
    def rename(name: str) -> str:
        name = re.sub(r"up_blocks\.(\d)\.", lambda match: f"up.{levels - 1 - int(match[1])}.", name).replace(
            "down_blocks.", "down."
        )
        name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda match: f"mid.block_{int(match[1]) + 1}", name)
        if "mid_block.attentions.0" in name:
            return _replaced_part(name.replace("mid_block.attentions.0", "mid.attn_1"), _VAE_ATTENTION)
        return (
            name.replace(".resnets.", ".block.")
            .replace("conv_shortcut", "nin_shortcut")
            .replace("conv_norm_out", "norm_out")
        )

    return rename


def _replaced_start(name: str, names: Mapping[str, str]) -> str:
    old = next((old for old in names if name.startswith(f"{old}.")), "")
    return names[old] + name.removeprefix(old) if old else name


def _replaced_part(name: str, names: Mapping[str, str]) -> str:
    old = next((old for old in names if f".{old}." in name), "")
    return name.replace(f".{old}.", f".{names[old]}.") if old else name


def _clip(encoder: torch.nn.Module) -> State:
    return {name.removeprefix("text_model."): tensor for name, tensor in encoder.state_dict().items()}


def _open_clip(encoder: torch.nn.Module) -> State:
    state = _clip(encoder)
    projection = state.pop("text_projection.weight", None)
    result = {} if projection is None else {"text_projection": projection.T}
    for name in [name for name in state if ".q_proj." in name]:
        parts = [state.pop(name.replace(".q_proj.", f".{kind}_proj.")) for kind in "qkv"]
        state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
    for name, tensor in state.items():
        renamed = name
        for old, new in _OPEN_CLIP.items():
            renamed = renamed.replace(old, new)
        result[renamed] = tensor
    return result
