"""Which vendors' weight sets are on disk: graphs that were pulled or exported, and what goes with them.

A set needs more than its graphs: configs, tokenizers and the modules that it leaves to PyTorch, from the
model's standard repository. A pull takes these without the weights that graphs stand for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from jubako.catalog import Model
from jubako.hardware import VENDORS
from jubako.weight_sets import GraphSet, Slot, Vendor
from jubako.weights.layout import DENOISERS
from jubako.weights.manifest import Manifest, listed
from jubako.weights.store import (
    WeightRecord,
    files_of,
    find_weights,
    first_torn,
    manifests_of,
    write_document,
)

__all__ = [
    "GraphRecord",
    "LocatedGraphs",
    "find_graphs",
    "graph_files",
    "graph_manifests",
    "is_on_disk",
    "left_to_pytorch",
    "missing_graphs",
    "read_graph_record",
    "write_graph_record",
]


class GraphRecord(BaseModel):
    """What was pulled of a weight set: its files' sizes, and the record of the part of the standard one.

    ``name`` is the vendor and the precision: nvidia-bfloat16.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    repo: str
    commit: str
    folder: Path
    files: dict[str, int]
    digests: dict[str, str] = {}
    base: WeightRecord

    def is_whole(self) -> bool:
        """Whether every file is there with its size."""
        return self.base.is_whole() and self.torn() is None

    @property
    def manifest(self) -> Manifest:
        """What the graphs' files must contain."""
        return Manifest(self.folder, self.digests)

    def torn(self) -> Path | None:
        """The first of the graphs' files that is not there with its size."""
        return first_torn((self.folder / name, size) for name, size in self.files.items())


@dataclass(frozen=True)
class LocatedGraphs:
    """A weight set on disk: the folder that its files are named relative to, and that of the standard one."""

    folder: Path
    base: Path


def find_graphs(home: Path, model: Model, vendor: Vendor, graphs: GraphSet) -> LocatedGraphs | None:
    """Where a set is, None when it is not (wholly) on disk."""
    standard = find_weights(home, model)
    if graphs.folder is not None:
        return LocatedGraphs(graphs.folder, standard) if standard and graphs.folder.is_dir() else None
    record = read_graph_record(home, model, vendor, graphs)
    if record is None or not record.is_whole():
        return None
    return LocatedGraphs(record.folder, record.base.folder)


def is_on_disk(home: Path, model: Model, models: Mapping[str, Model]) -> bool:
    """Whether there is a weight set to serve the model from, be it on another machine."""
    if find_weights(home, model, models) is not None:
        return True
    sets = ((vendor, graphs) for vendor in VENDORS for graphs in model.graph_sets(vendor))
    return any(find_graphs(home, model, vendor, graphs) for vendor, graphs in sets)


def missing_graphs(home: Path, model: Model, vendor: Vendor, graphs: GraphSet) -> str | None:
    """What is missing of a set and how to get it, None when all of it is here."""
    if find_graphs(home, model, vendor, graphs) is not None:
        return None
    if graphs.folder is None:
        record = read_graph_record(home, model, vendor, graphs)
        torn = (record.torn() or record.base.torn()) if record else None
        return (
            f"{f'{torn} is missing or cut off' if torn else 'its files are not on disk'}; fetch them with: "
            f"jubako pull {model.name} --weights {vendor} --precision {graphs.precision}"
        )
    if not graphs.folder.is_dir():
        return f"there is no folder {graphs.folder}"
    return f"the standard weights beside it are not on disk; fetch them with: jubako pull {model.name}"


def graph_manifests(home: Path, model: Model, vendor: Vendor, graphs: GraphSet) -> tuple[Manifest, ...]:
    """What the files of a set, and of what goes with it, must contain, as far as it is recorded or listed."""
    if graphs.folder is not None:
        own = listed(graphs.folder)
        return (*manifests_of(home, model), *([own] if own else []))
    record = read_graph_record(home, model, vendor, graphs)
    return (*record.base.manifests, record.manifest) if record else ()


def graph_files(home: Path, model: Model, vendor: Vendor, graphs: GraphSet) -> tuple[Path, ...]:
    """The files of a set and of what goes with it, whether they are there or not."""
    if graphs.folder is not None:
        return (*files_of(home, model), *sorted(p for p in graphs.folder.rglob("*") if p.is_file()))
    record = read_graph_record(home, model, vendor, graphs)
    if record is None:
        return ()
    base = record.base
    return (*(base.folder / name for name in base.files), *(record.folder / name for name in record.files))


def left_to_pytorch(graphs: GraphSet, components: tuple[str, ...]) -> tuple[str, ...]:
    """The components of a pipeline whose own weights are needed beside the graphs.

    Those of text encoders are, even where there is a graph: it may lack an output that the pipeline reads.
    """
    both: set[Slot] = {"vae_decoder", "vae_encoder"}
    spared = {*DENOISERS, *(["vae"] if both <= set(graphs.graphs) else [])}
    return tuple(name for name in components if name not in spared)


def read_graph_record(home: Path, model: Model, vendor: Vendor, graphs: GraphSet) -> GraphRecord | None:
    """The record of a pulled set as the catalog has it now, None when there is none to use."""
    try:
        text = _path(home, model.name, f"{vendor}-{graphs.precision}").read_text(encoding="utf-8")
        record = GraphRecord.model_validate_json(text)
    except (OSError, ValidationError):
        return None
    return record if record.repo == graphs.repo and record.base.repo == model.weights.repo else None


def write_graph_record(home: Path, model: str, record: GraphRecord) -> None:
    """Write a record under a temporary name and rename it into place. DiskFull when there is no room."""
    write_document(_path(home, model, record.name), record)


def _path(home: Path, model: str, name: str) -> Path:
    return home / "weights" / f"{model}.{name}.json"
