"""Brings a family's models into memory: components from the store, the family's own model around them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import cast

import torch

from jubako.catalog import Family
from jubako.errors import GenerationFailed, JubakoError
from jubako.families.loaded import LoadedModel
from jubako.memory import give_back
from jubako.settings import Settings
from jubako.weights.components import Assembly, ComponentStore
from jubako.weights.placement import resolve_dtype
from jubako.weights.recipe import recipe

__all__ = ["FamilyLoader"]

logger = logging.getLogger(__name__)


class FamilyLoader:
    """The :class:`jubako.residency.Loader` of a family. Components that models share count once."""

    def __init__(self, family: Family, settings: Settings, device: torch.device) -> None:
        self._wrap = import_module(f"jubako.families.{family.name}").wrap
        self._family = family
        self._settings = settings
        self._device = device
        self._store = ComponentStore(family.models)
        self._assemblies: dict[str, Assembly] = {}

    @property
    def bytes(self) -> int:
        """What all loaded components take."""
        return self._store.bytes

    def needed(self, names: Sequence[str]) -> int:
        """What the components of these models take that are not in memory yet, by their files' headers."""
        sizes = {}
        for name in names:
            model = self._family.models[name]
            plan = recipe(model, self._family.models, self._settings.home, self._device, self._dtype(name))
            sizes.update({part.key: part.bytes for part in plan.parts})
        held = {key for assembly in self._assemblies.values() for key in assembly.parts.values()}
        return sum(size for key, size in sizes.items() if key not in held)

    def load(self, name: str, on_progress: Callable[[float], None]) -> LoadedModel:
        """The model in memory; ModelNotOnDisk, UnusableWeights or GenerationFailed when it can't be had."""
        failure: JubakoError
        try:
            return self._loaded(name, on_progress)
        except JubakoError as error:
            logger.warning("loading %s failed: %s", name, error)
            failure = error
            failure.__cause__ = failure.__context__ = failure.__traceback__ = None
        except Exception:
            logger.exception("loading %s failed", name)
            failure = GenerationFailed(f"the weights of {name} could not be loaded")
        # Only now: the error's frames held what was read of the model.
        give_back()
        raise failure

    def unload(self, name: str) -> None:
        """Release its components and return the memory of those that no other model has."""
        self._store.release(self._assemblies.pop(name))
        give_back()

    def bytes_of(self, name: str) -> int:
        """What a loaded model's components take, shared ones included."""
        return self._store.bytes_of(self._assemblies[name])

    def freed_by(self, name: str) -> int:
        """What its components take that no other model has."""
        return self._store.bytes_freed_by(self._assemblies[name])

    def _loaded(self, name: str, on_progress: Callable[[float], None]) -> LoadedModel:
        model = self._family.models[name]
        assembly = self._store.load(model, self._settings.home, self._device, self._dtype(name), on_progress)
        try:
            wrapped = cast("LoadedModel", self._wrap(assembly.pipeline, model))
        except BaseException:
            self._store.release(assembly)
            raise
        self._assemblies[name] = assembly
        return wrapped

    def _dtype(self, name: str) -> torch.dtype:
        return resolve_dtype(self._settings.dtype, self._family.models[name], self._device)
