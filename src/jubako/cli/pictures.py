"""`jubako generate`: a picture from a running server, with its steps as a progress bar."""

from __future__ import annotations

import base64
import itertools
from collections.abc import Mapping
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

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
from jubako.cli.server import ServerFailed, events, write

__all__ = ["generate"]

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}

_FILE: dict[str, Any] = {"exists": True, "dir_okay": False, "readable": True}


def generate(
    prompt: Annotated[str, typer.Argument(help="What the picture shows.")],
    *,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="A name from `jubako models`; without: the default.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The file to write; without: jubako-<seed> in this folder."),
    ] = None,
    negative_prompt: NegativePrompt = None,
    width: Width = None,
    height: Height = None,
    steps: Steps = None,
    guidance_scale: GuidanceScale = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture.")] = None,
    scheduler: Scheduler = None,
    lora: Loras = None,
    image: Annotated[
        Path | None,
        typer.Option(help="A picture to start from; what is transparent in it is made anew.", **_FILE),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="What of the picture is made anew: transparent, or white.", **_FILE)
    ] = None,
    strength: Strength = None,
    resize_mode: Annotated[
        str | None, typer.Option(help="When sizes differ: cover (crop), fit or exact (distort).")
    ] = None,
    refiner: Annotated[bool, typer.Option("--refiner", help="Let the model's refiner finish.")] = False,
    skip_layer_guidance: Annotated[
        bool, typer.Option("--skip-layer-guidance", help="SD3.5 Medium: guide away from skipped layers.")
    ] = False,
    max_sequence_length: Annotated[
        int | None, typer.Option(help="SD3: tokens of the prompt that the T5 encoder reads.")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="png, jpeg or webp; without: by the name of the file.")
    ] = None,
    url: Url = "http://127.0.0.1:3000",
) -> None:
    """Make a picture on a running server and write it to a file."""
    fields = {
        "prompt": prompt,
        "model": model,
        "negative_prompt": negative_prompt,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
        "scheduler": scheduler,
        "loras": loras_of(lora),
        "strength": strength,
        "resize_mode": resize_mode,
        "refiner": refiner or None,
        "skip_layer_guidance": skip_layer_guidance or None,
        "max_sequence_length": max_sequence_length,
        "output_format": _format(output, output_format),
    }
    given = {key: value for key, value in fields.items() if value is not None}
    files = _files(image, mask, given)
    started = perf_counter()
    try:
        picture = _picture(url.rstrip("/"), given, files)
    except KeyboardInterrupt:
        Console(stderr=True).print("Cancelled.")
        raise typer.Exit(130) from None
    path = output or _free_name(picture["seed"], picture["output_format"])
    write(path, base64.b64decode(picture["b64_json"]))
    seconds = perf_counter() - started
    console = Console(highlight=False)
    console.print(
        f"[bold]{escape(str(path))}[/]  {picture['model']}, {picture['size']}, seed {picture['seed']}, "
        f"{seconds:.1f} s",
        soft_wrap=True,
    )
    for warning in picture.get("warnings", ()):
        Console(stderr=True, highlight=False).print(escape(warning), soft_wrap=True)


def _files(image: Path | None, mask: Path | None, given: Mapping[str, Any]) -> dict[str, Path]:
    """The files to send; what is only about a picture is refused without one."""
    if image is None:
        for name, value in (
            ("mask", mask),
            *((name, given.get(name)) for name in ("strength", "resize_mode")),
        ):
            if value is not None:
                option = f"--{name.replace('_', '-')}"
                raise typer.BadParameter("give the picture that it is about with --image", param_hint=option)
        return {}
    return {"image": image} if mask is None else {"image": image, "mask": mask}


def _format(output: Path | None, wanted: str | None) -> str:
    """The format that the option or the file's name says; both must say the same."""
    wanted = "jpeg" if wanted == "jpg" else wanted
    if wanted is not None and wanted not in SUFFIXES:
        raise typer.BadParameter(f"{wanted!r} is not one of {', '.join(SUFFIXES)}", param_hint="--format")
    if output is None:
        return wanted or "png"
    if not output.parent.is_dir():
        raise typer.BadParameter(f"there is no folder {output.parent}", param_hint="--output")
    named = FORMATS.get(output.suffix.lower())
    if named is None and wanted is None:
        known = ", ".join(FORMATS)
        raise typer.BadParameter(f"{output} ends in none of {known}; or give --format", param_hint="--output")
    if named and wanted and named != wanted:
        raise typer.BadParameter(f"{output} is not the name of a {wanted} file", param_hint="--output")
    return wanted or str(named)


def _picture(url: str, fields: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """Ask for one picture and show its steps; the fields of the event that completes it."""
    route = "/v1/images/edits" if files else "/v1/images/generations"
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("waiting", total=None)
        for event in events(url, route, fields, files):
            kind = str(event.get("type", ""))
            if kind.endswith(".completed"):
                return event
            if kind.endswith(".progress"):
                bar.update(task, description="denoising", completed=event["step"], total=event["steps"])
    raise ServerFailed(f"the server at {url} ended the answer without a picture")


def _free_name(seed: int, output_format: str) -> Path:
    """``jubako-<seed>`` in the current folder, with a number where that would overwrite a picture."""
    suffix = SUFFIXES[output_format]
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (Path(f"jubako-{seed}{number}{suffix}") for number in numbers)
    return next(path for path in names if not path.exists())
