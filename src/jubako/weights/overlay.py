"""Parts with an overlay: a denoiser that one file brings whole, and modules with a LoRA fused into them.

The overlay's content is part of the key, so the model below keeps its own untouched modules, and everything
that the overlay does not change is shared.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jubako.errors import UnusableWeights
from jubako.memory import out_of_memory
from jubako.weights.checkpoint import digest, tensors
from jubako.weights.parts import Part, beginning, bytes_in, identity, placed

__all__ = ["FusedPart", "WholeDenoiser", "injected", "touched_by_lora"]

# How the files of the trainers name a component: kohya's prefixes, then those of diffusers and peft.
_PREFIXES = {
    "unet": ("lora_unet_", "unet."),
    "transformer": ("lora_unet_", "lora_transformer_", "transformer."),
    "text_encoder": ("lora_te_", "lora_te1_", "text_encoder."),
    "text_encoder_2": ("lora_te2_", "text_encoder_2."),
}
_TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
_ADAPTER = "overlay"


@dataclass(frozen=True)
class WholeDenoiser:
    """A denoiser with the config of a folder and all its tensors from one file in diffusers' names."""

    name: str
    model: str
    folder: Path
    cls: type[Any]
    file: Path
    device: torch.device
    dtype: torch.dtype

    @property
    def key(self) -> Hashable:
        where = (str(self.dtype), str(self.device))
        return (*identity(self.cls, self.folder / self.name), *where, (digest(self.file),))

    @property
    def bytes(self) -> int:
        return bytes_in(tensors(self.file), self.dtype, self.cls)

    def read(self) -> torch.nn.Module:
        from accelerate import init_empty_weights  # type: ignore[import-untyped] # publishes no types
        from safetensors.torch import load_file

        tensors(self.file)
        # Without memory for parameters; what is computed at construction (buffers) is real.
        with init_empty_weights(include_buffers=False):
            denoiser = self.cls.from_config(self.cls.load_config(self.folder / self.name))
        state = {
            name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            for name, tensor in load_file(self.file).items()
        }
        try:
            denoiser.load_state_dict(state, strict=True, assign=True)
        except RuntimeError as error:
            raise UnusableWeights(
                f"{self.file}: this is no whole {self.name} for {self.model}: {beginning(error)}"
            ) from error
        return placed(denoiser, self.device)


@dataclass(frozen=True)
class FusedPart:
    """Another part with a LoRA added to its weights for good."""

    base: Part
    model: str
    pipeline: type[Any]
    file: Path

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def key(self) -> Hashable:
        return ("lora", self.base.key, digest(self.file))

    @property
    def bytes(self) -> int:
        return self.base.bytes

    def read(self) -> torch.nn.Module:
        module = self.base.read()
        try:
            _inject(self.pipeline, self.name, module, self.file)
            layers = _merge(module)
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UnusableWeights(
                f"{self.file}: this LoRA does not fit the {self.name} of {self.model}: {beginning(error)}"
            ) from error
        if not layers:
            raise UnusableWeights(f"{self.file} holds no LoRA for the {self.name} of {self.model}")
        return module.requires_grad_(requires_grad=False)


def touched_by_lora(file: Path, denoiser: str) -> tuple[str, ...]:
    """What a LoRA file changes: the denoiser always, a text encoder where the file has tensors for it."""
    names = tuple(tensors(file))
    named = [name for name in _TEXT_ENCODERS if any(key.startswith(_PREFIXES[name]) for key in names)]
    return (denoiser, *named)


def injected(pipeline: type[Any], name: str, module: Any, file: Path) -> dict[str, Any]:
    """The layers that a LoRA has for a module, by their names in it, as peft makes them of any file.

    The module may be without weights. Whatever the libraries raise says what does not fit.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    _inject(pipeline, name, module, file, low_cpu_mem_usage=True)
    return {path: layer for path, layer in module.named_modules() if isinstance(layer, BaseTunerLayer)}


def _inject(pipeline: type[Any], name: str, module: Any, file: Path, **kwargs: Any) -> None:
    """Put the LoRA's layers beside the module's own."""
    options = {"unet_config": module.config} if name == "unet" else {}
    state, *alphas, metadata = pipeline.lora_state_dict(
        str(file), use_safetensors=True, local_files_only=True, return_lora_metadata=True, **options
    )
    if not all("lora" in key for key in state):
        raise ValueError("some of its tensors are not those of a LoRA")
    if name == "transformer":
        pipeline.load_lora_into_transformer(state, module, adapter_name=_ADAPTER, metadata=metadata, **kwargs)
        return
    network_alphas = alphas[0] if alphas else None
    if name == "unet":
        pipeline.load_lora_into_unet(
            state, network_alphas, module, adapter_name=_ADAPTER, metadata=metadata, **kwargs
        )
    else:
        pipeline.load_lora_into_text_encoder(
            state,
            network_alphas,
            text_encoder=module,
            prefix=name,
            adapter_name=_ADAPTER,
            metadata=metadata,
            **kwargs,
        )


def _merge(module: Any) -> int:
    """Add each LoRA layer to the weights it belongs to and take the layers out again; how many there were."""
    from diffusers.utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in module.modules() if isinstance(layer, BaseTunerLayer)]
    for layer in layers:
        layer.merge(safe_merge=True)
    recurse_remove_peft_layers(module)
    if layers:
        del module.peft_config
        module._hf_peft_config_loaded = False  # noqa: SLF001 # the libraries' own mark of a module with adapters
    return len(layers)
