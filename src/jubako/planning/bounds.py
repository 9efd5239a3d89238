"""What every task is held to: a model that does it, and what is within the model's limits."""

from __future__ import annotations

import secrets

from jubako.catalog import Catalog, Model
from jubako.errors import InvalidRequest
from jubako.request import Task

__all__ = ["drawn_seed", "legal_guidance", "legal_prompt", "legal_steps", "model_of", "within"]

# What other programs draw and show: AUTOMATIC1111 and ComfyUI's older nodes read seeds as 32 bits.
DRAWN_SEEDS = 2**32


def model_of(
    name: str | None,
    tasks: tuple[Task, ...],
    catalog: Catalog,
    default_model: str | None = None,
    *,
    field: str = "model",
) -> Model:
    """The model of that name, which must do one of the tasks; without a name the first that does."""
    if name is None:
        return catalog.model_for(tasks, default_model)
    model = catalog.model(name)
    if not set(tasks) & set(model.tasks):
        able = ", ".join(other.name for other in catalog if set(tasks) & set(other.tasks))
        raise InvalidRequest(
            f"{field}: {model.name} does not do {' or '.join(tasks)}; it does: {', '.join(model.tasks)}. "
            f"Models that do: {able or 'none'}",
            param=field,
        )
    return model


def drawn_seed(seed: int | None) -> int:
    """The seed asked for, or one drawn now."""
    return secrets.randbelow(DRAWN_SEEDS) if seed is None else seed


def legal_prompt(field: str, text: str, model: Model) -> str:
    """The text, unless it is longer than the model takes."""
    limit = model.limits.max_prompt_characters
    if len(text) > limit:
        raise InvalidRequest(
            f"{field}: {len(text)} characters are past the limit of {limit} of {model.name}", param=field
        )
    return text


def legal_steps(steps: int | None, model: Model, field: str = "num_inference_steps") -> int:
    """The steps asked for, the model's own where unset."""
    steps = steps or model.defaults.num_inference_steps
    least, most = model.limits.min_num_inference_steps, model.limits.max_num_inference_steps
    if not least <= steps <= most:
        allowed = f"exactly {most}" if least == most else f"{least} to {most}"
        raise InvalidRequest(f"{field}: {model.name} takes {allowed} steps, not {steps}", param=field)
    return steps


def legal_guidance(scale: float | None, model: Model, field: str = "guidance_scale") -> float:
    """The guidance asked for, the model's own where unset."""
    scale = model.defaults.guidance_scale if scale is None else scale
    limit = model.limits.max_guidance_scale
    if scale > limit:
        raise InvalidRequest(f"{field}: {scale} is past the limit of {limit} of {model.name}", param=field)
    return scale


def within(field: str, value: int, least: int, most: int, model: Model) -> int:
    """The value, unless it is outside of the model's limits."""
    if not least <= value <= most:
        allowed = f"exactly {most}" if least == most else f"{least} to {most}"
        raise InvalidRequest(f"{field}: {model.name} takes {allowed}, not {value}", param=field)
    return value
