"""The catalog: what can be served, read from one YAML file a family into frozen values.

``models/README.md`` describes the files. Unknown keys are refused, and an error names the file and the field.
A user's folder is laid over the shipped one key by key, so that it can add a model or change one default.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from jubako.errors import InvalidRequest, UnknownModel, nearest
from jubako.job import Clip, Solid
from jubako.request import ADAPTER_NAME, SkipLayerGuidance, Task
from jubako.schedulers import resolve_scheduler
from jubako.sources import HubFile, Overlay, WeightSource, Worker
from jubako.weight_sets import Absence, GraphSet, Precision, Vendor, VendorSets, WeightsChoice

__all__ = [
    "AdapterEntry",
    "Batching",
    "Catalog",
    "CatalogError",
    "CheckerEntry",
    "Defaults",
    "Family",
    "Licence",
    "Limits",
    "Model",
    "Overlay",
    "Resources",
    "Task",
    "WeightSource",
    "Worker",
    "load_catalog",
    "shipped_folder",
]


# The one in C is six times as fast, and each process reads the catalog while somebody waits for it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class CatalogError(ValueError):
    """A catalog file can't be used; the text names the file and the field."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Licence(_Value):
    """The terms of a model's weights, in short; the link leads to the terms themselves."""

    id: str
    url: str
    commercial: Literal["yes", "limited", "no"]
    note: str = ""
    acceptance: bool = Field(default=False, description="Whether whoever serves it has to accept it first")


class Defaults(_Value):
    """What a request that leaves these fields unset gets.

    ``guidance_scale`` is that of a clip's last frame. ``clip`` and ``solid`` are for models of clips and of
    objects; what they leave out the model does not take.
    """

    width: int = Field(gt=0)
    height: int = Field(gt=0)
    num_inference_steps: int = Field(gt=0)
    guidance_scale: float = Field(ge=0)
    scheduler: str
    strength: float = Field(default=0.75, gt=0, le=1)
    max_sequence_length: int | None = Field(default=None, gt=0)
    clip: Clip | None = None
    solid: Solid | None = None


class Limits(_Value):
    """What a request may ask at most. Sides and areas are in pixels, prompts in characters."""

    min_side: int = Field(default=64, gt=0)
    max_side: int = Field(gt=0)
    max_pixels: int = Field(gt=0)
    multiple_of: int = Field(default=8, gt=0)
    min_num_inference_steps: int = Field(default=1, gt=0)
    max_num_inference_steps: int = Field(default=150, gt=0)
    max_guidance_scale: float = Field(default=30.0, gt=0)
    max_n: int = Field(default=10, gt=0)
    max_prompt_characters: int = Field(default=4000, gt=0)
    max_sequence_length: int | None = Field(default=None, gt=0)
    min_num_frames: int = Field(default=2, gt=0)
    max_num_frames: int = Field(default=25, gt=0)
    max_fps: int = Field(default=30, gt=0)
    max_motion_bucket_id: int = Field(default=255, gt=0)
    max_grid_size: int = Field(default=192, gt=0)
    max_frame_size: int = Field(default=256, gt=0)


class Model(_Value):
    """One model that can be served."""

    name: str
    family: str
    title: str
    summary: str = ""
    tasks: tuple[Task, ...] = Field(min_length=1)
    pipeline: str
    prediction_type: Literal["epsilon", "v_prediction", "sample", "flow"]
    parameters: int = Field(gt=0, description="Parameters of the denoiser")
    memory_gb: float = Field(gt=0, description="Memory of all components in the precision that is served")
    max_rows: int = Field(gt=0, description="Rows of one denoiser forward; a guided sample has two")
    guidance: bool = Field(default=True, description="False: distilled to run without guidance")
    micro_conditioning: bool = Field(default=False, description="Whether it takes sizes and a crop (SDXL)")
    refiner: str | None = Field(default=None, description="The model that can finish its pictures")
    skip_layer_guidance: SkipLayerGuidance | None = Field(
        default=None, description="The values of `skip_layer_guidance: true`; unset: it is not offered"
    )
    scheduler_config: Mapping[str, str | float | bool] = Field(
        default_factory=dict, description="Laid over the scheduler's config of the weights"
    )
    defaults: Defaults
    limits: Limits
    licence: Licence
    gated: bool = False
    moved_from: tuple[str, ...] = ()
    weights: WeightSource
    weight_sets: Mapping[Vendor, VendorSets] = Field(
        default_factory=dict, description="The vendors' graphs of it, or why there are none"
    )
    weight_set: WeightsChoice = Field(default="auto", description="Which of its weight sets to serve")
    precision: Precision | Literal["auto"] = Field(default="auto", description="In which precision")
    default: bool = False

    @model_validator(mode="after")
    def _scheduler_is_known(self) -> Self:
        try:
            resolve_scheduler(self.defaults.scheduler, self.flow)
        except InvalidRequest as error:
            raise ValueError(f"defaults.{error.message}") from error
        return self

    @model_validator(mode="after")
    def _defaults_fit_the_tasks(self) -> Self:
        for name, kinds in (("clip", {"txt2vid", "img2vid"}), ("solid", {"txt2mesh", "img2mesh"})):
            if bool(kinds & set(self.tasks)) != (getattr(self.defaults, name) is not None):
                raise ValueError(f"defaults.{name} goes with {' and '.join(sorted(kinds))}")
        return self

    def graph_sets(self, vendor: Vendor) -> tuple[GraphSet, ...]:
        """The vendor's sets of this model, the one to prefer first."""
        sets = self.weight_sets.get(vendor, ())
        return () if isinstance(sets, Absence) else sets

    def absence(self, vendor: Vendor) -> str:
        """Why there is no set of the vendor's."""
        sets = self.weight_sets.get(vendor)
        return sets.none if isinstance(sets, Absence) else f"its entry names no weights of {vendor}"

    @property
    def takes_embeddings(self) -> bool:
        """Whether textual inversion is for it: not where a T5 encoder reads the prompt too."""
        return self.pipeline != "StableDiffusion3Pipeline"

    @property
    def flow(self) -> bool:
        """Whether it predicts a flow, for which other schedulers are made."""
        return self.prediction_type == "flow"


