"""Jobs of single pictures, from text, a picture or a picture and a mask."""

from __future__ import annotations

from typing import Any

from jubako.catalog import Catalog, Model
from jubako.errors import InvalidRequest
from jubako.job import Job, MicroConditioning, Refinement, new_id
from jubako.pictures import opaque, open_mask, open_picture, png, resized
from jubako.planning.bounds import drawn_seed, legal_guidance, legal_prompt, legal_steps, model_of
from jubako.planning.embeddings import embeddings_of
from jubako.planning.loras import loras_of
from jubako.request import ImageToImage, Inpaint, SkipLayerGuidance, TextToImage
from jubako.schedulers import resolve_scheduler
from jubako.sizes import fitted_size, legal_size

__all__ = ["plan_picture"]

REFINER_AFTER = 0.8


def plan_picture(request: TextToImage, catalog: Catalog, default_model: str | None = None) -> Job:
    """The job of one picture."""
    model = model_of(request.model, (request.task,), catalog, default_model)
    pictures = _pictures(request, model)
    defaults = model.defaults
    guidance_scale, warnings = _guidance(request, model)
    width, height = pictures.pop("size", None) or legal_size(request.width, request.height, model)
    steps = legal_steps(request.num_inference_steps, model)
    asked = defaults.scheduler if request.scheduler is None else request.scheduler
    scheduler = resolve_scheduler(asked, model.flow)
    prompt, loras = loras_of(legal_prompt("prompt", request.prompt, model), request.loras or (), model)
    negative_prompt = legal_prompt("negative_prompt", request.negative_prompt or "", model)
    return Job(
        id=new_id(),
        task=request.task,
        family=model.family,
        model=model.name,
        prompt=prompt,
        negative_prompt=negative_prompt,
        width=width,
        height=height,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler.name,
        seed=drawn_seed(request.seed),
        **pictures,
        strength=_strength(request, steps, model),
        refinement=_refinement(request, model),
        micro_conditioning=_micro_conditioning(request, (width, height), model),
        max_sequence_length=_max_sequence_length(request, model),
        skip_layer_guidance=_skip_layer_guidance(request, model),
        loras=loras,
        embeddings=embeddings_of(prompt, negative_prompt, request.embeddings or (), model),
        output_format=request.output_format,
        output_compression=request.output_compression,
        warnings=warnings,
    )


def _pictures(request: TextToImage, model: Model) -> dict[str, Any]:
    """The job's ``image`` and ``mask``, and the ``size`` that they have; nothing for text alone."""
    if not isinstance(request, ImageToImage):
        return {}
    picture = opaque(open_picture(request.image, "image"))
    size = fitted_size(picture.size, request.width, request.height, request.resize_mode, model)
    found: dict[str, Any] = {"size": size, "image": png(resized(picture, size, request.resize_mode))}
    if isinstance(request, Inpaint):
        mask = open_mask(request.mask, "mask")
        if mask.size != picture.size:
            raise InvalidRequest(
                f"mask: it has {mask.width}x{mask.height} pixels, the picture {picture.width}x"
                f"{picture.height}; both must have the same size",
                param="mask",
            )
        found["mask"] = png(resized(mask, size, request.resize_mode))
    return found


def _guidance(request: TextToImage, model: Model) -> tuple[float, tuple[str, ...]]:
    """The guidance scale, and warnings of what has no effect."""
    if not model.guidance:
        ignored = [
            name
            for name, given in (
                ("guidance_scale", (request.guidance_scale or 0) > 1),
                ("negative_prompt", request.negative_prompt),
            )
            if given
        ]
        return model.defaults.guidance_scale, tuple(
            f"{name} is ignored: {model.name} was made to run without guidance" for name in ignored
        )
    scale = legal_guidance(request.guidance_scale, model)
    if scale <= 1 and request.negative_prompt:
        return scale, ("negative_prompt has no effect at a guidance_scale of 1 or below",)
    return scale, ()


def _strength(request: TextToImage, steps: int, model: Model) -> float | None:
    if not isinstance(request, ImageToImage):
        return None
    strength = model.defaults.strength if request.strength is None else request.strength
    if int(steps * strength) < 1:
        raise InvalidRequest(
            f"strength: {strength:g} of {steps} steps is less than one step, which would give the picture "
            f"back as it is; with {steps} steps take at least {_least_strength(steps):g}",
            param="strength",
        )
    return strength


def _least_strength(steps: int) -> float:
    """The smallest strength of three decimals that is one step, rounding errors of the product included."""
    thousandths = range(1, 1001)
    return next(n / 1000 for n in thousandths if int(steps * (n / 1000)) >= 1)


def _refinement(request: TextToImage, model: Model) -> Refinement | None:
    if request.refiner is None or request.refiner is False:
        return None
    if model.refiner is None:
        raise InvalidRequest(f"refiner: {model.name} has no refiner", param="refiner")
    if request.task != "txt2img":
        raise InvalidRequest(
            f"refiner: it finishes pictures of txt2img only, not of {request.task}; use the model "
            f"{model.refiner} itself",
            param="refiner",
        )
    after = REFINER_AFTER if request.refiner is True else float(request.refiner)
    return Refinement(model=model.refiner, after=after)


def _micro_conditioning(
    request: TextToImage, size: tuple[int, int], model: Model
) -> MicroConditioning | None:
    asked = {name: getattr(request, name) for name in ("original_size", "crop", "target_size")}
    if model.micro_conditioning:
        return MicroConditioning(
            original_size=asked["original_size"] or size,
            crop=asked["crop"] or (0, 0),
            target_size=asked["target_size"] or size,
        )
    if given := next((name for name, value in asked.items() if value is not None), None):
        raise InvalidRequest(f"{given}: {model.name} takes no sizes and no crop", param=given)
    return None


def _max_sequence_length(request: TextToImage, model: Model) -> int | None:
    asked, limit = request.max_sequence_length, model.limits.max_sequence_length
    if asked is not None and (limit is None or asked > limit):
        text = f"{model.name} has no T5 encoder" if limit is None else f"{asked} is past the limit of {limit}"
        raise InvalidRequest(f"max_sequence_length: {text}", param="max_sequence_length")
    return asked or model.defaults.max_sequence_length


def _skip_layer_guidance(request: TextToImage, model: Model) -> SkipLayerGuidance | None:
    asked = request.skip_layer_guidance
    if asked is None or asked is False:
        return None
    if model.skip_layer_guidance is None:
        raise InvalidRequest(
            f"skip_layer_guidance: {model.name} was not made for it", param="skip_layer_guidance"
        )
    return model.skip_layer_guidance if asked is True else asked
