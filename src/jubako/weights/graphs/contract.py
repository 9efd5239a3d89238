"""What each vendor calls the inputs and outputs of its graphs, in the words of diffusers.

NVIDIA's names are those of the exporters in the demo of TensorRT, AMD's those of the converter that made its
repositories; that the published files keep to them was not checked on the files themselves, so everything
else (types, ranks, fixed dims) is read from each graph.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jubako.weight_sets import Slot, Vendor

__all__ = ["FLOATS", "INTEGERS", "RESIDUAL", "Contract", "Input", "contract"]

FLOATS = frozenset({"float32", "float16", "bfloat16"})
# The residual of a ControlNet, which NVIDIA's graphs of SD3.5 always take: zeros without one.
RESIDUAL = "block_controlnet_hidden_states"
INTEGERS = frozenset({"int32", "int64"})


@dataclass(frozen=True)
class Input:
    """An input: which types and ranks are known for it, and whether a graph may do without."""

    dtypes: frozenset[str]
    ranks: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True)
class Contract:
    """The inputs of one kind of graph and what its outputs are: both from the vendor's names to ours.

    ``outputs`` maps a pattern and a rank (0: any) to a name; a graph has at least one of them.
    """

    names: Mapping[str, str]
    inputs: Mapping[str, Input]
    outputs: tuple[tuple[str, int, str], ...]

    def output(self, name: str, rank: int) -> str | None:
        """What an output is, None when it is none that anybody reads."""
        for pattern, wanted, ours in self.outputs:
            if re.fullmatch(pattern, name) and wanted in {0, rank}:
                return name if ours == "=" else ours
        return None


_MANY = FLOATS | INTEGERS | {"float64"}
_TEXT = {
    "input_ids": Input(INTEGERS, (2,)),
    "attention_mask": Input(INTEGERS | FLOATS, (2,), optional=True),
}
_UNET = {
    "sample": Input(FLOATS, (4, 5)),
    "timestep": Input(_MANY, (0, 1)),
    "encoder_hidden_states": Input(FLOATS, (3,)),
    "text_embeds": Input(FLOATS, (2,), optional=True),
    "time_ids": Input(FLOATS, (2,), optional=True),
    "added_time_ids": Input(FLOATS, (2,), optional=True),
}
_TRANSFORMER = {
    "hidden_states": Input(FLOATS, (4,)),
    "encoder_hidden_states": Input(FLOATS, (3,)),
    "pooled_projections": Input(FLOATS, (2,)),
    "timestep": Input(_MANY, (0, 1)),
    RESIDUAL: Input(FLOATS, (4,), optional=True),
}
_INPUTS: Mapping[Slot, Mapping[str, Input]] = {
    "text_encoder": _TEXT,
    "text_encoder_2": _TEXT,
    "text_encoder_3": _TEXT,
    "unet": _UNET,
    "transformer": _TRANSFORMER,
    "vae_decoder": {"latent": Input(FLOATS, (4,))},
    "vae_encoder": {"images": Input(FLOATS, (4,))},
}
# Where a vendor's name is not ours.
_NAMES: Mapping[tuple[Vendor, Slot], Mapping[str, str]] = {
    ("amd", "vae_decoder"): {"latent_sample": "latent"},
    ("amd", "vae_encoder"): {"sample": "images"},
}
# NVIDIA calls the states of one encoder and the pooled vector of another the same; their ranks differ.
_NVIDIA_TEXT = (
    ("text_embeddings", 3, "last_hidden_state"),
    ("text_embeddings", 2, "text_embeds"),
    ("hidden_states", 3, "penultimate"),
)
_AMD_TEXT = (
    ("last_hidden_state", 3, "="),
    ("text_embeds", 2, "="),
    ("pooler_output", 2, "="),
    (r"hidden_states\.\d+", 3, "="),
)
_OUTPUTS: Mapping[tuple[Vendor, Slot], tuple[tuple[str, int, str], ...]] = {
    ("nvidia", "text_encoder"): _NVIDIA_TEXT,
    ("nvidia", "text_encoder_2"): _NVIDIA_TEXT,
    ("nvidia", "text_encoder_3"): _NVIDIA_TEXT,
    ("nvidia", "unet"): (("latent", 0, "prediction"),),
    ("nvidia", "transformer"): (("latent", 0, "prediction"),),
    ("nvidia", "vae_decoder"): (("images", 0, "="),),
    ("nvidia", "vae_encoder"): (("latent", 0, "="),),
    ("amd", "text_encoder"): _AMD_TEXT,
    ("amd", "text_encoder_2"): _AMD_TEXT,
    ("amd", "text_encoder_3"): _AMD_TEXT,
    ("amd", "unet"): (("out_sample", 0, "prediction"),),
    ("amd", "transformer"): (("out_sample", 0, "prediction"),),
    ("amd", "vae_decoder"): (("sample", 0, "images"),),
    ("amd", "vae_encoder"): (("latent_sample", 0, "latent"),),
}


def contract(layout: Vendor, slot: Slot) -> Contract:
    """What a vendor's graph in this place of a pipeline takes and gives."""
    inputs = _INPUTS[slot]
    renamed = _NAMES.get((layout, slot), {})
    names = {name: name for name in inputs if name not in renamed.values()}
    names.update(renamed)
    return Contract(MappingProxyType(names), MappingProxyType(dict(inputs)), _OUTPUTS[layout, slot])
