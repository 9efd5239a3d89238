"""Options that several commands have, by what they say of a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

import typer

__all__ = [
    "GuidanceScale",
    "Height",
    "Loras",
    "NegativePrompt",
    "Scheduler",
    "Steps",
    "Strength",
    "Url",
    "Width",
    "loras_of",
]

NegativePrompt = Annotated[str | None, typer.Option(help="What is not to be shown.")]
Width = Annotated[int | None, typer.Option(help="Pixels; without: the model's own size.")]
Height = Annotated[int | None, typer.Option(help="Pixels; without: the model's own size.")]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.")]
GuidanceScale = Annotated[float | None, typer.Option(help="How strongly the prompt steers.")]
Scheduler = Annotated[
    str | None, typer.Option(help="A sampler ('Euler a', 'DPM++ 2M Karras') or a diffusers class.")
]
Strength = Annotated[float | None, typer.Option(help="How much of the picture is made anew, from 0 to 1.")]
Loras = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="NAME[:WEIGHT]", help="An adapter of `jubako adapters`; may be given several times."
    ),
]
Url = Annotated[str, typer.Option(help="The server.")]


def loras_of(words: Sequence[str] | None) -> list[dict[str, Any]] | None:
    """The request's ``loras``; BadParameter when a weight is no number."""
    return [_lora(word) for word in words] if words else None


def _lora(word: str) -> dict[str, Any]:
    name, colon, text = word.partition(":")
    if not colon:
        return {"name": name}
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise typer.BadParameter(
            f"{text!r} of {word!r} is no weight; write NAME or NAME:WEIGHT", param_hint="--lora"
        )
    return {"name": name, "weight": weight}
