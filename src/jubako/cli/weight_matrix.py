"""`jubako models --weights`: in which forms each model's weights exist, whose they are, and what they ask."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jubako.catalog import Catalog, Model
from jubako.hardware import VENDORS
from jubako.weight_sets import GraphSet, Vendor
from jubako.weights.graphs.store import find_graphs
from jubako.weights.store import find_weights

__all__ = ["show_weights"]

# Where the output is no terminal, nothing is cut off to fit one.
PIPED_COLUMNS = 160


def show_weights(catalog: Catalog, home: Path, *, as_json: bool) -> None:
    """Print every weight set of every model, and why a vendor has none."""
    rows = [row for model in catalog for row in _rows(catalog, model, home)]
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPED_COLUMNS)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for header in ("Model", "Weights", "Precision"):
        table.add_column(header, no_wrap=True)
    for header in ("From", "Asks", "Status"):
        table.add_column(header, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)


def _rows(catalog: Catalog, model: Model, home: Path) -> Iterator[dict[str, Any]]:
    weights, models = model.weights, catalog.families[model.family].models
    origin = weights.repo or weights.folder or weights.file or "a worker of its own"
    yield {
        "model": model.name,
        "weights": "standard",
        "precision": weights.dtype,
        "repo": str(origin),
        "licence": model.licence.id,
        "gated": model.gated,
        "on_disk": find_weights(home, model, models) is not None,
    }
    for vendor in VENDORS:
        sets = model.graph_sets(vendor)
        if not sets:
            yield {"model": model.name, "weights": vendor, "none": model.absence(vendor)}
        for graphs in sets:
            yield _row(model, vendor, graphs, home)


def _row(model: Model, vendor: Vendor, graphs: GraphSet, home: Path) -> dict[str, Any]:
    return {
        "model": model.name,
        "weights": vendor,
        "precision": graphs.precision,
        "repo": graphs.repo or str(graphs.folder),
        "subfolder": graphs.subfolder,
        "layout": graphs.layout,
        "graphs": list(graphs.graphs),
        "torch_components": list(graphs.torch_components),
        "hardware": graphs.hardware.model_dump(exclude_defaults=True),
        "licence": graphs.licence or model.licence.id,
        "gated": graphs.gated,
        "status": graphs.status,
        "note": graphs.note,
        "on_disk": find_graphs(home, model, vendor, graphs) is not None,
    }


def _cells(row: dict[str, Any]) -> tuple[Text, ...]:
    first = row["weights"] == "standard"
    name = Text(row["model"] if first else "", style="bold")
    if "none" in row:
        return name, Text(row["weights"], style="dim"), Text("-", style="dim"), Text(row["none"], style="dim")
    here = ["on disk"] if row["on_disk"] else []
    origin = "/".join(filter(None, (row["repo"], row.get("subfolder"))))
    return (
        name,
        Text(row["weights"], style="green" if here else ""),
        Text(row["precision"]),
        Text(origin),
        Text(", ".join([*_asked(row.get("hardware", {})), *(["gated"] if row["gated"] else [])]) or "-"),
        Text(", ".join([*here, *([row["status"]] if "status" in row else [])]) or "-"),
    )


def _asked(hardware: dict[str, Any]) -> Iterator[str]:
    if "compute_capability" in hardware:
        yield f"compute capability {hardware['compute_capability']:g}"
    if architectures := hardware.get("architectures"):
        yield (
            f"{architectures[0]} to {architectures[-1]}"
            if len(architectures) > 2
            else ", ".join(architectures)
        )
    if "memory_gb" in hardware:
        yield f"{hardware['memory_gb']:g} GB"
