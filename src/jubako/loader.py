"""Brings a family's models into memory: components from the store, the family's own model around them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from time import perf_counter
from typing import Any, cast

import torch

from jubako import metrics
from jubako.adapters.bank import AdapterBank
from jubako.adapters.store import AdapterStore
from jubako.catalog import Family, Model
from jubako.errors import GenerationFailed, JubakoError, OutOfMemory
from jubako.families.acceleration import Acceleration, accelerate
from jubako.families.latent import LatentModel
from jubako.families.loaded import LoadedModel
from jubako.families.row_buckets import fast_predict, never
from jubako.families.warm_up import example_job, warm_up
from jubako.hardware import Machine
from jubako.memory import give_back, out_of_memory
from jubako.settings import Settings
from jubako.weights.broken import BrokenModels
from jubako.weights.chooser import Chooser
from jubako.weights.components import Assembly, ComponentStore
from jubako.weights.manifest import check
from jubako.weights.parts import Finish
from jubako.weights.placement import resolve_dtype
from jubako.weights.recipe import recipe
from jubako.weights.selection import Choice

__all__ = ["FamilyLoader"]

logger = logging.getLogger(__name__)


class FamilyLoader:
    """The :class:`jubako.residency.Loader` of a family. Components that models share count once."""

    def __init__(
        self,
        family: Family,
        settings: Settings,
        device: torch.device,
        machine: Machine | None = None,
        acceleration: Acceleration | None = None,
    ) -> None:
        self._wrap = import_module(f"jubako.families.{family.name}").wrap
        self._family = family
        self._settings = settings
        self._device = device
        self._chooser = Chooser(machine or Machine(), settings, device)
        self._acceleration = acceleration or Acceleration()
        self._choices: dict[str, Choice] = {}
        self._store = ComponentStore(family.models)
        self._assemblies: dict[str, Assembly] = {}
        self._broken = BrokenModels()

    @property
    def broken(self) -> Mapping[str, str]:
        """Why each model can't be loaded whose files were found unusable and have not changed since."""
        return self._broken.reasons()

    @property
    def bytes(self) -> int:
        """What all loaded components take."""
        return self._store.bytes

    def needed(self, names: Sequence[str]) -> int:
        """What the components of these models take that are not in memory yet, by their files' headers."""
        sizes = {}
        for name in names:
            model = self._family.models[name]
            choice = self._chooser.choose(model)
            with self._reading(model, choice):
                plan = recipe(
                    model,
                    self._family.models,
                    self._settings.home,
                    self._device,
                    resolve_dtype(choice.precision, model, self._device),
                    runtime=self._chooser.runtime(model, choice),
                    finish=self._finish(choice),
                )
                sizes.update({part.key: part.bytes for part in plan.parts})
        held = {key for assembly in self._assemblies.values() for key in assembly.parts.values()}
        return sum(size for key, size in sizes.items() if key not in held)

    def load(self, name: str, on_progress: Callable[[float], None]) -> LoadedModel:
        """The model in memory; ModelNotOnDisk, UnusableWeights, OutOfMemory, GenerationFailed say why not."""
        failure: JubakoError
        began = perf_counter()
        try:
            loaded = self._loaded(name, on_progress)
        except JubakoError as error:
            logger.warning("loading %s failed: %s", name, error)
            failure = error
            failure.__cause__ = failure.__context__ = failure.__traceback__ = None
        except Exception as error:  # noqa: BLE001 # it is told in the log and to whoever waits
            failure = _failure(name, error)
        else:
            self._count(name, perf_counter() - began)
            return loaded
        # Only now: the error's frames held what was read of the model.
        give_back()
        raise failure

    @property
    def choices(self) -> Mapping[str, Choice]:
        """What each model that was loaded was last loaded from."""
        return dict(self._choices)

    def unload(self, name: str) -> None:
        """Release its components and return the memory of those that no other model has."""
        self._store.release(self._assemblies.pop(name))
        give_back()
        metrics.EVICTIONS.add(model=name)
        metrics.RESIDENT_BYTES.set(self.bytes, family=self._family.name)

    def bytes_of(self, name: str) -> int:
        """What a loaded model's components take, shared ones included."""
        return self._store.bytes_of(self._assemblies[name])

    def freed_by(self, name: str) -> int:
        """What its components take that no other model has."""
        return self._store.bytes_freed_by(self._assemblies[name])

    def _count(self, name: str, seconds: float) -> None:
        metrics.LOADS.add(model=name)
        metrics.LOAD_SECONDS.observe(seconds, model=name)
        metrics.RESIDENT_BYTES.set(self.bytes, family=self._family.name)

    def _loaded(self, name: str, on_progress: Callable[[float], None]) -> LoadedModel:
        model = self._family.models[name]
        choice = self._chooser.choose(model)
        with self._reading(model, choice):
            assembly = self._store.load(
                model,
                self._settings.home,
                self._device,
                resolve_dtype(choice.precision, model, self._device),
                on_progress,
                runtime=self._chooser.runtime(model, choice),
                finish=self._finish(choice),
            )
        try:
            wrapped = self._ready(cast("LoadedModel", self._wrap(assembly.pipeline, model)), model, choice)
        except BaseException:
            self._store.release(assembly)
            raise
        self._assemblies[name] = assembly
        self._choices[name] = choice
        return wrapped

    @contextmanager
    def _reading(self, model: Model, choice: Choice) -> Iterator[None]:
        """Within, files are read that are known to be the right ones, as far as that is recorded."""
        with self._broken.watched(model.name, self._chooser.files(model, choice)):
            check(self._chooser.manifests(model, choice), self._settings.home, _remedy(model))
            yield

    def _accelerated(self, choice: Choice) -> Acceleration:
        """What is on for a choice: layers in float8 are asked for by the precision of standard weights."""
        if choice.graphs is not None:
            return Acceleration()
        return replace(self._acceleration, float8=self._acceleration.float8 or choice.precision == "float8")

    def _finish(self, choice: Choice) -> Finish | None:
        acceleration = self._accelerated(choice)
        if acceleration == Acceleration():
            return None
        return Finish(acceleration, lambda module, name: accelerate(module, name, acceleration))

    def _ready(self, model: LoadedModel, entry: Model, choice: Choice) -> LoadedModel:
        """The model behind what is on of row buckets and CUDA graphs, its first forwards done."""
        acceleration = self._accelerated(choice)
        adapted = never
        if isinstance(model, LatentModel):
            model.bank = bank = AdapterBank(
                model.pipeline, entry.name, AdapterStore(self._settings.home), self._settings.adapter_bytes
            )
            adapted = partial(bank.at_work, model.denoiser_name)
        if acceleration.row_buckets or acceleration.cuda_graphs:
            fast = fast_predict(model.predict, acceleration, entry.max_rows, adapted)
            model.predict = fast  # type: ignore[method-assign] # of this one
        if acceleration.warm_up:
            job = example_job(entry, self._family)
            warm_up(model, model.prepare(job), _modules(model))
        return model


def _failure(name: str, error: Exception) -> JubakoError:
    if out_of_memory(error):
        logger.warning("no memory to load %s: %s", name, str(error))
        return OutOfMemory(
            f"model: {name} does not fit into the memory that is free; a lower JUBAKO_PRECISION, a smaller "
            "model or another device may",
            param="model",
        )
    logger.error("loading %s failed", name, exc_info=error)
    return GenerationFailed(f"the weights of {name} could not be loaded")


def _remedy(model: Model) -> str:
    if model.weights.repo is not None:
        return f"fetch it again with: jubako pull {model.name}"
    return "put the right file in its place"


def _modules(model: LoadedModel) -> list[torch.nn.Module]:
    """What the model's pipeline is made of."""
    pipeline: Any = getattr(model, "pipeline", None)
    components = pipeline.components.values() if pipeline is not None else ()
    return [module for module in components if isinstance(module, torch.nn.Module)]
