"""A LoRA's weights in memory: for each layer of a pipeline's modules two small matrices.

Files of diffusers, peft and kohya are read by the libraries themselves, into modules of the base's configs
that have no weights; the base is never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from jubako.errors import InvalidRequest, UnusableWeights
from jubako.memory import out_of_memory
from jubako.weights.overlay import injected, touched_by_lora
from jubako.weights.parts import beginning, construction

__all__ = ["Lora", "LoraLayer", "blank", "read_lora"]


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """What is added to a layer: ``up`` times ``down`` times its input.

    ``down`` is [rank, in] or, of a convolution, [rank, in, h, w]; ``up`` is [out, rank] and has the scale of
    the file's alpha in it.
    """

    down: torch.Tensor
    up: torch.Tensor

    @property
    def rank(self) -> int:
        """How many directions it adds."""
        return self.up.shape[1]


@dataclass(frozen=True, eq=False)
class Lora:
    """One adapter on a device: its layers by component, and by the layer's name in it."""

    name: str
    components: Mapping[str, Mapping[str, LoraLayer]]

    @property
    def bytes(self) -> int:
        """Memory of its matrices."""
        layers = [layer for layers in self.components.values() for layer in layers.values()]
        return sum(layer.down.nbytes + layer.up.nbytes for layer in layers)


def blank(module: Any) -> torch.nn.Module:
    """A module of the same class and config, whose parameters are all the same zero and take no memory.

    Without memory of any kind, on the meta device, peft would take adapters there too.
    """
    from accelerate import init_empty_weights  # type: ignore[import-untyped] # publishes no types

    kind = type(module)
    with init_empty_weights():
        empty = kind.from_config(module.config) if hasattr(kind, "from_config") else kind(module.config)
    for part in empty.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            zero = torch.zeros((), dtype=parameter.dtype).expand(parameter.shape)
            setattr(part, name, torch.nn.Parameter(zero, requires_grad=False))
    return empty  # type: ignore[no-any-return] # the libraries' classes have no types


def read_lora(name: str, file: Path, pipeline: Any, model: str) -> Lora:
    """A LoRA for a pipeline, on its device and in its modules' precision.

    InvalidRequest when the file is no LoRA, or one for another model, or has numbers that are none.
    """
    components = pipeline.components
    denoiser = "unet" if components.get("unet") is not None else "transformer"
    found: dict[str, Mapping[str, LoraLayer]] = {}
    try:
        for component in touched_by_lora(file, denoiser):
            if components.get(component) is not None:
                module = components[component]
                with construction:
                    layers = injected(type(pipeline), component, blank(module), file)
                # Asked for once: the libraries look through all modules for them.
                device, dtype = pipeline.device, module.dtype
                found[component] = {
                    path: _placed(f"{component}.{path}", layer, device, dtype)
                    for path, layer in layers.items()
                }
    except Exception as error:
        if out_of_memory(error):
            raise
        raise _refused(name, model, beginning(error)) from error
    if not any(found.values()):
        raise _refused(name, model, "it has no layers for it")
    return Lora(name, found)


def _placed(path: str, layer: Any, device: torch.device, dtype: torch.dtype) -> LoraLayer:
    """A layer as peft has it, its scale multiplied into it."""
    (adapter,) = layer.lora_A
    if layer.use_dora.get(adapter) or layer.lora_bias.get(adapter):
        raise UnusableWeights("it is of a kind (DoRA, or with biases) that is not served")
    down = layer.lora_A[adapter].weight.detach().to(dtype)
    up = (layer.lora_B[adapter].weight.detach().float().flatten(1) * layer.scaling[adapter]).to(dtype)
    # Before they are on a device, where each look would wait for the forwards that run there.
    if not (down.isfinite().all() and up.isfinite().all()):
        raise UnusableWeights(f"{path} has numbers that are not finite")
    return LoraLayer(down.to(device).contiguous(), up.to(device).contiguous())


def _refused(name: str, model: str, reason: str) -> InvalidRequest:
    return InvalidRequest(f"loras: {name} does not fit {model}: {reason}", param="loras")
