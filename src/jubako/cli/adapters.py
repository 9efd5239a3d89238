"""`jubako adapters`: the LoRAs that requests can name: list, show, take in a file, remove."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jubako.adapters.store import Adapter, AdapterStore
from jubako.settings import load_settings

__all__ = ["adapters"]

# Where the output is no terminal, nothing is cut off to fit one.
PIPED_COLUMNS = 120

adapters = typer.Typer(help="LoRAs that requests can name: list, show, add, remove.", no_args_is_help=True)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name from `jubako adapters list`.")]


@adapters.command("list")
def _list_adapters(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the adapters that are here."""
    found = list(_store())
    if as_json:
        print(json.dumps([_facts(adapter) for adapter in found], indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPED_COLUMNS)
    if not found:
        console.print("There are no adapters.")
        return
    table = Table("Name", "Base", "Trigger", box=None, header_style="bold")
    table.add_column("MB", justify="right")
    for adapter in found:
        card = adapter.card
        cells = (card.get("base", "-"), card.get("trigger", "-"))
        table.add_row(Text(adapter.name), *map(Text, map(str, cells)), f"{adapter.bytes / 1e6:.1f}")
    console.print(table)


@adapters.command("show")
def _show_adapter(name: Name) -> None:
    """Print what is known of an adapter, as JSON."""
    print(json.dumps(_facts(_store().find(name)), indent=1))


@adapters.command("add")
def _add_adapter(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA as .safetensors.")],
    name: Annotated[
        str | None, typer.Option(help="The name that requests use; without it the file's.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The model that it was made for.")] = None,
    trigger: Annotated[str | None, typer.Option(help="The word that calls for it.")] = None,
) -> None:
    """Take in a copy of a LoRA's file, of diffusers, peft or kohya."""
    card = {key: value for key, value in {"base": base, "trigger": trigger}.items() if value}
    added = _store().add(name or file.stem, file, card)
    print(f'{added.name} is ready: "<lora:{added.name}:1>" in a prompt, or loras=[{{name, weight}}]')


@adapters.command("remove")
def _remove_adapter(name: Name) -> None:
    """Delete an adapter."""
    _store().remove(name)
    print(f"{name} is removed")


def _store() -> AdapterStore:
    return AdapterStore(load_settings().home)


def _facts(adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "file": str(adapter.file),
        "bytes": adapter.bytes,
        "sha256": adapter.sha256,
        **adapter.card,
    }
