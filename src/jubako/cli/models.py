"""`jubako models`: the catalog and the disk as a table or as JSON. Needs no server."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jubako.catalog import Catalog, Model, load_catalog
from jubako.settings import load_settings
from jubako.weights.store import size_on_disk

__all__ = ["models"]

# Where the output is no terminal, nothing is cut off to fit one.
PIPED_COLUMNS = 160

# Terminals of fewer columns do without the family, which most names tell anyway.
ROOMY_COLUMNS = 94

COMMERCIAL = {"yes": "green", "limited": "yellow", "no": "red"}


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List what can be served, under which licence, and what is on disk."""
    settings = load_settings()
    catalog = load_catalog(settings.catalog).only(settings.families)
    sizes = {
        model.name: size_on_disk(settings.home, model, family.models)
        for family in catalog.families.values()
        for model in family.models.values()
    }
    if as_json:
        print(json.dumps([_entry(model, sizes[model.name]) for model in catalog], indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPED_COLUMNS)
    console.print(_table(catalog, sizes, roomy=console.width >= ROOMY_COLUMNS))
    console.print(_legend(catalog, sizes), style="dim")


def _entry(model: Model, size: int | None) -> dict[str, Any]:
    return {
        "name": model.name,
        "title": model.title,
        "family": model.family,
        "tasks": model.tasks,
        "licence": model.licence.model_dump(),
        "gated": model.gated,
        "default": model.default,
        "repo": model.weights.repo,
        "memory_gb": model.memory_gb,
        "on_disk": size is not None,
        "size_bytes": size,
    }


def _table(catalog: Catalog, sizes: dict[str, int | None], *, roomy: bool) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2 if roomy else 1, 0, 0))
    headers = ["Model", "Family", "Tasks", "Licence", "Commercial", "Gated", "GB", "On disk"]
    left_out = set() if roomy else {"Family"}
    for header in headers:
        if header not in left_out:
            table.add_column(
                header,
                no_wrap=header != "Tasks",
                min_width=8 if header == "Tasks" else None,
                justify="right" if header == "GB" else "left",
            )
    for model in catalog:
        cells = zip(headers, _cells(model, sizes[model.name]), strict=True)
        table.add_row(*(cell for header, cell in cells if header not in left_out))
    return table


def _cells(model: Model, size: int | None) -> tuple[Text, ...]:
    on_disk = size is not None
    commercial = model.licence.commercial
    return (
        Text(model.name + (" *" if model.default else ""), style="bold" if on_disk else ""),
        Text(model.family),
        Text(", ".join(model.tasks)),
        Text(model.licence.id, style=f"link {model.licence.url}"),
        Text(commercial, style=COMMERCIAL[commercial]),
        Text("gated" if model.gated else "-", style="yellow" if model.gated else "dim"),
        Text(f"{size / 1e9:.2f}") if size is not None else Text(f"~{model.memory_gb:.2f}", style="dim"),
        Text("yes", style="green") if on_disk else Text("-", style="dim"),
    )


def _legend(catalog: Catalog, sizes: dict[str, int | None]) -> str:
    lines = ["", "* the default model"] if any(model.default for model in catalog) else [""]
    if None in sizes.values():
        lines.append("~ an estimate; fetch the weights with: jubako pull MODEL")
    return "\n".join(lines)
