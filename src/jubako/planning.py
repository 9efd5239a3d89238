"""A request and the catalog give a job: the model resolved, every field filled and legal, the seed drawn."""

from __future__ import annotations

import re
import secrets
import uuid

from pydantic import BaseModel, ConfigDict

from jubako.catalog import Catalog, Model, Task
from jubako.errors import InvalidRequest
from jubako.request import ImagesGenerate, OutputFormat, TextToImage
from jubako.schedulers import resolve_scheduler

__all__ = ["Job", "plan", "plan_images"]

# What other programs draw and show: AUTOMATIC1111 and ComfyUI's older nodes read seeds as 32 bits.
DRAWN_SEEDS = 2**32


class Job(BaseModel):
    """A request made complete and legal. Nothing after planning has a choice left to make."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    task: Task
    family: str
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    seed: int
    output_format: OutputFormat
    output_compression: int

    def siblings(self, n: int) -> list[Job]:
        """This job ``n`` times, each with an id of its own and the next seed."""
        return [self.model_copy(update={"id": _new_id(), "seed": (self.seed + i) % 2**63}) for i in range(n)]


def plan(request: TextToImage, catalog: Catalog, default_model: str | None = None) -> Job:
    """Resolve a request into a job; raises UnknownModel, or InvalidRequest that names field and choices."""
    model = catalog.model(request.model) if request.model else catalog.default_model(default_model)
    if "txt2img" not in model.tasks:
        raise InvalidRequest(
            f"model: {model.name} does not do txt2img; it does: {', '.join(model.tasks)}", param="model"
        )
    defaults = model.defaults
    width, height = _size(request.width, request.height, model)
    guidance_scale = request.guidance_scale
    return Job(
        id=_new_id(),
        task="txt2img",
        family=model.family,
        model=model.name,
        prompt=_prompt("prompt", request.prompt, model),
        negative_prompt=_prompt("negative_prompt", request.negative_prompt or "", model),
        width=width,
        height=height,
        num_inference_steps=_at_most(
            "num_inference_steps",
            request.num_inference_steps or defaults.num_inference_steps,
            model.limits.max_num_inference_steps,
            model,
        ),
        guidance_scale=_at_most(
            "guidance_scale",
            defaults.guidance_scale if guidance_scale is None else guidance_scale,
            model.limits.max_guidance_scale,
            model,
        ),
        scheduler=resolve_scheduler(request.scheduler or defaults.scheduler).name,
        seed=secrets.randbelow(DRAWN_SEEDS) if request.seed is None else request.seed,
        output_format=request.output_format,
        output_compression=request.output_compression,
    )


def plan_images(request: ImagesGenerate, catalog: Catalog, default_model: str | None = None) -> list[Job]:
    """The ``n`` jobs of an OpenAI request; raises as :func:`plan` does."""
    if request.background == "transparent":
        raise InvalidRequest(
            "background: models draw opaque pictures; use opaque or auto", param="background"
        )
    if request.size and request.size != "auto":
        if request.width or request.height:
            raise InvalidRequest("size: give either size or width and height", param="size")
        if not (match := re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", request.size)):
            raise InvalidRequest(
                f"size: {request.size!r} is not a size; use auto or WIDTHxHEIGHT, as in 512x512", param="size"
            )
        width, height = map(int, match.groups())
        request = request.model_copy(update={"width": width, "height": height})
    job = plan(request, catalog, default_model)
    limits = catalog.model(job.model).limits
    if request.n > limits.max_n:
        raise InvalidRequest(
            f"n: {request.n} is past the limit of {limits.max_n} pictures a request", param="n"
        )
    return job.siblings(request.n)


def _new_id() -> str:
    return uuid.uuid4().hex


def _prompt(field: str, text: str, model: Model) -> str:
    limit = model.limits.max_prompt_characters
    if len(text) > limit:
        raise InvalidRequest(
            f"{field}: {len(text)} characters are past the limit of {limit} of {model.name}", param=field
        )
    return text


def _at_most(field: str, value: float, limit: float, model: Model) -> float:
    if value > limit:
        raise InvalidRequest(f"{field}: {value} is past the limit of {limit} of {model.name}", param=field)
    return value


def _size(width: int | None, height: int | None, model: Model) -> tuple[int, int]:
    width = _side("width", width or model.defaults.width, model)
    height = _side("height", height or model.defaults.height, model)
    limit = model.limits.max_pixels
    if width * height > limit:
        raise InvalidRequest(
            f"width: {width}x{height} is past the limit of {limit} pixels of {model.name}", param="width"
        )
    return width, height


def _side(field: str, value: int, model: Model) -> int:
    limits = model.limits
    if not limits.min_side <= value <= limits.max_side:
        raise InvalidRequest(
            f"{field}: {value} is outside of {limits.min_side} to {limits.max_side} of {model.name}",
            param=field,
        )
    if value % limits.multiple_of:
        below = value - value % limits.multiple_of
        nearest_legal = [
            side for side in (below, below + limits.multiple_of) if limits.min_side <= side <= limits.max_side
        ]
        raise InvalidRequest(
            f"{field}: {value} is not a multiple of {limits.multiple_of}; the nearest legal are "
            f"{' and '.join(map(str, nearest_legal))}",
            param=field,
        )
    return value
