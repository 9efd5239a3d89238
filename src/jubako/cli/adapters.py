"""`jubako adapters`: the LoRAs and embeddings that requests can name: list, show, take in a file, remove."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jubako.catalog import AdapterEntry, load_catalog
from jubako.settings import load_settings

if TYPE_CHECKING:
    from jubako.adapters.store import Adapter, AdapterStore

__all__ = ["adapters"]

# Where the output is no terminal, nothing is cut off to fit one.
PIPED_COLUMNS = 120

adapters = typer.Typer(
    help="LoRAs and embeddings that requests can name: list, show, add, remove.", no_args_is_help=True
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name from `jubako adapters list`.")]


@adapters.command("list")
def _list_adapters(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List the adapters that are here, and those of the catalog that can be pulled."""
    here, others = _known()
    if as_json:
        found = [*map(_facts, here), *map(_facts_of_entry, others)]
        print(json.dumps(found, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPED_COLUMNS)
    table = Table("Name", "Kind", "Base", "Trigger", box=None, header_style="bold")
    table.add_column("MB", justify="right")
    table.add_column("State")
    for adapter in here:
        facts = (adapter.kind, adapter.base or "-", str(adapter.card.get("trigger") or "-"))
        size = f"{adapter.bytes / 1e6:.1f}"
        table.add_row(Text(adapter.name, style="bold"), *map(Text, facts), size, Text("here", style="green"))
    for entry in others:
        size = f"~{entry.size_mb:g}" if entry.size_mb else "-"
        table.add_row(entry.name, "lora", entry.base[0], entry.trigger or "-", size, "not here", style="dim")
    console.print(table)
    if others:
        console.print("\nFetch one that is not here with: jubako pull NAME", style="dim")


@adapters.command("show")
def _show_adapter(name: Name) -> None:
    """Print what is known of an adapter, as JSON."""
    _, others = _known()
    entry = next((entry for entry in others if entry.name == name), None)
    print(json.dumps(_facts_of_entry(entry) if entry else _facts(_store().find(name)), indent=1))


@adapters.command("add")
def _add_adapter(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A LoRA or an embedding as .safetensors.")],
    name: Annotated[
        str | None, typer.Option(help="The name that requests use; without it the file's.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="The model that it was made for; models of other families refuse it.")
    ] = None,
    trigger: Annotated[str | None, typer.Option(help="The word that calls for it.")] = None,
) -> None:
    """Take in a copy of a file: a LoRA of diffusers, peft or kohya, or an embedding of textual inversion."""
    card = {key: value for key, value in {"base": base, "trigger": trigger}.items() if value}
    added = _store().add(name or file.stem, file, card)
    how = {
        "lora": f'"<lora:{added.name}:1>" in a prompt, or loras=[{{name, weight}}]',
        "embedding": f'"<embedding:{added.name}>" in a prompt, or "{added.word}" and embeddings=[name]',
    }
    print(f"{added.name} is ready: {how[added.kind]}")


@adapters.command("remove")
def _remove_adapter(name: Name) -> None:
    """Delete an adapter."""
    _store().remove(name)
    print(f"{name} is removed")


def _store() -> AdapterStore:
    # With it comes Pillow, which no other command needs at its start.
    from jubako.adapters.store import AdapterStore

    return AdapterStore(load_settings().home)


def _known() -> tuple[list[Adapter], list[AdapterEntry]]:
    """The adapters that are here, and the catalog's others."""
    here = list(_store())
    names = {adapter.name for adapter in here}
    entries = load_catalog(load_settings().catalog).adapters.values()
    return here, [entry for entry in entries if entry.name not in names]


def _facts(adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "here": True,
        "kind": adapter.kind,
        "file": str(adapter.file),
        "bytes": adapter.bytes,
        "sha256": adapter.sha256,
        "base": adapter.base,
        "trigger": adapter.card.get("trigger"),
        "card": adapter.card,
    }


def _facts_of_entry(entry: AdapterEntry) -> dict[str, Any]:
    facts = {"name": entry.name, "here": False, "base": entry.base[0], "trigger": entry.trigger}
    return {**facts, "card": entry.card()}
