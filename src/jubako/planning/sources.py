"""The picture that is drawn from a prompt first, for models that start from a picture."""

from __future__ import annotations

from jubako.catalog import Catalog, Model
from jubako.clip import TextToVideo
from jubako.errors import InvalidRequest, JubakoError
from jubako.job import Job
from jubako.mesh import TextToMesh
from jubako.planning.bounds import model_of
from jubako.planning.pictures import plan_picture
from jubako.request import TextToImage
from jubako.sizes import fitted_size

__all__ = ["refuse_source", "source_of"]

_FIELDS = ("image_model", "image_num_inference_steps", "image_guidance_scale")


def refuse_source(request: TextToVideo | TextToMesh, model: Model) -> None:
    """Refuse what is only about a picture that is drawn first, for a model that reads the prompt itself."""
    for field in _FIELDS:
        if getattr(request, field) is not None:
            raise InvalidRequest(
                f"{field}: {model.name} reads the prompt itself; no picture is drawn first", param=field
            )


def source_of(
    request: TextToVideo | TextToMesh,
    size: tuple[int, int],
    seed: int,
    catalog: Catalog,
    default_model: str | None,
    *,
    prompt: str,
) -> Job:
    """The picture's job: of this size, or of the same proportions in what the picture's model can draw."""
    model = model_of(request.image_model, ("txt2img",), catalog, default_model, field="image_model")
    width, height = fitted_size(size, None, None, "cover", model)
    picture = TextToImage(
        prompt=prompt,
        negative_prompt=request.negative_prompt,
        model=model.name,
        width=width,
        height=height,
        num_inference_steps=request.image_num_inference_steps,
        guidance_scale=request.image_guidance_scale,
        seed=seed,
    )
    try:
        return plan_picture(picture, catalog)
    except JubakoError as error:
        if f"image_{error.param}" in _FIELDS:
            raise type(error)(f"image_{error.message}", param=f"image_{error.param}") from error
        raise
