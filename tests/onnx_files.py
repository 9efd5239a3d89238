"""Small ONNX files made by hand, with whatever is to be refused in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

__all__ = ["save", "transformer", "unet", "with_data"]

Dims = Sequence[int | str]


def save(
    file: Path,
    nodes: Sequence[Any],
    inputs: Mapping[str, tuple[int, Dims]],
    outputs: Mapping[str, tuple[int, Dims]],
    weights: Sequence[Any] = (),
    *,
    opset: int = 18,
    domains: Mapping[str, int] | None = None,
) -> Path:
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info(name, *kind) for name, kind in inputs.items()],
        [helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items()],
        list(weights),
    )
    imports = [helper.make_opsetid(*each) for each in {"": opset, **(domains or {})}.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    file.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(file))
    return file


def unet(file: Path, **changes: Any) -> Path:
    """A UNet in NVIDIA's names that adds its timestep to its sample."""
    inputs: dict[str, Any] = {
        "sample": (TensorProto.FLOAT, ["2B", 4, "H", "W"]),
        "timestep": (TensorProto.FLOAT, ["2B"]),
        "encoder_hidden_states": (TensorProto.FLOAT, ["2B", 77, 8]),
    } | changes.pop("inputs", {})
    outputs = changes.pop("outputs", {"latent": (TensorProto.FLOAT, ["2B", 4, "H", "W"])})
    result = next(iter(outputs))
    nodes = changes.pop("nodes", None) or [
        helper.make_node("Unsqueeze", ["timestep", "axes"], ["times"]),
        helper.make_node("Add", ["sample", "times"], [result]),
    ]
    axes = helper.make_tensor("axes", TensorProto.INT64, [3], [1, 2, 3])
    kept = {name: kind for name, kind in inputs.items() if kind is not None}
    return save(file, nodes, kept, outputs, [axes], **changes)


def transformer(file: Path, residual: Dims) -> Path:
    """A transformer in NVIDIA's names that gives its latents back, plus the largest value of the residual."""
    kind: int = TensorProto.FLOAT
    nodes = [
        helper.make_node("ReduceMax", ["block_controlnet_hidden_states"], ["most"], keepdims=0),
        helper.make_node("Add", ["hidden_states", "most"], ["latent"]),
    ]
    inputs: dict[str, tuple[int, Dims]] = {
        "hidden_states": (kind, ["2B", 16, "H", "W"]),
        "encoder_hidden_states": (kind, ["2B", "tokens", 8]),
        "pooled_projections": (kind, ["2B", 8]),
        "timestep": (kind, ["2B"]),
        "block_controlnet_hidden_states": (kind, residual),
    }
    return save(file, nodes, inputs, {"latent": (kind, ["2B", 16, "H", "W"])})


def with_data(file: Path, location: str, *, length: int = 4096, place: Path | None = None) -> Path:
    """A UNet whose weights are said to lie at a location, and are written to a place if there is one."""
    weight = helper.make_tensor("scale", TensorProto.FLOAT, [1024], np.ones(1024, np.float32))
    del weight.float_data[:]
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    unet(file)
    model = onnx.load(str(file))
    model.graph.initializer.append(weight)
    onnx.save(model, str(file))
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(np.ones(1024, np.float32).tobytes())
    return file