class AdapterEntry(HubFile):
    """A LoRA of the hub that ``jubako pull`` fetches, under its name in requests."""

    name: str = Field(pattern=ADAPTER_NAME)
    family: str
    title: str
    summary: str | None = None
    base: tuple[str, ...] = Field(min_length=1, description="The models it is for; it was made for the first")
    trigger: str | None = None
    size_mb: float | None = Field(default=None, gt=0)
    licence: Licence

    def card(self) -> dict[str, Any]:
        """What is known of it, as JSON."""
        kept = {"title", "summary", "trigger", "repo", "revision", "file", "licence"}
        fields = self.model_dump(mode="json", exclude_none=True, include=kept)
        return {"base": self.base[0], "bases": list(self.base), **fields}


class CheckerEntry(_Value):
    """A safety checker in the layout of Stable Diffusion's own: on the hub, or in a folder."""

    name: str
    family: str
    title: str
    repo: str | None = None
    revision: str = "main"
    folder: Path | None = None
    size_mb: float | None = Field(default=None, gt=0)
    licence: Licence

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.repo is None) == (self.folder is None):
            raise ValueError("give one of repo and folder")
        return self


class Resources(_Value):
    """What one replica asks of the machine, in BentoML's words."""

    gpu: int | None = Field(default=None, ge=1)
    gpu_type: str | None = None
    cpu: str | None = None
    memory: str | None = None


class Batching(_Value):
    """``step`` batches denoising steps; ``request`` batches whole requests through BentoML's dispatcher."""

    mode: Literal["step", "request"] = "step"
    max_batch_size: int = Field(default=8, ge=2)
    max_latency_ms: int = Field(gt=0)


class Family(_Value):
    """The models that one service serves, and what that service needs."""

    name: str
    service: str
    title: str
    resources: Resources
    batching: Batching
    job_concurrency: int = Field(default=8, gt=0, description="Durable jobs that are run at the same time")
    models: Mapping[str, Model]
    adapters: Mapping[str, AdapterEntry] = Field(default_factory=dict)
    checkers: Mapping[str, CheckerEntry] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _bases_are_here(self) -> Self:
        for adapter in self.adapters.values():
            for base in adapter.base:
                if base not in self.models:
                    raise ValueError(f"adapters.{adapter.name}.base: {base!r} is no model of this family")
        return self

    @model_validator(mode="after")
    def _refiners_are_here(self) -> Self:
        for model in self.models.values():
            if model.refiner is not None and model.refiner not in self.models:
                raise ValueError(f"models.{model.name}.refiner: {model.refiner!r} is no model of this family")
        return self


class Catalog:
    """Every family, model, adapter and safety checker, by name."""

    def __init__(self, families: Mapping[str, Family]) -> None:
        self.families: Mapping[str, Family] = MappingProxyType(dict(families))
        self._models = {model.name: model for family in families.values() for model in family.models.values()}
        self.adapters: Mapping[str, AdapterEntry] = MappingProxyType(
            {name: adapter for family in families.values() for name, adapter in family.adapters.items()}
        )
        self.checkers: Mapping[str, CheckerEntry] = MappingProxyType(
            {name: checker for family in families.values() for name, checker in family.checkers.items()}
        )

    def __iter__(self) -> Iterator[Model]:
        """The models in the order of their files."""
        return iter(self._models.values())

    @property
    def names(self) -> tuple[str, ...]:
        """The models' names."""
        return tuple(self._models)

    def model(self, name: str) -> Model:
        """The model of that name; UnknownModel lists the known ones."""
        if name in self._models:
            return self._models[name]
        raise UnknownModel(
            f"model: unknown model {name!r}.{nearest(name, self.names)} Known: {', '.join(self.names)}",
            param="model",
        )

    def default_model(self, name: str | None = None) -> Model:
        """The model of a request that names none: the given one, else the catalog's default."""
        if name is not None:
            return self.model(name)
        return next((model for model in self if model.default), next(iter(self)))

    def model_for(self, tasks: tuple[Task, ...], preferred: str | None = None) -> Model:
        """The model of a request that names none: the default if it does one of the tasks, else the first."""
        default = self.default_model(preferred)
        able: list[Model] = [model for model in (default, *self) if set(tasks) & set(model.tasks)]
        if not able:
            raise UnknownModel(
                f"model: no model that is served here does {' or '.join(tasks)}", param="model"
            )
        return able[0]

    def only(self, families: tuple[str, ...]) -> Catalog:
        """The catalog without the families that are not named; no name means all."""
        for name in families:
            if name not in self.families:
                raise CatalogError(f"unknown family {name!r}; known: {', '.join(self.families)}")
        return Catalog({name: self.families[name] for name in families or self.families})


