"""Jobs of clips: a picture set in motion, a prompt filmed, or a prompt drawn first and then set in motion."""

from __future__ import annotations

from jubako.catalog import Catalog, Model
from jubako.clip import ClipRequest, ImageToVideo, TextToVideo
from jubako.errors import InvalidRequest
from jubako.job import Clip, Job, new_id
from jubako.pictures import opaque, open_picture, png, resized
from jubako.planning.bounds import drawn_seed, legal_guidance, legal_prompt, legal_steps, model_of, within
from jubako.planning.sources import refuse_source, source_of
from jubako.request import Task
from jubako.sizes import fitted_size, legal_size

__all__ = ["plan_clip"]


def plan_clip(request: ClipRequest, catalog: Catalog, default_model: str | None = None) -> Job:
    """The job of one clip. Where its model reads no text, the picture's job comes first, as its source."""
    tasks: tuple[Task, ...] = (request.task, "img2vid") if isinstance(request, TextToVideo) else ("img2vid",)
    model = model_of(request.model, tasks, catalog)
    if isinstance(request, ImageToVideo):
        picture = opaque(open_picture(request.image, "image"))
        size = fitted_size(picture.size, *_asked_size(request, model), request.resize_mode, model)
        job = _job(request, model, size)
        return job.model_copy(update={"image": png(resized(picture, size, request.resize_mode))})
    assert isinstance(request, TextToVideo)  # noqa: S101 # there are two kinds
    job = _job(request, model, legal_size(request.width, request.height, model))
    if "txt2vid" in model.tasks:
        refuse_source(request, model)
        negative = legal_prompt("negative_prompt", request.negative_prompt or "", model)
        texts = {"prompt": legal_prompt("prompt", request.prompt, model), "negative_prompt": negative}
        return job.model_copy(update={"task": "txt2vid", **texts})
    source = source_of(
        request, (job.width, job.height), job.seed, catalog, default_model, prompt=request.prompt
    )
    return job.model_copy(update={"source": source, "warnings": source.warnings})


def _asked_size(request: ImageToVideo, model: Model) -> tuple[int | None, int | None]:
    """Without a size asked for, the model's own: it was trained on that one, whatever the picture's is."""
    if request.width is None and request.height is None:
        return model.defaults.width, model.defaults.height
    return request.width, request.height


def _job(request: ClipRequest, model: Model, size: tuple[int, int]) -> Job:
    """The clip's job but for what it starts from."""
    return Job(
        id=new_id(),
        task="img2vid",
        family=model.family,
        model=model.name,
        prompt="",
        negative_prompt="",
        width=size[0],
        height=size[1],
        num_inference_steps=legal_steps(request.num_inference_steps, model),
        guidance_scale=legal_guidance(request.max_guidance_scale, model, "max_guidance_scale"),
        scheduler=model.defaults.scheduler,
        seed=drawn_seed(request.seed),
        clip=_clip(request, model),
        output_format=request.output_format,
        output_compression=request.output_compression,
    )


def _clip(request: ClipRequest, model: Model) -> Clip:
    own, limits = model.defaults.clip, model.limits
    assert own is not None  # noqa: S101 # the catalog sees to it that models of clips have it
    asked = {name: value for name in Clip.model_fields if (value := getattr(request, name)) is not None}
    for name in asked:
        if getattr(own, name) is None:
            raise InvalidRequest(f"{name}: {model.name} does not take it", param=name)
    clip = own.model_copy(update=asked)
    within("num_frames", clip.num_frames, limits.min_num_frames, limits.max_num_frames, model)
    within("fps", clip.fps, 1, limits.max_fps, model)
    if clip.motion_bucket_id is not None:
        within("motion_bucket_id", clip.motion_bucket_id, 0, limits.max_motion_bucket_id, model)
    if clip.min_guidance_scale is not None:
        _check_order(clip.min_guidance_scale, request, model)
    return clip.model_copy(update={"decode_chunk_size": min(clip.decode_chunk_size, clip.num_frames)})


def _check_order(least: float, request: ClipRequest, model: Model) -> None:
    """Guidance rises from the first frame to the last."""
    most = legal_guidance(request.max_guidance_scale, model, "max_guidance_scale")
    if request.min_guidance_scale is not None and least > most:
        raise InvalidRequest(
            f"min_guidance_scale: {least:g} is more than max_guidance_scale, which is {most:g}",
            param="min_guidance_scale",
        )
