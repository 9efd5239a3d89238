"""A comparison: one prompt and one seed on several models, and along one more axis. All is planned first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictFloat, StrictInt, StrictStr, ValidationError

from jubako.catalog import Catalog, Model
from jubako.errors import InvalidRequest, JubakoError, UnknownModel, refusal
from jubako.job import Job
from jubako.planning import plan
from jubako.planning.bounds import drawn_seed
from jubako.request import ImageToImage, Inpaint, PictureBytes, Request, ResizeMode, TextToImage

__all__ = ["MAX_PICTURES", "Axis", "Cell", "Comparison", "plan_comparison"]

MAX_PICTURES = 32

AxisField = Literal["num_inference_steps", "guidance_scale", "scheduler", "strength"]
Value = StrictInt | StrictFloat | StrictStr

_OTHER_NAMES = {"steps": "num_inference_steps", "cfg_scale": "guidance_scale", "sampler": "scheduler"}


def _full_name(value: object) -> object:
    return _OTHER_NAMES.get(value, value) if isinstance(value, str) else value


def _words(value: object) -> object:
    return [word.strip() for word in value.split(",")] if isinstance(value, str) else value


class Axis(Request):
    """The field that differs from column to column."""

    field: Annotated[AxisField, BeforeValidator(_full_name)]
    values: Annotated[tuple[Value, ...], BeforeValidator(_words)] = Field(min_length=1, max_length=8)


class Comparison(TextToImage):
    """``POST /v1/images/compare``: a row of pictures a model, a column a value of the axis."""

    models: Annotated[tuple[str, ...], BeforeValidator(_words)] = Field(
        min_length=1, max_length=8, description="The models, each a row"
    )
    axis: Axis | None = Field(default=None, description="{field, values}: what differs from column to column")
    image: PictureBytes | None = Field(default=None, description="A picture to start from")
    mask: PictureBytes | None = Field(default=None, description="What of the picture is made anew")
    strength: float | None = Field(default=None, ge=0, le=1, description="How much is made anew")
    resize_mode: ResizeMode | None = Field(default=None, description="When sizes differ")


@dataclass(frozen=True)
class Cell:
    """One picture of a comparison: its job and where it stands."""

    model: str
    value: int | float | str | None
    job: Job


def plan_comparison(request: Comparison, catalog: Catalog) -> list[list[Cell]]:
    """The jobs, a row a model. InvalidRequest names the model and the field of the first bad one."""
    _check(request)
    values = request.axis.values if request.axis else (None,)
    if (pictures := len(request.models) * len(values)) > MAX_PICTURES:
        raise InvalidRequest(
            f"models: {len(request.models)} models and {len(values)} values are {pictures} pictures; at most "
            f"{MAX_PICTURES} are made at once",
            param="models",
        )
    seed = drawn_seed(request.seed)
    rows = [catalog.model(name) for name in request.models]
    return [[_cell(request, model, value, seed, catalog) for value in values] for model in rows]


def _check(request: Comparison) -> None:
    for field, message in _faults(request):
        raise InvalidRequest(f"{field}: {message}", param=field)


def _faults(request: Comparison) -> Iterator[tuple[str, str]]:
    axis = request.axis
    if request.model is not None:
        yield "model", "name the models in models"
    if len(set(request.models)) < len(request.models):
        yield "models", "a model is named twice"
    if axis and len(set(axis.values)) < len(axis.values):
        yield "axis.values", "a value is named twice"
    if axis and getattr(request, axis.field) is not None:
        yield axis.field, "it is the axis; give its values there only"
    if request.image is None:
        for field in ("mask", "strength", "resize_mode"):
            if getattr(request, field) is not None:
                yield field, "there is no image for it"
        if axis and axis.field == "strength":
            yield "axis.field", "strength needs an image to start from"


def _cell(request: Comparison, model: Model, value: float | str | None, seed: int, catalog: Catalog) -> Cell:
    axis = request.axis
    try:
        if axis and axis.field == "guidance_scale" and not model.guidance:
            raise InvalidRequest(
                "guidance_scale: the model was made to run without guidance", param="guidance_scale"
            )
        asked = _asked(request, {"model": model.name, "seed": seed} | ({axis.field: value} if axis else {}))
        shown = getattr(asked, axis.field) if axis else None
        return Cell(model.name, shown, plan(asked, catalog))
    except UnknownModel:
        raise
    except JubakoError as error:
        where = f"{model.name} at {axis.field} {value}" if axis else model.name
        raise InvalidRequest(f"{where}: {error.message}", param=error.param) from error


def _asked(request: Comparison, own: dict[str, Any]) -> TextToImage:
    """What a cell asks, as if it were asked alone."""
    kind: type[TextToImage] = TextToImage
    if request.image is not None:
        kind = ImageToImage if request.mask is None else Inpaint
    given = {name: getattr(request, name) for name in request.model_fields_set}
    fields = {name: value for name, value in given.items() if name in kind.model_fields and value is not None}
    try:
        return kind.model_validate(fields | own)
    except ValidationError as error:
        raise refusal(error.errors(include_input=False)) from error
