"""Chooses the weight set that each model is served from here, and says what spoke against the others."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import torch

from jubako.catalog import Model
from jubako.errors import JubakoError, ModelNotOnDisk
from jubako.hardware import VENDORS, Machine, providers_for
from jubako.settings import Settings
from jubako.weight_sets import GraphSet, Vendor
from jubako.weights.graphs.runtime import GraphRuntime
from jubako.weights.graphs.store import find_graphs, graph_files, graph_manifests, missing_graphs
from jubako.weights.manifest import Manifest
from jubako.weights.selection import Choice, choose
from jubako.weights.store import files_of, manifests_of

__all__ = ["Chooser"]

logger = logging.getLogger(__name__)


class Chooser:
    """The settings and the machine, of which the choice follows with what is on disk."""

    def __init__(self, machine: Machine, settings: Settings, device: torch.device) -> None:
        self._machine = machine.using(str(device))
        self._settings = settings
        self._device = device
        self._told: dict[str, Choice] = {}

    def choose(self, model: Model) -> Choice:
        """What the model is served from now; WeightsUnavailable when what is set can't be had."""
        settings = self._settings
        choice = choose(
            model,
            self._machine,
            weights=settings.weights_for(model.name) or model.weight_set,
            precision=settings.precision_for(model.name) or model.precision,
            provider=settings.execution_provider,
            missing=partial(self._missing, model),
            refused=partial(self._refused, model),
        )
        if self._told.get(model.name) != choice:
            self._told[model.name] = choice
            _tell(model, choice)
        return choice

    def runtime(self, model: Model, choice: Choice) -> GraphRuntime | None:
        """How the graphs of a choice are run; None for standard weights."""
        if choice.graphs is None:
            return None
        return self._runtime(model, _vendor(model, choice.graphs), choice.graphs, choice.providers)

    def manifests(self, model: Model, choice: Choice) -> tuple[Manifest, ...]:
        """What the files of a choice must contain, as far as it is known."""
        home, graphs = self._settings.home, choice.graphs
        if graphs is None:
            return manifests_of(home, model)
        return graph_manifests(home, model, _vendor(model, graphs), graphs)

    def files(self, model: Model, choice: Choice) -> tuple[Path, ...]:
        """The files of a choice, whether they are there or not."""
        home, graphs = self._settings.home, choice.graphs
        return (
            files_of(home, model)
            if graphs is None
            else graph_files(home, model, _vendor(model, graphs), graphs)
        )

    def _missing(self, model: Model, graphs: GraphSet) -> str | None:
        return missing_graphs(self._settings.home, model, _vendor(model, graphs), graphs)

    def _refused(self, model: Model, graphs: GraphSet) -> str | None:
        vendor = _vendor(model, graphs)
        providers = providers_for(vendor, self._settings.execution_provider)
        try:
            runtime = self._runtime(model, vendor, graphs, providers)
            for slot in graphs.graphs:
                runtime.admitted(slot)
        except JubakoError as error:
            return str(error)
        return None

    def _runtime(
        self, model: Model, vendor: Vendor, graphs: GraphSet, providers: tuple[str, ...]
    ) -> GraphRuntime:
        home: Path = self._settings.home
        found = find_graphs(home, model, vendor, graphs)
        if found is None:
            why = missing_graphs(home, model, vendor, graphs)
            raise ModelNotOnDisk(f"model: {model.name}: {why}", param="model")
        return GraphRuntime(
            model=model,
            vendor=vendor,
            graphs=graphs,
            folder=found.folder,
            base=found.base,
            providers=providers,
            device=self._device,
            home=home,
            engine_bytes=self._settings.engine_bytes,
        )


def _vendor(model: Model, graphs: GraphSet) -> Vendor:
    return next(vendor for vendor in VENDORS if graphs in model.graph_sets(vendor))


def _tell(model: Model, choice: Choice) -> None:
    on = f" on {choice.providers[0]}" if choice.providers else ""
    logger.info("%s: served from %s weights in %s%s", model.name, choice.vendor, choice.precision, on)
    for rung in choice.rejected:
        logger.info("%s: not from %s", model.name, rung)
