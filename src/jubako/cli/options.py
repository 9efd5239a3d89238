"""Options that several commands have, by what they say of a picture."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = [
    "GuidanceScale",
    "Height",
    "NegativePrompt",
    "Scheduler",
    "Steps",
    "Strength",
    "Url",
    "Width",
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
Url = Annotated[str, typer.Option(help="The server.")]
