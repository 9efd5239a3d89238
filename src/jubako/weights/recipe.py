"""From a model of the catalog and the files on disk to the parts that its pipeline is made of."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from jubako.catalog import Model
from jubako.errors import UnusableWeights
from jubako.weights.graphs.part import GraphPart, admissions, slots_of
from jubako.weights.graphs.proxies import GraphModule
from jubako.weights.graphs.runtime import GraphRuntime
from jubako.weights.layout import DENOISERS, components
from jubako.weights.motion import MotionPart
from jubako.weights.overlay import FusedPart, WholeDenoiser, touched_by_lora
from jubako.weights.parts import (
    Finish,
    FinishedPart,
    FolderPart,
    Part,
    class_named,
    config_of,
    read_index,
    weights_of,
)
from jubako.weights.single_file import SingleFilePart, holds
from jubako.weights.store import find_overlay, require_configs, require_weights

__all__ = ["Recipe", "estimated_bytes", "pipeline_class", "recipe"]

logger = logging.getLogger(__name__)

# Pipelines that diffusers lacks.
_OWN = {"StableVideo3DPipeline": "jubako.weights.sv3d"}


@dataclass(frozen=True)
class Recipe:
    """The heavy parts of a pipeline, and the folder that configs, tokenizers and the scheduler come from."""

    model: Model
    folder: Path
    parts: tuple[Part, ...]

    def pipeline(self, modules: Mapping[str, torch.nn.Module]) -> Any:
        """The diffusers pipeline around these modules; it moves and casts none of them."""
        cls = pipeline_class(self.model)
        left_out: dict[str, Any] = dict.fromkeys(self.model.weights.left_out)
        if "safety_checker" in left_out:
            left_out["requires_safety_checker"] = False
        # The repository may be another pipeline's, with more parts: AnimateDiff's is Stable Diffusion's.
        left_out = {name: value for name, value in left_out.items() if name in signature(cls).parameters}
        graphs = {name: module for name, module in modules.items() if isinstance(module, GraphModule)}
        # The library takes modules of its own classes only.
        own = {name: None if name in graphs else module for name, module in modules.items()}
        pipeline = cls.from_pretrained(
            self.folder, use_safetensors=True, local_files_only=True, **left_out, **own
        )
        if graphs:
            pipeline = _rebuilt(pipeline, graphs)
        pipeline.set_progress_bar_config(disable=True)
        config = {**pipeline.scheduler.config, **self.model.scheduler_config}
        pipeline.scheduler = type(pipeline.scheduler).from_config(config)
        return pipeline


def recipe(
    model: Model,
    models: Mapping[str, Model],
    home: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    runtime: GraphRuntime | None = None,
    finish: Finish | None = None,
) -> Recipe:
    """What the model's pipeline is made of; ModelNotOnDisk or UnusableWeights say what stands in the way.

    ``models`` are those of the family, from which a single file may borrow its configs. With a ``runtime``
    its graphs stand in for the modules that they are of; a ``finish`` is given to those that PyTorch runs.
    """
    if runtime is not None:
        kitchen = _Kitchen(model, runtime.base, device, dtype, runtime)
        return Recipe(model, runtime.base, _finished(kitchen.parts(None), finish))
    require_weights(home, model, models)
    file, overlay = model.weights.file, find_overlay(home, model)
    folder = require_configs(home, model, models) if file else require_weights(home, model)
    kitchen = _Kitchen(model, folder, device, dtype)
    return Recipe(model, folder, _finished(kitchen.parts(overlay), finish))


def _finished(parts: Iterable[Part], finish: Finish | None) -> tuple[Part, ...]:
    if finish is None:
        return tuple(parts)
    return tuple(part if isinstance(part, GraphPart) else FinishedPart(part, finish) for part in parts)


def estimated_bytes(
    model: Model, home: Path, dtype: torch.dtype, models: Mapping[str, Model] = MappingProxyType({})
) -> int:
    """Memory of the model's components alone in this precision, from the headers of their files."""
    return sum(part.bytes for part in recipe(model, models, home, torch.device("cpu"), dtype).parts)


