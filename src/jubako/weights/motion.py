"""The denoiser of AnimateDiff: that of Stable Diffusion with motion modules from a file in it."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jubako.errors import UnusableWeights
from jubako.memory import out_of_memory
from jubako.weights.checkpoint import digest, tensors
from jubako.weights.parts import Part, beginning, bytes_in, config_of, placed

__all__ = ["MotionPart", "adapter_config"]


@dataclass(frozen=True)
class MotionPart:
    """A UNet of pictures made into one of clips. The model below keeps its own, untouched."""

    base: Part
    model: str
    file: Path
    device: torch.device
    dtype: torch.dtype

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def key(self) -> Hashable:
        return ("motion", self.base.key, digest(self.file), str(sorted(adapter_config(self.file).items())))

    @property
    def bytes(self) -> int:
        return self.base.bytes + bytes_in(tensors(self.file), self.dtype)

    def read(self) -> torch.nn.Module:
        from safetensors.torch import load_file

        config = adapter_config(self.file)
        state = self.base.read().state_dict()
        for name, tensor in load_file(self.file).items():
            state[name] = tensor.to(self.device, self.dtype)
        try:
            unet = self._empty(config)
            # Where a frame stands in the clip is computed at construction; some files hold it, too.
            for name, buffer in unet.named_buffers():
                state.setdefault(name, buffer.to(self.device, self.dtype))
            unet.load_state_dict(state, strict=True, assign=True)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UnusableWeights(
                f"{self.file}: these motion modules do not fit the {self.name} of {self.model}: "
                f"{beginning(error)}"
            ) from error
        return placed(unet, self.device)

    def _empty(self, config: Mapping[str, Any]) -> Any:
        """The UNet without memory for parameters; what is computed at construction (buffers) is real."""
        from accelerate import init_empty_weights  # type: ignore[import-untyped] # publishes no types
        from diffusers import MotionAdapter, UNetMotionModel

        base: Any = self.base
        with init_empty_weights(include_buffers=False):
            pictures = base.cls.from_config(base.cls.load_config(base.folder / self.name))
            return UNetMotionModel.from_unet2d(
                pictures, MotionAdapter.from_config(config), load_weights=False
            )


def adapter_config(file: Path) -> Mapping[str, Any]:
    """The config of a MotionAdapter: that beside its file, else what the names and shapes of tensors tell."""
    beside = config_of(file.parent)
    return beside if beside.get("_class_name") == "MotionAdapter" else _told_by_tensors(file)


def _told_by_tensors(file: Path) -> Mapping[str, Any]:
    """How many heads attend is told by no shape; all adapters that were published have eight."""
    shapes = {name: header.shape for name, header in tensors(file).items()}
    levels = _count(shapes, "down_blocks.")
    modules = [_count(shapes, f"down_blocks.{level}.motion_modules.") for level in range(levels)]
    if not all(modules) or not levels:
        raise UnusableWeights(f"{file} holds no motion modules")
    first = "down_blocks.0.motion_modules.0."
    places = shapes.get(f"{first}transformer_blocks.0.pos_embed.pe", (1, 32))
    return {
        "block_out_channels": [
            shapes[f"down_blocks.{level}.motion_modules.0.norm.weight"][0] for level in range(levels)
        ],
        "motion_layers_per_block": modules[0] if len(set(modules)) == 1 else modules,
        "motion_transformer_layers_per_block": _count(shapes, f"{first}transformer_blocks."),
        "motion_num_attention_heads": 8,
        "motion_max_seq_length": places[1],
        "use_motion_mid_block": any(name.startswith("mid_block.") for name in shapes),
    }


def _count(names: Mapping[str, Any], prefix: str) -> int:
    """How many numbers follow the prefix."""
    return len({name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix)})
