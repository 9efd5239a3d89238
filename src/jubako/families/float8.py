"""Linear layers in eight bits: float8 weights with a scale for each output, inputs with a scale for each row.

Lossy, and only where it is asked for. Which layers: the large ones in the transformer blocks of a denoiser
that work on the tokens of the latents. Not those of norms, not those of the text (keys and values of
cross-attention, SD3's text stream), not what leads into the blocks or out of them, no convolution.
"""

from __future__ import annotations

import torch
from torch.nn import functional

__all__ = ["Float8Linear", "float8_layers", "has_float8_matmul", "quantized", "to_float8"]

# The least width of an input or output that pays: quantizing costs one pass over the input.
LEAST = 512

# The matrix units take sides in multiples of this.
MULTIPLE = 16

_BLOCKS = "transformer_blocks"
_TEXT = {"to_added_qkv", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context"}
_CROSS = {"to_k", "to_v", "to_kv"}
_TINY = 1e-12


def float8_layers(denoiser: torch.nn.Module, least: int = LEAST) -> list[str]:
    """The names of the layers that ``to_float8`` replaces."""
    return [
        name
        for name, layer in denoiser.named_modules()
        if isinstance(layer, torch.nn.Linear)
        and min(layer.in_features, layer.out_features) >= least
        and layer.in_features % MULTIPLE == layer.out_features % MULTIPLE == 0
        and _takes_latents(denoiser, name)
    ]


def to_float8(denoiser: torch.nn.Module, least: int = LEAST) -> int:
    """Replace the large linear layers of the blocks; how many there were."""
    names = float8_layers(denoiser, least)
    for name in names:
        parent, _, child = name.rpartition(".")
        layer = denoiser.get_submodule(name)
        assert isinstance(layer, torch.nn.Linear)  # noqa: S101 # these are what was asked for
        setattr(denoiser.get_submodule(parent), child, Float8Linear(layer))
    return len(names)


class Float8Linear(torch.nn.Module):
    """A ``torch.nn.Linear`` with its weight in float8; the bias and what comes out keep their precision.

    Where the device has matrix units for float8 they are used, and what comes out is rounded to bfloat16;
    elsewhere the same rounded values are multiplied in float32, which takes longer than the layer did.
    """

    weight: torch.Tensor
    scale: torch.Tensor

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        device = linear.weight.device
        self.dtype = _float8_of(device)
        self.on_matrix_units = has_float8_matmul(device)
        weight, scale = quantized(linear.weight.detach(), self.dtype)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.bias = linear.bias
        self.train(linear.training)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """[…, in] to […, out]."""
        rows, scale = quantized(states.reshape(-1, self.in_features), self.dtype)
        if self.on_matrix_units:
            # Scales of rows go with bfloat16 results only.
            product: torch.Tensor = torch._scaled_mm(  # noqa: SLF001 # there is no public name in all versions we take
                rows,
                self.weight.t(),
                scale_a=scale,
                scale_b=self.scale.t(),
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        else:
            product = functional.linear(rows.float() * scale, self.weight.float() * self.scale)
        product = product.to(states.dtype)
        if self.bias is not None:
            product = product + self.bias
        return product.reshape(*states.shape[:-1], self.out_features)


def quantized(matrix: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """A matrix [n, width] in float8 and the scales [n, 1] that its rows have to be multiplied by."""
    most = torch.finfo(dtype).max
    values = matrix.float()
    scale = values.abs().amax(dim=1, keepdim=True).clamp(min=_TINY) / most
    return (values / scale).clamp(-most, most).to(dtype), scale


def has_float8_matmul(device: torch.device) -> bool:
    """Whether the device multiplies float8: NVIDIA from Ada on (8.9), AMD's gfx942 and gfx950."""
    if device.type != "cuda":
        return False
    if torch.version.hip:
        return _architecture(device) in {"gfx942", "gfx950"}
    return torch.cuda.get_device_capability(device) >= (8, 9)


def _float8_of(device: torch.device) -> torch.dtype:
    """The float8 that the device knows: gfx942 has one of its own, without a negative zero."""
    if device.type == "cuda" and torch.version.hip and _architecture(device) == "gfx942":
        return torch.float8_e4m3fnuz
    return torch.float8_e4m3fn


def _architecture(device: torch.device) -> str:
    name: str = torch.cuda.get_device_properties(device).gcnArchName
    return name.partition(":")[0]


def _takes_latents(denoiser: torch.nn.Module, name: str) -> bool:
    parts = name.split(".")
    if not any(part.endswith(_BLOCKS) for part in parts[:-1]):
        return False
    if any("norm" in part for part in parts) or _TEXT & set(parts):
        return False
    parent = denoiser.get_submodule(".".join(parts[:-1]))
    return not (parts[-1] in _CROSS and getattr(parent, "is_cross_attention", False))
