"""`jubako compare`: one prompt on several models, as a contact sheet."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jubako.cli.options import (
    GuidanceScale,
    Height,
    Loras,
    NegativePrompt,
    Scheduler,
    Steps,
    Strength,
    Url,
    Width,
    loras_of,
)
from jubako.cli.server import answer, write

__all__ = ["compare"]


def compare(
    prompt: Annotated[str, typer.Argument(help="What the pictures show.")],
    *,
    models: Annotated[str, typer.Option("--models", "-m", help="Names from `jubako models`: tiny-sd,sd1.5")],
    axis: Annotated[
        str | None,
        typer.Option(
            help="What differs from column to column: steps=4,8,20, or guidance_scale, scheduler, strength."
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="The PNG file to write.")] = Path(
        "sheet.png"
    ),
    negative_prompt: NegativePrompt = None,
    width: Width = None,
    height: Height = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int | None, typer.Option(help="The seed of all pictures; without: drawn once.")] = None,
    scheduler: Scheduler = None,
    lora: Loras = None,
    image: Annotated[
        Path | None, typer.Option(help="A picture to start from.", exists=True, dir_okay=False)
    ] = None,
    strength: Strength = None,
    url: Url = "http://127.0.0.1:3000",
) -> None:
    """Make the same picture on several models of a running server, side by side in one file."""
    if output.suffix.lower() != ".png":
        raise typer.BadParameter(f"{output} does not end in .png", param_hint="--output")
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    fields = {
        "prompt": prompt,
        "models": [name.strip() for name in models.split(",")],
        "axis": _axis(axis),
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "scheduler": scheduler,
        "loras": loras_of(lora),
        "strength": strength,
    }
    given = {name: value for name, value in fields.items() if value is not None}
    with Console(stderr=True).status("comparing"):
        reply = answer(url.rstrip("/"), "/v1/images/compare", given, {"image": image} if image else {})
    write(output, base64.b64decode(reply["sheet"]["b64_json"]))
    _show(output, reply)


def _axis(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    field, equals, values = text.partition("=")
    if not (field and equals and values):
        raise typer.BadParameter(f"{text!r} is not FIELD=VALUE,VALUE", param_hint="--axis")
    return {"field": field.strip(), "values": [value.strip() for value in values.split(",")]}


def _show(output: Path, reply: dict[str, Any]) -> None:
    console = Console(highlight=False)
    sheet = reply["sheet"]
    console.print(
        f"[bold]{escape(str(output))}[/]  {sheet['width']}x{sheet['height']}, seed {reply['seed']}",
        soft_wrap=True,
    )
    table = Table("model", "value", "size", "steps", "seconds", box=None, pad_edge=False)
    for entry in reply["data"]:
        settings = entry["settings"]
        table.add_row(
            entry["model"],
            "" if entry["value"] is None else str(entry["value"]),
            f"{settings['width']}x{settings['height']}",
            str(settings["num_inference_steps"]),
            f"{sum(entry['timings'].values()):.1f}",
        )
    console.print(table)
    for warning in reply["warnings"]:
        console.print(escape(warning), soft_wrap=True)
