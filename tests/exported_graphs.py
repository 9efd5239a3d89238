"""Graphs of the miniatures in the vendors' layouts, each exported once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from jubako.catalog import load_catalog
from jubako.weight_sets import GraphSet, Precision, Vendor
from jubako.weights.components import ComponentStore
from jubako.weights.graphs.export import Export, export_graphs
from jubako.weights.graphs.runtime import GraphRuntime
from jubako.weights.store import require_weights

__all__ = ["Exported", "exporting"]

Exported = Callable[..., GraphRuntime]


def exporting(home: Path) -> Exported:
    """What gives a miniature's graphs in a vendor's layout, for the CPU's provider."""
    catalog, made = load_catalog(), dict[object, GraphRuntime]()

    def export(
        name: str,
        layout: Vendor,
        precision: Precision,
        *,
        rows: int | None = None,
        one_timestep: bool = False,
    ) -> GraphRuntime:
        key = (name, layout, precision, rows, one_timestep)
        if key not in made:
            model = catalog.model(name)
            store = ComponentStore(catalog.families[model.family].models)
            pipeline = store.load(model, home, torch.device("cpu"), torch.float32).pipeline
            folder = home / "-".join(map(str, key))
            how = Export(layout, precision, rows=rows, one_timestep=one_timestep)
            written = export_graphs(pipeline, folder, how)
            # As AMD's repositories have it: a config of no bytes, which nobody may read.
            Path(folder / "config.json").touch()
            made[key] = GraphRuntime(
                model=model,
                vendor=layout,
                graphs=GraphSet(folder=folder, layout=layout, precision=precision, graphs=written),
                folder=folder,
                base=require_weights(home, model),
                providers=("CPUExecutionProvider",),
                device=torch.device("cpu"),
                home=home,
                engine_bytes=10**9,
            )
        return made[key]

    return export
