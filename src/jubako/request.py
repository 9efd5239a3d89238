"""What clients ask. Unset fields stay unset; unknown ones are refused by name with the nearest known one.

Only what needs no catalog is checked here; the limits of a model are :mod:`jubako.planning`'s.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic import ModelWrapValidatorHandler as Handler
from pydantic_core import InitErrorDetails, PydanticCustomError

from jubako.errors import nearest

__all__ = [
    "ADAPTER_NAME",
    "MAX_FILE_BYTES",
    "ImageToImage",
    "Inpaint",
    "Lora",
    "OutputFormat",
    "PictureBytes",
    "PictureFormat",
    "Request",
    "ResizeMode",
    "SkipLayerGuidance",
    "Task",
    "TextToImage",
]

Task = Literal["txt2img", "img2img", "inpaint", "img2vid", "txt2vid", "img2mesh", "txt2mesh"]
PictureFormat = Literal["png", "jpeg", "webp"]
OutputFormat = Literal["png", "jpeg", "webp", "gif", "mp4", "zip", "glb", "obj"]
ResizeMode = Literal["cover", "fit", "exact"]

# No path can be spelled in it.
ADAPTER_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

MAX_FILE_BYTES = 50 * 2**20

_DATA_URL = re.compile(r"data:[^,]{0,200};base64,", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://", re.IGNORECASE)


def _jpg(value: object) -> object:
    return "jpeg" if value == "jpg" else value


class Request(BaseModel):
    """The base of every request: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @property
    def holds_files(self) -> bool:
        """Whether any of its fields is a file's content."""
        return any(isinstance(value, bytes) for value in self.__dict__.values())

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_fields(cls, data: Any, handler: Handler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            details = [cls._explained(detail) for detail in error.errors()]
            raise ValidationError.from_exception_data(error.title, details) from error

    @field_validator("*", mode="before", check_fields=False)
    @classmethod
    def _refuse_what_is_no_value(cls, value: object, info: ValidationInfo) -> object:
        """Truth is no number, and half a surrogate pair, which JSON can spell, is no letter."""
        if isinstance(value, bool) and not _takes_truth(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(f"{str(value).lower()} is no value for it")
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise ValueError("it has half a surrogate pair, which is no character") from None
        return value

    @classmethod
    def _explained(cls, detail: Any) -> InitErrorDetails:
        if detail["type"] != "extra_forbidden":
            # Pydantic's own text is kept; it names the bound or the choices.
            message = str(detail["msg"]).removeprefix("Value error, ").replace("{", "{{").replace("}", "}}")
            return {
                "type": PydanticCustomError(detail["type"], message),
                "loc": detail["loc"],
                "input": detail["input"],
            }
        name = str(detail["loc"][-1])
        if field := cls._field_called(name):
            return {
                "type": PydanticCustomError(
                    "given_twice",
                    "{name} is another name of {field}; give one of them",
                    {"name": name, "field": field},
                ),
                "loc": detail["loc"],
                "input": None,
            }
        return {
            "type": PydanticCustomError(
                "unknown_field",
                "unknown field {name}.{hint} Known: {known}",
                {
                    "name": repr(name),
                    "hint": nearest(name, cls.field_names()),
                    "known": ", ".join(cls.model_fields),
                },
            ),
            "loc": detail["loc"],
            "input": None,
        }

    @classmethod
    def _field_called(cls, alias: str) -> str | None:
        for name, field in cls.model_fields.items():
            if isinstance(field.validation_alias, AliasChoices) and alias in field.validation_alias.choices:
                return name
        return None

    @classmethod
    def field_names(cls) -> Iterator[str]:
        """Every name that a field goes by, aliases included."""
        for name, field in cls.model_fields.items():
            yield name
            if isinstance(field.validation_alias, AliasChoices):
                yield from (str(alias) for alias in field.validation_alias.choices if alias != name)


def _takes_truth(annotation: Any) -> bool:
    return annotation is bool or any(_takes_truth(member) for member in get_args(annotation))


def _picture(value: object) -> object:
    """A picture's file from base64 or a ``data:`` URL; nothing is ever fetched."""
    if not isinstance(value, str):
        return value
    if _ADDRESS.match(value):
        raise ValueError("addresses are not fetched; send the picture as an upload, base64 or a data: URL")
    match = _DATA_URL.match(value)
    try:
        return base64.b64decode("".join(value[match.end() if match else 0 :].split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("not base64 of a picture's file, and not a data: URL") from error


def _small_enough(data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise PydanticCustomError(
            "too_large", "a file of more than {limit} MB is not taken", {"limit": MAX_FILE_BYTES // 2**20}
        )
    return data


PictureBytes = Annotated[bytes, BeforeValidator(_picture), AfterValidator(_small_enough), Field(min_length=1)]
"""The bytes of a picture's file: an upload's, or decoded from base64 or a ``data:`` URL."""

Side = Annotated[int, Field(gt=0, le=16384)]
Offset = Annotated[int, Field(ge=0, le=16384)]
# Not tuple[Side, Side]: BentoML's client fails on the schema of a tuple with a type for each place.
Size = Annotated[tuple[Side, ...], Field(min_length=2, max_length=2)]
Corner = Annotated[tuple[Offset, ...], Field(min_length=2, max_length=2)]


class SkipLayerGuidance(Request):
    """SD3.5's second guidance: away from what the denoiser predicts without some of its layers.

    ``start`` and ``stop`` are shares of the steps.
    """

    layers: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    scale: float = Field(default=2.8, gt=0, allow_inf_nan=False)
    start: float = Field(default=0.01, ge=0, le=1)
    stop: float = Field(default=0.2, ge=0, le=1)


class Lora(Request):
    """An adapter of ``jubako adapters`` and how strongly it works."""

    name: str = Field(pattern=ADAPTER_NAME)
    weight: float = Field(default=1.0, ge=-4, le=4, allow_inf_nan=False)


def _share(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    try:
        return handler(value)
    except ValidationError as error:
        raise ValueError("take true, false or a share of the steps between 0 and 1") from error


def _values(value: object, handler: ValidatorFunctionWrapHandler) -> object:
    if isinstance(value, dict):
        return SkipLayerGuidance.model_validate(value)
    try:
        return handler(value)
    except ValidationError as error:
        raise ValueError("take true, false or an object of layers, scale, start and stop") from error


class TextToImage(Request):
    """A prompt and how to turn it into one picture."""

    task: ClassVar[Task] = "txt2img"

    prompt: str = Field(description="What the picture shows")
    model: str | None = Field(default=None, description="A model's name; unset: the default model")
    negative_prompt: str | None = Field(default=None, description="What the picture should not show")
    width: int | None = Field(default=None, gt=0, description="Pixels; unset: the model's own size")
    height: int | None = Field(default=None, gt=0, description="Pixels; unset: the model's own size")
    num_inference_steps: int | None = Field(
        default=None,
        gt=0,
        description="Denoising steps",
        validation_alias=AliasChoices("num_inference_steps", "steps"),
    )
    guidance_scale: float | None = Field(
        default=None,
        ge=0,
        allow_inf_nan=False,
        description="How strongly the prompt steers; at 1 and below it does so without a second row",
        validation_alias=AliasChoices("guidance_scale", "cfg_scale"),
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="The same seed gives the same picture; unset: drawn"
    )
    scheduler: str | None = Field(
        default=None,
        description="A sampler's name ('Euler a', 'DPM++ 2M Karras') or a diffusers class",
        validation_alias=AliasChoices("scheduler", "sampler"),
    )
    refiner: Annotated[bool | Annotated[float, Field(gt=0, lt=1)] | None, WrapValidator(_share)] = Field(
        default=None,
        description="Let the model's refiner finish: true, or the share of the steps after which (0.8)",
    )
    original_size: Size | None = Field(
        default=None, description="SDXL: [width, height] that the picture is to look scaled from"
    )
    crop: Corner | None = Field(
        default=None, description="SDXL: [left, top] at which the picture is to look cropped"
    )
    target_size: Size | None = Field(
        default=None, description="SDXL: [width, height] that the picture is to look made for"
    )
    max_sequence_length: int | None = Field(
        default=None, gt=0, description="SD3: tokens of the prompt that the T5 encoder reads"
    )
    skip_layer_guidance: Annotated[bool | SkipLayerGuidance | None, WrapValidator(_values)] = Field(
        default=None, description="SD3.5 Medium: true, or {layers, scale, start, stop}"
    )
    loras: tuple[Lora, ...] | None = Field(
        default=None,
        max_length=8,
        description="Adapters, as {name, weight}; `<lora:name:0.8>` in the prompt does the same; unset: "
        "those that were trained here and whose trigger is in the prompt",
        validation_alias=AliasChoices("loras", "lora"),
    )
    embeddings: tuple[Annotated[str, Field(pattern=ADAPTER_NAME)], ...] | None = Field(
        default=None,
        max_length=8,
        description="Names of embeddings whose words are in a prompt; `<embedding:name>` there does the same"
        "; unset: those that were trained here and whose trigger is in the prompt",
    )
    output_format: Annotated[PictureFormat, BeforeValidator(_jpg)] = Field(
        default="png", description="The picture's file format"
    )
    output_compression: int = Field(
        default=90, ge=0, le=100, description="The quality of JPEG and WebP, in per cent"
    )


class ImageToImage(TextToImage):
    """A picture to start from, and a prompt of what to make of it."""

    task: ClassVar[Task] = "img2img"

    image: PictureBytes = Field(description="The picture: an upload, base64 or a data: URL")
    strength: float | None = Field(
        default=None, ge=0, le=1, description="How much is made anew: 0 keeps the picture, 1 ignores it"
    )
    resize_mode: ResizeMode = Field(
        default="cover",
        description="When sizes differ: cover fills and crops, fit changes the asked size, exact distorts",
    )


class Inpaint(ImageToImage):
    """A picture of which the masked area is made anew."""

    task: ClassVar[Task] = "inpaint"

    mask: PictureBytes = Field(
        description="As large as the picture: transparent where to paint, or without alpha white"
    )
