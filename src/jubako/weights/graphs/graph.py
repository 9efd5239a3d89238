"""What an ONNX file tells of itself before its gigabytes are read: inputs, outputs, operators, data files.

Only the graph is parsed, never its external data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from jubako.errors import UnusableWeights
from jubako.weights.checkpoint import digest

__all__ = [
    "BFLOAT16",
    "DataFile",
    "Graph",
    "Port",
    "nodes_of",
    "read_graph",
    "tensors_of",
    "types_of",
    "untyped_nodes",
]

BFLOAT16 = "bfloat16"


@dataclass(frozen=True)
class Port:
    """An input or output: its name, its type in NumPy's words, its dims; those that may vary are names."""

    name: str
    dtype: str
    dims: tuple[int | str, ...]

    @property
    def rank(self) -> int:
        """How many dims it has; 0 is a single number."""
        return len(self.dims)

    def __str__(self) -> str:
        """As in ``sample: float16[2B, 4, H, W]``."""
        return f"{self.name}: {self.dtype}[{', '.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class DataFile:
    """A file of weights beside the graph, by the place that the graph names, and how many bytes it needs."""

    location: str
    bytes: int

    def path(self, folder: Path) -> Path:
        """Where it lies; UnusableWeights when that is not below the folder, or is missing or too short.

        In the Hugging Face cache files are links to blobs of the same repository, which are no way out.
        """
        parts = (PurePosixPath(self.location), PureWindowsPath(self.location))
        if any(part.is_absolute() or part.drive or ".." in part.parts for part in parts):
            raise UnusableWeights(
                f"{folder}: the graph's data file {self.location!r} lies outside its folder"
            )
        path = folder / self.location
        inside = (folder.resolve(), *(parent.parent / "blobs" for parent in _snapshots(folder)))
        if not any(path.resolve().is_relative_to(each) for each in inside):
            raise UnusableWeights(
                f"{folder}: the graph's data file {self.location!r} leads outside its folder"
            )
        if not path.is_file():
            raise UnusableWeights(f"{path} is missing, which holds weights of the graph beside it")
        if (size := path.stat().st_size) < self.bytes:
            raise UnusableWeights(
                f"{path} was cut off: it has {size} bytes, and the graph needs {self.bytes}"
            )
        return path


@dataclass(frozen=True)
class Graph:
    """One ONNX file. ``operators`` are (domain, name); ``untyped`` are those of them that take a bfloat16
    tensor which their version of the operator set does not allow them.
    """

    file: Path
    opset: int
    domains: tuple[str, ...]
    operators: frozenset[tuple[str, str]]
    untyped: frozenset[str]
    has_bfloat16: bool
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    data: tuple[DataFile, ...]

    @property
    def data_paths(self) -> tuple[Path, ...]:
        """The files of weights; UnusableWeights as :meth:`DataFile.path`."""
        return tuple(each.path(self.file.parent) for each in self.data)

    @property
    def bytes(self) -> int:
        """Size on disk of the graph and its weights, about what it takes in memory."""
        return sum(path.stat().st_size for path in (self.file, *self.data_paths))

    @property
    def key(self) -> tuple[str, ...]:
        """The content of the graph and of its weights, as SHA-256."""
        return tuple(digest(path) for path in (self.file, *self.data_paths))


def read_graph(file: Path) -> Graph:
    """The graph of a file; UnusableWeights when it is none."""
    try:
        status = file.stat()
    except OSError as error:
        raise UnusableWeights(f"{file} can't be read: {error.strerror}") from error
    return _read(file, status.st_size, status.st_mtime_ns)


@lru_cache(64)
def _read(file: Path, size: int, mtime_ns: int) -> Graph:  # noqa: ARG001 # they tell one state from the next
    import onnx

    try:
        model = onnx.load(str(file), load_external_data=False)
    except Exception as error:
        raise UnusableWeights(f"{file} is no ONNX graph, or a torn one") from error
    if not model.graph.output:
        raise UnusableWeights(f"{file} is no ONNX graph, or a torn one")
    weights = {tensor.name for tensor in model.graph.initializer}
    versions = {entry.domain or "ai.onnx": entry.version for entry in model.opset_import}
    types = types_of(model)
    nodes = list(nodes_of(model.graph))
    return Graph(
        file=file,
        opset=versions.get("ai.onnx", 0),
        domains=tuple(sorted(versions)),
        operators=frozenset((node.domain or "ai.onnx", node.op_type) for node in nodes),
        untyped=frozenset(node.op_type for node in untyped_nodes(nodes, types, versions.get("ai.onnx", 0))),
        has_bfloat16=onnx.TensorProto.BFLOAT16 in types.values(),
        inputs=tuple(_port(value) for value in model.graph.input if value.name not in weights),
        outputs=tuple(_port(value) for value in model.graph.output),
        data=tuple(DataFile(location, end) for location, end in _data(model).items()),
    )


def nodes_of(graph: Any) -> Iterator[Any]:
    """The nodes of an ONNX graph and of the graphs within its nodes."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from nodes_of(inner)


def tensors_of(graph: Any) -> Iterator[Any]:
    """The tensors of an ONNX graph: weights and constants."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from tensors_of(inner)


def _port(value: Any) -> Port:
    import onnx

    tensor = value.type.tensor_type
    name = onnx.TensorProto.DataType.Name(tensor.elem_type).lower()
    dims = tuple(dim.dim_value or dim.dim_param or "?" for dim in tensor.shape.dim)
    return Port(value.name, {"float": "float32", "double": "float64"}.get(name, name), dims)


def types_of(model: Any) -> Mapping[str, int]:
    """The element type of every tensor that is known by name."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    known = {tensor.name: tensor.data_type for tensor in graph.initializer}
    values = (*graph.input, *graph.output, *graph.value_info)
    return known | {value.name: value.type.tensor_type.elem_type for value in values}


def untyped_nodes(nodes: Iterable[Any], types: Mapping[str, int], opset: int) -> Iterator[Any]:
    """The nodes that take a bfloat16 tensor which this version of the operator set does not allow them."""
    import onnx

    for node in nodes:
        if node.domain not in {"", "ai.onnx"} or node.op_type == "Cast":
            continue
        if all(types.get(name) != onnx.TensorProto.BFLOAT16 for name in node.input):
            continue
        try:
            schema = onnx.defs.get_schema(node.op_type, opset, "")
        except onnx.defs.SchemaError:
            continue
        if not any("tensor(bfloat16)" in allowed.allowed_type_strs for allowed in schema.type_constraints):
            yield node


def _data(model: Any) -> Mapping[str, int]:
    """How many bytes of each file the graph's weights take."""
    import onnx

    needed: dict[str, int] = {}
    for tensor in tensors_of(model.graph):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        end = int(told.get("offset", 0)) + int(told.get("length", 0))
        needed[told.get("location", "")] = max(needed.get(told.get("location", ""), 0), end)
    return needed


def _snapshots(folder: Path) -> Iterator[Path]:
    """The ``snapshots`` folder of the Hugging Face cache that a folder lies in, if it lies in one."""
    return (parent.resolve() for parent in folder.absolute().parents if parent.name == "snapshots")