def shipped_folder() -> Path:
    """The folder ``models/`` of the checkout, the bento or the installed package."""
    package = Path(__file__).parent
    for root in (package, package.parent, package.parent.parent):
        if (root / "models").is_dir():
            return root / "models"
    raise CatalogError("no folder models/ beside the package: the installation is incomplete")


def load_catalog(extra: Path | None = None, *, shipped: Path | None = None) -> Catalog:
    """Read the shipped catalog and lay the user's folder over it; CatalogError names file and field."""
    shipped = shipped or shipped_folder()
    raw: dict[str, dict[str, Any]] = {}
    origin: dict[str, str] = {}
    for folder in filter(None, (shipped, extra)):
        files = sorted(folder.glob("*.yaml"))
        if not files:
            raise CatalogError(f"{folder}: no *.yaml file in this folder")
        for file in files:
            document = _read(file)
            family = document["family"]
            raw[family] = _laid_over(raw.get(family, {}), _anchored(document, file))
            origin[family] = f"{origin[family]} + {file.name}" if family in origin else file.name
    families = {name: _family(document, origin[name]) for name, document in raw.items()}
    _refuse_doubles(families)
    # The default model's family first, which is what most people look for.
    families = dict(sorted(families.items(), key=lambda item: not _has_default(item[1])))
    return Catalog(families)


def _read(file: Path) -> dict[str, Any]:
    try:
        document = yaml.load(file.read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506 # it is a safe one
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise CatalogError(f"{file.name}: {error}") from error
    if not isinstance(document, dict) or not isinstance(document.get("family"), str):
        raise CatalogError(f"{file.name}: family: every file names its family on top")
    if not isinstance(document.get("models", {}), dict):
        raise CatalogError(f"{file.name}: models: expected names with their entries")
    return document


def _anchored(document: dict[str, Any], file: Path) -> dict[str, Any]:
    """The document with its folders and files made absolute, since each is relative to its own file."""

    def anchor(holder: Any, *keys: str) -> None:
        for key in keys:
            if isinstance(holder, dict) and isinstance(holder.get(key), str):
                holder[key] = str((file.parent / holder[key]).resolve())

    for checker in document.get("checkers", {}).values():
        anchor(checker, "folder")
    for entry in document.get("models", {}).values():
        weights = entry.get("weights") if isinstance(entry, dict) else None
        anchor(weights, "folder", "file")
        sets = entry.get("weight_sets") if isinstance(entry, dict) else None
        for each in sets.values() if isinstance(sets, dict) else ():
            for graphs in each if isinstance(each, list) else ():
                anchor(graphs, "folder")
        overlay = weights.get("overlay") if isinstance(weights, dict) else None
        if isinstance(overlay, dict) and overlay.get("repo") is None:
            anchor(overlay, "file")
    return document


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _laid_over(old, value) if both and old is not None else value
    return result


def _family(document: Mapping[str, Any], origin: str) -> Family:
    values = {key: value for key, value in document.items() if key != "family"}
    for section in ("models", "adapters", "checkers"):
        if isinstance(entries := values.get(section, {}), dict):
            values[section] = {
                name: {**entry, "name": name, "family": document["family"]}
                if isinstance(entry, dict)
                else entry
                for name, entry in entries.items()
            }
    try:
        return Family.model_validate({**values, "name": document["family"]})
    except ValidationError as error:
        lines = [
            f"{origin}: {'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
        ]
        raise CatalogError("\n".join(lines)) from error


def _has_default(family: Family) -> bool:
    return any(model.default for model in family.models.values())


def _refuse_doubles(families: Mapping[str, Family]) -> None:
    seen: dict[str, str] = {}
    for family in families.values():
        # All are fetched by their names.
        for name in (*family.models, *family.adapters, *family.checkers):
            if name in seen:
                raise CatalogError(
                    f"the name {name!r} stands in the catalog twice: in {seen[name]} and {family.name}"
                )
            seen[name] = family.name
    if sum(model.default for family in families.values() for model in family.models.values()) > 1:
        raise CatalogError("more than one model is marked as default")