@dataclass(frozen=True)
class _Kitchen:
    """One model's folder of configs, and where and how its parts are to run."""

    model: Model
    folder: Path
    device: torch.device
    dtype: torch.dtype
    runtime: GraphRuntime | None = None

    def parts(self, overlay: Path | None) -> Iterator[Part]:
        """Every heavy component in the order of the index."""
        index = read_index(self.folder)
        names = [name for name in components(index, self.model) if self._is_heavy(name)]
        denoiser = next((name for name in DENOISERS if name in names), "")
        kind = self.model.weights.overlay.kind if self.model.weights.overlay else None
        fused = touched_by_lora(overlay, denoiser) if overlay and kind == "lora" else ()
        for name in names:
            cls = class_named(*index[name])
            if self.runtime is not None and slots_of(name):
                yield self._graphs(name, cls, names, self.runtime)
            elif overlay and kind == "denoiser" and name == denoiser:
                yield WholeDenoiser(name, self.model.name, self.folder, cls, overlay, self.device, self.dtype)
            elif overlay and name in fused:
                yield FusedPart(self._part(name, cls), self.model.name, pipeline_class(self.model), overlay)
            elif overlay and kind == "motion" and name == denoiser:
                yield MotionPart(self._part(name, cls), self.model.name, overlay, self.device, self.dtype)
            elif overlay and kind == "original" and name in {denoiser, "vae"}:
                yield self._original(name, cls, overlay)
            else:
                yield self._part(name, cls)

    def _graphs(self, name: str, cls: type[Any], names: list[str], runtime: GraphRuntime) -> Part:
        admitted, reason = admissions(name, cls, runtime, tuple(names))
        if reason is not None:
            logger.info("%s: %s", self.model.name, reason)
        whole = {admission.slot for admission in admitted} == set(slots_of(name))
        base = None if whole else self._part(name, cls)
        if not admitted and base is not None:
            return base
        return GraphPart(name, cls, self.folder, admitted, runtime, base)

    def _original(self, name: str, cls: type[Any], file: Path) -> Part:
        from jubako.weights.sv3d import OriginalPart

        return OriginalPart(name, self.model.name, self.folder, cls, file, self.device, self._dtype_of(name))

    def _is_heavy(self, name: str) -> bool:
        """Tokenizers, schedulers and image processors have no config.json, every module has one."""
        return (self.folder / name / "config.json").is_file()

    def _dtype_of(self, name: str) -> torch.dtype:
        return torch.float32 if self._overflows(name) else self.dtype

    def _overflows(self, name: str) -> bool:
        """Whether this is an autoencoder of SDXL, which in float16 paints black, or of SVD.

        ``force_upcast`` alone does not tell: other families' configs have it too, and their pipelines, which
        know no upcasting, rightly do not heed it. Where it is unset, the classes say yes.
        """
        return (
            name == "vae"
            and self.dtype == torch.float16
            and _upcasts(pipeline_class(self.model))
            and bool(config_of(self.folder / name).get("force_upcast", True))
        )

    def _part(self, name: str, cls: type[Any]) -> Part:
        dtype = self._dtype_of(name)
        file = self.model.weights.file
        if file is not None and holds(file, name):
            return SingleFilePart(name, self.model.name, file, self.folder, cls, self.device, dtype)
        weights, variant = weights_of(name, self.folder, self.model)
        if weights:
            return FolderPart(name, self.folder, cls, weights, variant, self.device, dtype)
        where = f"neither in {file} nor in {self.folder / name}" if file else f"not in {self.folder / name}"
        raise UnusableWeights(f"{self.model.name}: the weights of its {name} are {where}")


def _rebuilt(pipeline: Any, modules: Mapping[str, GraphModule]) -> Any:
    """The pipeline made anew around these modules too, of which it derives sizes and defaults."""
    accepted = signature(type(pipeline)).parameters
    components = pipeline.components
    options = {
        name: value for name, value in pipeline.config.items() if name in accepted and name not in components
    }
    return type(pipeline)(**{**components, **modules}, **options)


def pipeline_class(model: Model) -> type[Any]:
    """The class that the catalog names: of diffusers, or one that diffusers lacks."""
    module = import_module(_OWN.get(model.pipeline, "diffusers"))
    found: type[Any] = getattr(module, model.pipeline)
    return found


def _upcasts(pipeline: type[Any]) -> bool:
    """Whether the stock pipeline runs its autoencoder in float32 where that asks for it."""
    from diffusers import StableVideoDiffusionPipeline

    return hasattr(pipeline, "upcast_vae") or issubclass(pipeline, StableVideoDiffusionPipeline)
