"""Jobs of 3D objects: from a prompt, from a picture, or from a picture that is drawn of the prompt first."""

from __future__ import annotations

from jubako.catalog import Catalog, Model
from jubako.errors import InvalidRequest
from jubako.job import Job, Solid, new_id
from jubako.mesh import ImageToMesh, MeshRequest, TextToMesh
from jubako.pictures import opaque, open_picture, png, squared
from jubako.planning.bounds import drawn_seed, legal_guidance, legal_prompt, legal_steps, model_of, within
from jubako.planning.sources import refuse_source, source_of
from jubako.request import Task

__all__ = ["plan_mesh"]

# H.264 halves the resolution of colours.
VIEWS_MULTIPLE_OF = 2
LEAST_VIEW = 32


def plan_mesh(request: MeshRequest, catalog: Catalog, default_model: str | None = None) -> Job:
    """The job of one object. With ``image_model``, or a model of pictures, the picture's job comes first."""
    if isinstance(request, ImageToMesh):
        model = model_of(request.model, ("img2mesh",), catalog)
        picture = squared(opaque(open_picture(request.image, "image")), model.defaults.width)
        return _job(request, model).model_copy(update={"image": png(picture)})
    assert isinstance(request, TextToMesh)  # noqa: S101 # there are two kinds
    model = model_of(request.model, _tasks(request), catalog)
    job = _job(request, model)
    if "txt2mesh" in model.tasks:
        refuse_source(request, model)
        if request.negative_prompt:
            raise InvalidRequest(f"negative_prompt: {model.name} does not take it", param="negative_prompt")
        return job.model_copy(
            update={"task": "txt2mesh", "prompt": legal_prompt("prompt", request.prompt, model)}
        )
    # Models of objects know them on white; what the prompt says of a background goes before.
    prompt = request.prompt if "background" in request.prompt else f"{request.prompt} on a white background"
    side = model.defaults.width
    source = source_of(request, (side, side), job.seed, catalog, default_model, prompt=prompt)
    return job.model_copy(update={"source": source, "warnings": source.warnings})


def _tasks(request: TextToMesh) -> tuple[Task, ...]:
    if request.model is None and request.image_model is not None:
        return ("img2mesh",)
    return ("txt2mesh", "img2mesh")


def _job(request: MeshRequest, model: Model) -> Job:
    """The object's job but for what it starts from."""
    return Job(
        id=new_id(),
        task="img2mesh",
        family=model.family,
        model=model.name,
        prompt="",
        negative_prompt="",
        width=model.defaults.width,
        height=model.defaults.height,
        num_inference_steps=legal_steps(request.num_inference_steps, model),
        guidance_scale=legal_guidance(request.guidance_scale, model),
        scheduler=model.defaults.scheduler,
        seed=drawn_seed(request.seed),
        solid=_solid(request, model),
        output_format=request.output_format,
        output_compression=90,
    )


def _solid(request: MeshRequest, model: Model) -> Solid:
    own, limits = model.defaults.solid, model.limits
    assert own is not None  # noqa: S101 # the catalog sees to it that models of objects have it
    solid = Solid(
        grid_size=request.grid_size or own.grid_size,
        frame_size=request.frame_size or own.frame_size,
        turntable=request.turntable or request.output_format in {"mp4", "gif"},
    )
    within("grid_size", solid.grid_size, 8, limits.max_grid_size, model)
    within("frame_size", solid.frame_size, LEAST_VIEW, limits.max_frame_size, model)
    if solid.frame_size % VIEWS_MULTIPLE_OF:
        raise InvalidRequest(
            f"frame_size: {solid.frame_size} is odd; take an even number", param="frame_size"
        )
    return solid
