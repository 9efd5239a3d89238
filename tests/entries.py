"""Entries of the catalog for the folders and files of a test, and the store that loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from jubako.catalog import Model, WeightSource, load_catalog
from jubako.weights.components import Assembly, ComponentStore

CPU = torch.device("cpu")

__all__ = ["CPU", "entry", "load", "same"]


def entry(name: str, like: str, *, scheduler_config: Any = None, **weights: Any) -> Model:
    """A model with the pipeline and the values of a shipped one, and these weights."""
    shipped = load_catalog().model(like)
    source = WeightSource.model_validate(
        {"components_left_out": shipped.weights.components_left_out, **weights}
    )
    changes = {"name": name, "weights": source, "scheduler_config": scheduler_config or {}}
    return shipped.model_copy(update=changes)


def load(store: ComponentStore, model: Model, home: Path, dtype: torch.dtype = torch.float32) -> Assembly:
    """The model on the CPU."""
    return store.load(model, home, CPU, dtype)


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    """Whether two modules have the same tensors under the same names."""
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
