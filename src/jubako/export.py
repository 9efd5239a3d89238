"""Writes a model's graphs and the catalog entry that serves them: ``python -m jubako.export MODEL …``."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

from jubako.catalog import Model, load_catalog
from jubako.disk import room_in
from jubako.errors import JubakoError, UnusableWeights
from jubako.settings import load_settings
from jubako.weight_sets import GraphSet
from jubako.weights.components import ComponentStore
from jubako.weights.graphs.admission import admit
from jubako.weights.graphs.export import DTYPES, Export, export_graphs
from jubako.weights.graphs.graph import read_graph
from jubako.weights.manifest import write_list

__all__ = ["ENTRY", "main"]

ENTRY = "catalog.yaml"


def main() -> int:
    """Export the model that the arguments name; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m jubako.export", description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--layout", choices=("nvidia", "amd"), required=True)
    parser.add_argument("--precision", choices=tuple(DTYPES), required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    how = Export(options.layout, options.precision)
    try:
        _export(options.model, options.out, how)
    except JubakoError as error:
        print(f"jubako: {error}", file=sys.stderr)
        return 1
    return 0


def _export(name: str, folder: Path, how: Export) -> None:
    settings = load_settings()
    catalog = load_catalog(settings.catalog)
    model = catalog.model(name)
    if model.weights.worker is not None or model.family == "mesh":
        raise UnusableWeights(f"model: {name} is no model whose parts have graphs in a vendor's layout")
    if folder.exists() and any(folder.iterdir()):
        raise UnusableWeights(f"{folder} is not empty; name a folder for these graphs alone")
    store = ComponentStore(catalog.families[model.family].models)
    assembly = store.load(model, settings.home, torch.device("cpu"), torch.float32)
    try:
        with room_in("--out"):
            _write(model, assembly.pipeline, folder, how)
    except BaseException:
        # It was new or empty, and what is left of half of it would have the next try refused.
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(model: Model, pipeline: Any, folder: Path, how: Export) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    written = export_graphs(pipeline, folder, how)
    for slot, file in written.items():
        graph = admit(read_graph(folder / file), slot, how.layout, "tensorrt").graph
        print(f"{file}  {graph.bytes / 1e6:.1f} MB", flush=True)
    text = yaml.safe_dump(_entry(model, written, how), sort_keys=False)
    (folder / ENTRY).write_text(text, encoding="utf-8")
    write_list(folder)


def _entry(model: Model, written: dict[Any, str], how: Export) -> dict[str, Any]:
    """What is laid over the catalog to serve the graphs; folders in it are relative to its file."""
    sides = {"min_side": model.limits.min_side, "max_side": model.limits.max_side}
    rows = [count for count in (1, 2, 4, 8, 16, 32) if count <= model.max_rows]
    graphs = GraphSet.model_validate(
        {
            "folder": ".",
            "layout": how.layout,
            "precision": how.precision,
            "graphs": written,
            "profile": {**sides, "rows": rows},
        }
    )
    shown = graphs.model_dump(mode="json", exclude_defaults=True)
    return {"family": model.family, "models": {model.name: {"weight_sets": {how.layout: [shown]}}}}


if __name__ == "__main__":
    sys.exit(main())
