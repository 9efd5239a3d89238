"""`jubako generate`: a picture from a running server, with its steps as a progress bar."""

from __future__ import annotations

import base64
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from jubako.errors import JubakoError

__all__ = ["ServerFailed", "generate"]

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}
SUFFIXES = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
CONNECT_SECONDS = 5


class ServerFailed(JubakoError):
    """The server can't be reached, or what it answered is not a picture."""


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
    negative_prompt: Annotated[str | None, typer.Option(help="What the picture should not show.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; without: the model's own size.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; without: the model's own size.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How strongly the prompt steers the picture.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same picture.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="A sampler ('Euler a', 'DPM++ 2M Karras') or a diffusers class.")
    ] = None,
    output_format: Annotated[
        str | None, typer.Option("--format", help="png, jpeg or webp; without: by the name of the file.")
    ] = None,
    url: Annotated[str, typer.Option(help="The server.")] = "http://127.0.0.1:3000",
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
        "output_format": _format(output, output_format),
        "stream": True,
    }
    started = perf_counter()
    try:
        picture = _picture(
            url.rstrip("/"), {key: value for key, value in fields.items() if value is not None}
        )
    except KeyboardInterrupt:
        Console(stderr=True).print("Cancelled.")
        raise typer.Exit(130) from None
    path = output or _free_name(picture["seed"], picture["output_format"])
    _write(path, base64.b64decode(picture["b64_json"]))
    seconds = perf_counter() - started
    console = Console(highlight=False)
    console.print(
        f"[bold]{escape(str(path))}[/]  {picture['model']}, {picture['size']}, seed {picture['seed']}, "
        f"{seconds:.1f} s",
        soft_wrap=True,
    )


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


def _picture(url: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Ask for one picture and show its steps; the fields of the event that completes it."""
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
        for event in _events(url, fields):
            if "error" in event:
                raise ServerFailed(_sentence(event))
            if event.get("type") == "image_generation.completed":
                return event
            if event.get("type") == "image_generation.progress":
                bar.update(task, description="denoising", completed=event["step"], total=event["steps"])
    raise ServerFailed(f"the server at {url} ended the answer without a picture")


def _events(url: str, fields: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The data of each server-sent event. Leaving the loop closes the connection, which cancels the job."""
    import httpx

    # No limit on waiting: the picture may stand in a queue, and the server has its own deadline.
    timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
    try:
        with httpx.stream("POST", f"{url}/v1/images/generations", json=fields, timeout=timeout) as response:
            if response.is_error:
                raise ServerFailed(_refusal(url, response.status_code, response.read()))
            yield from _parsed(response.iter_lines())
    except httpx.ConnectError as error:
        raise ServerFailed(
            f"no server answers at {url}; start one with scripts/serve, or give --url"
        ) from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerFailed(f"the connection to {url} failed: {error or type(error).__name__}") from error


def _parsed(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _refusal(url: str, status: int, body: bytes) -> str:
    try:
        return _sentence(json.loads(body))
    except (ValueError, KeyError, TypeError):
        return f"{url} answered {status}, and not as a Jubako server does"


def _sentence(body: dict[str, Any]) -> str:
    return str(body["error"]["message"])


def _free_name(seed: int, output_format: str) -> Path:
    """``jubako-<seed>`` in the current folder, with a number where that would overwrite a picture."""
    suffix = SUFFIXES[output_format]
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    names = (Path(f"jubako-{seed}{number}{suffix}") for number in numbers)
    return next(path for path in names if not path.exists())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ServerFailed(f"{path} can't be written: {error.strerror}") from error
