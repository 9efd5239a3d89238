"""An SV3D_u as the one file that was published, under its authors' names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from checkpoints import original_vae

__all__ = ["original_sv3d"]

State = dict[str, torch.Tensor]


def original_sv3d(unet: Any, vae: Any) -> State:
    """The denoiser, the autoencoder where it encodes and where it decodes, and some of what nobody reads."""
    state = {f"model.diffusion_model.{name}": tensor for name, tensor in _unet(unet)}
    for name, tensor in original_vae(vae).items():
        encodes = name.startswith(("encoder.", "quant_conv."))
        state["conditioner.embedders.1.encoder." * encodes + "first_stage_model." * (not encodes) + name] = (
            tensor
        )
    state["conditioner.embedders.0.open_clip.model.logit_scale"] = torch.ones(1)
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _unet(unet: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Block by block in the order of a forward, each with the next number."""
    yield from _of("input_blocks.0.0", unet.conv_in)
    number = 1
    for block in unet.down_blocks:
        for place, resnet in enumerate(block.resnets):
            yield from _layer(f"input_blocks.{number}", resnet, _attention(block, place))
            number += 1
        if block.downsamplers:
            yield from _of(f"input_blocks.{number}.0.op", block.downsamplers[0].conv)
            number += 1
    middle = unet.mid_block
    yield from _resnet("middle_block.0", middle.resnets[0])
    yield from _transformer("middle_block.1", middle.attentions[0])
    yield from _resnet("middle_block.2", middle.resnets[1])
    number = 0
    for block in unet.up_blocks:
        for place, resnet in enumerate(block.resnets):
            attention = _attention(block, place)
            yield from _layer(f"output_blocks.{number}", resnet, attention)
            if block.upsamplers and place == len(block.resnets) - 1:
                behind = 1 if attention is None else 2
                yield from _of(f"output_blocks.{number}.{behind}.conv", block.upsamplers[0].conv)
            number += 1
    yield from _of("time_embed.0", unet.time_embedding.linear_1)
    yield from _of("time_embed.2", unet.time_embedding.linear_2)
    yield from _of("label_emb.0.0", unet.add_embedding.linear_1)
    yield from _of("label_emb.0.2", unet.add_embedding.linear_2)
    yield from _of("out.0", unet.conv_norm_out)
    yield from _of("out.2", unet.conv_out)


def _attention(block: Any, place: int) -> Any:
    return block.attentions[place] if hasattr(block, "attentions") else None


def _layer(prefix: str, resnet: Any, attention: Any) -> Iterator[tuple[str, torch.Tensor]]:
    yield from _resnet(f"{prefix}.0", resnet)
    if attention is not None:
        yield from _transformer(f"{prefix}.1", attention)


def _resnet(prefix: str, resnet: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for where, part in (
        (prefix, resnet.spatial_res_block),
        (f"{prefix}.time_stack", resnet.temporal_res_block),
    ):
        yield from _of(f"{where}.in_layers.0", part.norm1)
        yield from _of(f"{where}.in_layers.2", part.conv1)
        yield from _of(f"{where}.emb_layers.1", part.time_emb_proj)
        yield from _of(f"{where}.out_layers.0", part.norm2)
        yield from _of(f"{where}.out_layers.3", part.conv2)
    if resnet.spatial_res_block.conv_shortcut is not None:
        yield from _of(f"{prefix}.skip_connection", resnet.spatial_res_block.conv_shortcut)
    yield from _of(f"{prefix}.time_mixer", resnet.time_mixer)


def _transformer(prefix: str, transformer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name in ("norm", "proj_in", "proj_out", "time_mixer", "transformer_blocks"):
        yield from _of(f"{prefix}.{name}", getattr(transformer, name))
    yield from _of(f"{prefix}.time_stack", transformer.temporal_transformer_blocks)
    yield from _of(f"{prefix}.time_pos_embed.0", transformer.time_pos_embed.linear_1)
    yield from _of(f"{prefix}.time_pos_embed.2", transformer.time_pos_embed.linear_2)


def _of(prefix: str, module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    return ((f"{prefix}.{name}", tensor) for name, tensor in module.state_dict().items())
