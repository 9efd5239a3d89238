"""SV3D_u, which diffusers has no pipeline for: its class, and its parts from the file that was published.

There the denoiser is Stable Video Diffusion's but for what it is told. The autoencoder is one of pictures and
lies in two places: what encodes with the conditioning, what decodes as the first stage.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableVideoDiffusionPipeline

from jubako.errors import UnusableWeights
from jubako.memory import out_of_memory
from jubako.weights.checkpoint import digest, tensors
from jubako.weights.parts import beginning, bytes_in, config_of, placed
from jubako.weights.siblings import DENOISER

__all__ = ["OriginalPart", "StableVideo3DPipeline", "original_name"]

_TOLD = f"{DENOISER}label_emb.0.0.weight"
_ENCODES = re.compile(r"conditioner\.embedders\.\d+\.encoder\.((?:encoder|quant_conv)\..+)")
_DECODES = re.compile(r"first_stage_model\.((?:decoder|post_quant_conv)\..+)")

_BEGINNINGS = {
    "conv_in.": "input_blocks.0.0.",
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_IN_BLOCKS = {
    "spatial_res_block.": "",
    "temporal_res_block.": "time_stack.",
    "temporal_transformer_blocks.": "time_stack.",
    "time_pos_embed.linear_1.": "time_pos_embed.0.",
    "time_pos_embed.linear_2.": "time_pos_embed.2.",
}
_IN_RESNETS = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


class StableVideo3DPipeline(StableVideoDiffusionPipeline):  # type: ignore[misc] # diffusers reaches mypy as Any
    """The components of Stable Video Diffusion, with an autoencoder of single pictures."""


@dataclass(frozen=True)
class OriginalPart:
    """The ``unet`` or the ``vae`` of the published file, over Stable Video Diffusion's configs."""

    name: str
    model: str
    folder: Path
    cls: type[Any]
    file: Path
    device: torch.device
    dtype: torch.dtype

    @property
    def key(self) -> Hashable:
        return ("sv3d", self.name, str(self.dtype), str(self.device), digest(self.file))

    @property
    def bytes(self) -> int:
        headers = tensors(self.file)
        return bytes_in({name: headers[name] for name in self._own(headers)}, self.dtype)

    def read(self) -> torch.nn.Module:
        from accelerate import init_empty_weights  # type: ignore[import-untyped] # publishes no types
        from safetensors import safe_open

        own = self._own(tensors(self.file))
        try:
            with safe_open(self.file, "pt", device=str(self.device)) as content:
                original = {short: content.get_tensor(name).to(self.dtype) for name, short in own.items()}
            with init_empty_weights(include_buffers=False):
                module = self._unet() if self.name == "unet" else self._vae(original)
            module.load_state_dict(self._renamed(module, original), strict=True, assign=True)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UnusableWeights(
                f"{self.file}: this is no SV3D_u with a {self.name} for {self.model}: {beginning(error)}"
            ) from error
        return placed(module, self.device)

    def _own(self, names: Mapping[str, Any]) -> Mapping[str, str]:
        """The file's names of this part's tensors, with what they are called within the part."""
        if self.name == "unet":
            return {name: name.removeprefix(DENOISER) for name in names if name.startswith(DENOISER)}
        found = {name: _ENCODES.fullmatch(name) or _DECODES.fullmatch(name) for name in names}
        return {name: match[1] for name, match in found.items() if match}

    def _unet(self) -> Any:
        told = tensors(self.file)[_TOLD].shape[1]
        config = self.cls.load_config(self.folder / self.name)
        return self.cls.from_config({**config, "projection_class_embeddings_input_dim": told})

    def _vae(self, original: Mapping[str, torch.Tensor]) -> Any:
        config = config_of(self.folder / self.name)
        kept = ("block_out_channels", "layers_per_block", "latent_channels", "scaling_factor", "force_upcast")
        levels = len(config["block_out_channels"])
        return AutoencoderKL(
            **{name: config[name] for name in kept if name in config},
            norm_num_groups=32,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            use_quant_conv="quant_conv.weight" in original,
            use_post_quant_conv="post_quant_conv.weight" in original,
        )

    def _renamed(self, module: Any, original: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The tensors under diffusers' names; KeyError for one that is not there."""
        if self.name == "unet":
            layers = module.config.layers_per_block
            deepest = _with_attention(module)
            return {name: original[original_name(name, layers, deepest)] for name in module.state_dict()}
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        prefixed = {f"first_stage_model.{name}": tensor for name, tensor in original.items()}
        renamed: Mapping[str, torch.Tensor] = convert_ldm_vae_checkpoint(prefixed, module.config)
        return renamed


def original_name(name: str, layers: int, attending: tuple[bool, ...]) -> str:
    """What a tensor of a ``UNetSpatioTemporalConditionModel`` was called by its authors.

    ``layers`` are those of each block, ``attending`` says which of the blocks upward have attention.
    """
    if match := _BLOCK.fullmatch(name):
        name = _place(match, layers, attending)
    in_resnet = "res_block." in name
    for parts in (_BEGINNINGS, _IN_BLOCKS):
        name = next(_replaced(name, parts), name)
    return next(_replaced(name, _IN_RESNETS), name) if in_resnet else name


def _place(match: re.Match[str], layers: int, attending: tuple[bool, ...]) -> str:
    """The name with its beginning replaced: there a block's layers and its change of size are blocks each."""
    way, block, kind, number, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    index = block * (layers + 1) + (number if kind in {"resnets", "attentions"} else layers)
    if kind == "downsamplers":
        return f"input_blocks.{1 + index}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{index}.{1 + attending[block]}.{rest}"
    where = f"input_blocks.{1 + index}" if way == "down" else f"output_blocks.{index}"
    return f"{where}.{'0' if kind == 'resnets' else '1'}.{rest}"


def _replaced(name: str, parts: Mapping[str, str]) -> Iterator[str]:
    """The name with the one of the parts that it has replaced, if it has one."""
    return (
        name[: match.start()] + new + name[match.end() :]
        for old, new in parts.items()
        if (match := re.search(rf"(^|(?<=\.)){re.escape(old)}", name))
    )


def _with_attention(unet: Any) -> tuple[bool, ...]:
    return tuple(hasattr(block, "attentions") for block in unet.up_blocks)
