"""Graphs in bfloat16 made fit to run: a newer operator set for a GPU, float32 for ONNX Runtime's CPU.

ONNX Runtime checks types when it opens a graph. Operators such as Conv may take bfloat16 from operator set 22
on, and graphs exported for an older one are refused as they are; its CPU has no bfloat16 kernels at all. A
rewritten graph is checked against the original by shape inference, kept under the digest of its content, and
made once, however many processes ask for it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from filelock import FileLock

from jubako.disk import is_full, room_in
from jubako.errors import UnusableWeights
from jubako.weights.graphs.admission import Remedy
from jubako.weights.graphs.graph import Graph, nodes_of, read_graph, tensors_of, types_of, untyped_nodes

__all__ = ["rewritten"]

# From here on operators such as Conv may take bfloat16.
BFLOAT16_OPSET = 22
FILE = "model.onnx"
DATA = "model.onnx.data"


def rewritten(graph: Graph, remedy: Remedy, folder: Path) -> Graph:
    """The graph after the remedy, below a folder that keeps such graphs; UnusableWeights when it fails.

    DiskFull when the folder, which is in ``JUBAKO_HOME``, has no room for it.
    """
    kept = folder / sha256("".join((*graph.key, remedy)).encode()).hexdigest()[:32]
    with room_in("JUBAKO_HOME"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{kept}.lock"):
            if not (kept / FILE).is_file():
                _write(graph, remedy, kept)
    return read_graph(kept / FILE)


def _write(graph: Graph, remedy: Remedy, kept: Path) -> None:
    temporary = kept.with_name(f"{kept.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _REMEDIES[remedy](graph, temporary)
        _verify(graph, read_graph(temporary / FILE), remedy)
        for file in temporary.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())
        temporary.replace(kept)
    except UnusableWeights:
        raise
    except Exception as error:
        if is_full(error):
            raise
        raise UnusableWeights(f"{graph.file} could not be rewritten ({remedy}): {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_float32(graph: Graph, folder: Path) -> None:
    """Every bfloat16 tensor, type and cast becomes float32: the same values, in twice the room."""
    import onnx
    from onnx.external_data_helper import convert_model_to_external_data

    model = _whole(graph)
    for tensor in tensors_of(model.graph):
        if tensor.data_type == onnx.TensorProto.BFLOAT16:
            _widen(tensor)
    for node in nodes_of(model.graph):
        for attribute in node.attribute:
            if attribute.name in {"to", "dtype", "output_dtype"} and attribute.i == onnx.TensorProto.BFLOAT16:
                attribute.i = onnx.TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == onnx.TensorProto.BFLOAT16:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    # What was inferred of the types in between is inferred anew.
    del model.graph.value_info[:]
    convert_model_to_external_data(model, location=DATA, size_threshold=1024)
    onnx.save_model(model, str(folder / FILE))


def _to_opset22(graph: Graph, folder: Path) -> None:
    """The graph in operator set 22, beside a copy of its weights."""
    import onnx
    from onnx import version_converter

    model = onnx.load(str(graph.file), load_external_data=False)
    converted = version_converter.convert_version(model, max(graph.opset, BFLOAT16_OPSET))
    _cast_around(converted)
    onnx.save_model(converted, str(folder / FILE))
    for each in graph.data:
        place = folder / each.location
        place.parent.mkdir(parents=True, exist_ok=True)
        # No link, though weights are large: ONNX Runtime follows none out of a folder, and onnx refuses
        # whatever has a second name.
        shutil.copyfile(each.path(graph.file.parent).resolve(), place)


def _cast_around(model: Any) -> None:
    """Let what takes no bfloat16 in any operator set (Einsum) run in float32, between casts."""
    import onnx

    types = types_of(model)
    nodes = list(model.graph.node)
    stubborn = {id(node) for node in untyped_nodes(nodes, types, BFLOAT16_OPSET)}
    rewired = []
    for node in nodes:
        if id(node) not in stubborn:
            rewired.append(node)
            continue
        before, after = [], []
        for i, name in enumerate(node.input):
            if types.get(name) == onnx.TensorProto.BFLOAT16:
                node.input[i] = f"{name}/{len(rewired)}/float32"
                before.append(_cast(name, node.input[i], onnx.TensorProto.FLOAT))
        for i, name in enumerate(node.output):
            if types.get(name) == onnx.TensorProto.BFLOAT16:
                node.output[i] = f"{name}/float32"
                after.append(_cast(node.output[i], name, onnx.TensorProto.BFLOAT16))
        rewired += [*before, node, *after]
    del model.graph.node[:]
    model.graph.node.extend(rewired)


def _cast(source: str, result: str, to: int) -> Any:
    import onnx

    return onnx.helper.make_node("Cast", [source], [result], name=f"{result}/Cast", to=to)


_REMEDIES: Mapping[Remedy, Callable[[Graph, Path], None]] = {"float32": _to_float32, "opset22": _to_opset22}


def _verify(before: Graph, after: Graph, remedy: Remedy) -> None:
    """Whether the same goes in and comes out, and the types now fit together everywhere."""
    import onnx

    wanted = {"bfloat16": "float32"} if remedy == "float32" else {}
    for name in ("inputs", "outputs"):
        had = [(port.name, wanted.get(port.dtype, port.dtype), port.rank) for port in getattr(before, name)]
        has = [(port.name, port.dtype, port.rank) for port in getattr(after, name)]
        if had != has:
            raise UnusableWeights(f"{before.file}: rewriting ({remedy}) changed its {name}: {had} to {has}")
    if after.untyped or (remedy == "float32" and after.has_bfloat16):
        raise UnusableWeights(f"{before.file}: after rewriting ({remedy}) bfloat16 is still in the way")
    model = onnx.load(str(after.file), load_external_data=False)
    inferred = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    original = onnx.shape_inference.infer_shapes(onnx.load(str(before.file), load_external_data=False))
    if _shapes(original) != _shapes(inferred):
        raise UnusableWeights(f"{before.file}: rewriting ({remedy}) changed the shape of an output")


def _shapes(model: Any) -> list[tuple[str, list[int | str]]]:
    outputs = model.graph.output
    return [
        (value.name, [dim.dim_value or dim.dim_param for dim in value.type.tensor_type.shape.dim])
        for value in outputs
    ]


def _whole(graph: Graph) -> Any:
    """The graph with its weights. The library refuses links, of which the Hugging Face cache is made."""
    import onnx

    model = onnx.load(str(graph.file), load_external_data=False)
    paths = {each.location: each.path(graph.file.parent).resolve() for each in graph.data}
    for tensor in tensors_of(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        with paths[told["location"]].open("rb") as weights:
            weights.seek(int(told.get("offset", 0)))
            tensor.raw_data = weights.read(int(told["length"]))
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return model


def _widen(tensor: Any) -> None:
    import numpy as np
    import onnx

    if tensor.HasField("raw_data"):
        words = np.frombuffer(tensor.raw_data, dtype="<u2")
    else:
        words = np.asarray(tensor.int32_data, dtype=np.uint16)
        del tensor.int32_data[:]
    # A bfloat16 is the upper half of the float32 of the same value.
    tensor.raw_data = (words.astype("<u4") << 16).tobytes()
    tensor.data_type = onnx.TensorProto.FLOAT
