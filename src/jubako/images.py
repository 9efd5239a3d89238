"""OpenAI's image routes: what they take beside a picture's own fields, and the jobs that it gives."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field

from jubako.catalog import Catalog
from jubako.errors import InvalidRequest
from jubako.job import Job
from jubako.pictures import alpha_varies, open_picture
from jubako.planning import plan
from jubako.request import ImageToImage, Inpaint, PictureBytes, Request, TextToImage

__all__ = [
    "ImagesEdit",
    "ImagesGenerate",
    "ImagesRequest",
    "ImagesVariation",
    "OpenAIFields",
    "plan_images",
    "sides_of",
]


class OpenAIFields(Request):
    """What OpenAI's image routes take beside the picture's own fields."""

    without_effect: ClassVar[tuple[str, ...]] = ("quality", "style", "moderation", "partial_images")

    n: int = Field(default=1, gt=0, description="Pictures; their seeds count up from the first")
    size: str | None = Field(default=None, description="'auto' or WIDTHxHEIGHT")
    response_format: Literal["b64_json"] | None = Field(default=None, description="How pictures come")
    stream: bool | None = Field(default=None, description="Answer with server-sent events")
    user: str | None = Field(default=None, description="Your own mark for the end user; not used, not logged")
    quality: Literal["auto", "low", "medium", "high", "standard", "hd"] | None = None
    style: Literal["vivid", "natural"] | None = None
    background: Literal["auto", "opaque", "transparent"] | None = None
    moderation: Literal["auto", "low"] | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)

    def ignored(self) -> list[str]:
        """OpenAI's fields that are set and have no meaning here, as warnings."""
        unset = {None, "auto", "opaque", 0}
        return [f"{name} is ignored" for name in self.without_effect if getattr(self, name) not in unset]


class ImagesGenerate(OpenAIFields, TextToImage):
    """OpenAI's ``POST /v1/images/generations`` with our fields at top level."""


def _one(value: object) -> object:
    """The picture of a list of one, as which OpenAI's clients send it."""
    if not isinstance(value, (list, tuple)):
        return value
    if len(value) != 1:
        raise ValueError(f"one picture is taken, not {len(value)}")
    return value[0]


class ImagesEdit(OpenAIFields, ImageToImage):
    """OpenAI's ``POST /v1/images/edits``: inpainting with a mask or transparent areas, else img2img."""

    without_effect = (*OpenAIFields.without_effect, "input_fidelity")

    image: Annotated[PictureBytes, BeforeValidator(_one)] = Field(
        description="The picture: an upload, base64 or a data: URL"
    )
    mask: PictureBytes | None = Field(
        default=None,
        description="As large as the picture; unset: what is transparent in the picture itself is made anew",
    )
    input_fidelity: Literal["low", "high"] | None = None


class ImagesVariation(OpenAIFields, ImageToImage):
    """OpenAI's ``POST /v1/images/variations``: a weak image to image, by default without a prompt."""

    prompt: str = Field(default="", description="What the picture shows")
    strength: float | None = Field(
        default=0.6, ge=0, le=1, description="How much is made anew: 0 keeps the picture, 1 ignores it"
    )


ImagesRequest = ImagesGenerate | ImagesEdit | ImagesVariation


def plan_images(request: ImagesRequest, catalog: Catalog, default_model: str | None = None) -> list[Job]:
    """The ``n`` jobs of a request; raises as :func:`jubako.planning.plan` does."""
    if request.background == "transparent":
        raise InvalidRequest(
            "background: models draw opaque pictures; use opaque or auto", param="background"
        )
    sides = sides_of(request.size, request.width, request.height)
    sized = request.model_copy(update=sides) if sides else request
    job = plan(_by_mask(sized) if isinstance(sized, ImagesEdit) else sized, catalog, default_model)
    limits = catalog.model(job.model).limits
    if request.n > limits.max_n:
        raise InvalidRequest(
            f"n: {request.n} is past the limit of {limits.max_n} pictures a request", param="n"
        )
    return job.siblings(request.n)


def sides_of(size: str | None, width: int | None, height: int | None) -> dict[str, int]:
    """OpenAI's ``size``, ``auto`` or ``WIDTHxHEIGHT``, as width and height; it goes without those."""
    if not size or size == "auto":
        return {}
    if width or height:
        raise InvalidRequest("size: give either size or width and height", param="size")
    if not (match := re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", size)):
        raise InvalidRequest(
            f"size: {size!r} is not a size; use auto or WIDTHxHEIGHT, as in 512x512", param="size"
        )
    asked = {"width": int(match[1]), "height": int(match[2])}
    if not all(asked.values()):
        raise InvalidRequest(f"size: {size!r} has a side of no pixels", param="size")
    return asked


def _by_mask(edit: ImagesEdit) -> TextToImage:
    """The edit as inpainting where it says what to paint: by a mask, or by what is transparent."""
    mask = edit.mask
    if mask is None and alpha_varies(open_picture(edit.image, "image")):
        mask = edit.image
    if mask is None:
        return edit
    fields = {name: getattr(edit, name) for name in Inpaint.model_fields}
    return Inpaint.model_construct(**{**fields, "mask": mask})
