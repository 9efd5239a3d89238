"""`jubako train`: a folder of pictures to an adapter, by a running server, with a progress bar."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from jubako.cli.jobs import DEFAULT_URL, following
from jubako.cli.options import Url
from jubako.cli.server import ServerFailed, answer, asked, fetched, write

__all__ = ["train"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
ROUTE = "/v1/fine_tuning/jobs"


def train(
    base: Annotated[str, typer.Option(help="The model to train, by its name in `jubako models`.")],
    images: Annotated[
        Path,
        typer.Option(
            exists=True,
            file_okay=False,
            help="A folder of 3 to 50 pictures; a .txt of the same name beside each is its caption.",
        ),
    ],
    trigger: Annotated[str, typer.Option(help="The new word for the subject.")],
    class_noun: Annotated[str, typer.Option(help="What kind of thing it is, as `dog` or `shape`.")],
    *,
    name: Annotated[str | None, typer.Option(help="The adapter's name; without it the trigger.")] = None,
    method: Annotated[
        str | None, typer.Option(help="dreambooth-lora (the default) or textual-inversion.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer's steps.")] = None,
    rank: Annotated[int | None, typer.Option(help="Rank of the LoRA.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="AdamW's rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all chance in it.")] = None,
    prior_preservation: Annotated[
        bool | None, typer.Option(help="Keep what the model draws without the trigger.")
    ] = None,
    validation_prompt: Annotated[str | None, typer.Option(help="Of the pictures on the way.")] = None,
    keep_images: Annotated[
        bool, typer.Option("--keep-images", help="Have the server keep the pictures beside the adapter.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the adapter's file here as well.")
    ] = None,
    url: Url = DEFAULT_URL,
) -> None:
    """Train a running server's model on pictures; interrupting this leaves the training at work."""
    url = url.rstrip("/")
    pictures = sorted(path for path in images.iterdir() if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise typer.BadParameter(f"there are no pictures in {images}", param_hint="--images")
    fields = {
        "model": base,
        "trigger": trigger,
        "class_noun": class_noun,
        "captions": _captions(pictures),
        "name": name,
        "method": method,
        "steps": steps,
        "rank": rank,
        "learning_rate": learning_rate,
        "seed": seed,
        "prior_preservation": prior_preservation,
        "validation_prompt": validation_prompt,
        "keep_images": keep_images,
    }
    given = {key: value for key, value in fields.items() if value is not None}
    job = answer(url, ROUTE, given, {"images": pictures})["id"]
    try:
        last = _watched(following(url, job))
    except KeyboardInterrupt:
        told = f"The training goes on: jubako jobs follow {job[:12]}"
        Console(stderr=True, highlight=False).print(told)
        raise typer.Exit(130) from None
    if last.get("state") == "failed":
        raise ServerFailed(last["error"]["message"])
    if last.get("state") != "succeeded":
        raise ServerFailed(f"the training was {last.get('state', 'lost')}")
    _report(url, job, trigger, output)


def _captions(pictures: Iterable[Path]) -> list[str] | None:
    """What the text files beside the pictures say; either each picture has one or none has."""
    files = [path.with_suffix(".txt") for path in pictures]
    there = [file for file in files if file.is_file()]
    if not there:
        return None
    if len(there) < len(files):
        missing = next(file for file in files if file not in there)
        raise typer.BadParameter(
            f"some pictures have a caption, but there is no {missing.name}", param_hint="--images"
        )
    return [file.read_text(encoding="utf-8").strip() for file in files]


def _watched(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The last event, each shown as it comes."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    last: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("waiting", total=1.0)
        for last in events:
            phase = last.get("phase")
            if phase == "training":
                said = f"step {last['step']} of {last['steps']}, loss {last['loss']:.4f}"
                bar.update(task, description=said, completed=last["progress"])
            elif phase:
                bar.update(task, description=phase, completed=last.get("done", 0) / (last.get("of") or 1))
    return last


def _report(url: str, job: str, trigger: str, output: Path | None) -> None:
    trained = asked(url, f"{ROUTE}/{job}")
    adapter = trained["fine_tuned_model"]
    console = Console(highlight=False)
    console.print(
        f"[bold]{escape(str(adapter))}[/]  {trained['model']}, {trained['steps']} steps, "
        f"loss {trained['loss']:.4f}; `{escape(trigger)}` in a prompt calls for it",
        soft_wrap=True,
    )
    for warning in trained["warnings"]:
        Console(stderr=True, highlight=False).print(escape(warning), soft_wrap=True)
    if output is not None:
        write(output, fetched(url, f"{ROUTE}/{job}/result"))
        console.print(f"[bold]{escape(str(output))}[/]")
