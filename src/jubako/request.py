"""What clients ask. Unset fields stay unset; unknown ones are refused by name with the nearest known one.

Only what needs no catalog is checked here; the limits of a model are :mod:`jubako.planning`'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
from pydantic import ModelWrapValidatorHandler as Handler
from pydantic_core import InitErrorDetails, PydanticCustomError

from jubako.errors import nearest

__all__ = ["ImagesGenerate", "OutputFormat", "Request", "TextToImage"]

OutputFormat = Literal["png", "jpeg", "webp"]


def _jpg(value: object) -> object:
    return "jpeg" if value == "jpg" else value


class Request(BaseModel):
    """The base of every request: frozen, and strict about names."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    @model_validator(mode="wrap")
    @classmethod
    def _name_unknown_fields(cls, data: Any, handler: Handler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            details = [cls._explained(detail) for detail in error.errors()]
            raise ValidationError.from_exception_data(error.title, details) from error

    @classmethod
    def _explained(cls, detail: Any) -> InitErrorDetails:
        if detail["type"] != "extra_forbidden":
            # Pydantic's own text is kept; it names the bound or the choices.
            message = str(detail["msg"]).replace("{", "{{").replace("}", "}}")
            return {
                "type": PydanticCustomError(detail["type"], message),
                "loc": detail["loc"],
                "input": detail["input"],
            }
        name = str(detail["loc"][-1])
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
    def field_names(cls) -> Iterator[str]:
        """Every name that a field goes by, aliases included."""
        for name, field in cls.model_fields.items():
            yield name
            if isinstance(field.validation_alias, AliasChoices):
                yield from (str(alias) for alias in field.validation_alias.choices if alias != name)


class TextToImage(Request):
    """A prompt and how to turn it into one picture."""

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
    output_format: Annotated[OutputFormat, BeforeValidator(_jpg)] = Field(
        default="png", description="The picture's file format"
    )
    output_compression: int = Field(
        default=90, ge=0, le=100, description="The quality of JPEG and WebP, in per cent"
    )


class ImagesGenerate(TextToImage):
    """OpenAI's ``POST /v1/images/generations`` with our fields at top level."""

    n: int = Field(default=1, gt=0, description="Pictures; their seeds count up from the first")
    size: str | None = Field(default=None, description="'auto' or WIDTHxHEIGHT")
    response_format: Literal["b64_json"] | None = Field(default=None, description="How pictures come")
    stream: bool | None = Field(default=None, description="Answer with server-sent events")
    user: str | None = Field(default=None, description="Your own mark for the end user; only logged")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    moderation: Literal["auto", "low"] | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)

    def ignored(self) -> list[str]:
        """OpenAI's fields that are set and have no meaning here, as warnings."""
        names = ("quality", "style", "moderation", "partial_images")
        unset = {None, "auto", "opaque", 0}
        return [f"{name} is ignored" for name in names if getattr(self, name) not in unset]
