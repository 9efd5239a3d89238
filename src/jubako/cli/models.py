"""`jubako models`: the catalog and the disk as a table or as JSON; with a server, what it has in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jubako.catalog import Catalog, Model, load_catalog
from jubako.cli.server import listed
from jubako.cli.weight_matrix import show_weights
from jubako.licences import is_accepted
from jubako.settings import Settings, load_settings
from jubako.weights.store import size_on_disk

__all__ = ["models"]

# Where the output is no terminal, nothing is cut off to fit one.
PIPED_COLUMNS = 160

# Terminals of fewer columns do without the tasks and the family, which most names tell anyway.
ROOMY_COLUMNS = 94

# Longer names of licences, of which there are few, take two lines where there is no room.
LICENCE_WIDTH = 21

COMMERCIAL = {"yes": "green", "limited": "yellow", "no": "red"}

TO_ACCEPT = " !"


def models(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    url: Annotated[
        str | None,
        typer.Option(help="Ask this server where its models are; without it the disk is looked at."),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Show in which forms each model's weights exist, or why not.")
    ] = False,
) -> None:
    """List what can be served, under which licence, and what is on disk or in memory."""
    settings = load_settings()
    catalog = load_catalog(settings.catalog).only(settings.families)
    if weights:
        show_weights(catalog, settings.home, as_json=as_json)
        return
    sizes = {
        model.name: size_on_disk(settings.home, model, family.models)
        for family in catalog.families.values()
        for model in family.models.values()
    }
    served = listed(url.rstrip("/")) if url else {}
    states = {name: _state(size, served.get(name)) for name, size in sizes.items()}
    if as_json:
        entries = [
            _entry(model, sizes[model.name], settings) | {"state": states[model.name]} for model in catalog
        ]
        print(json.dumps(entries, indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPED_COLUMNS)
    unaccepted = {model.name: model.licence for model in catalog if not is_accepted(model.licence, settings)}
    roomy = console.width >= ROOMY_COLUMNS
    console.print(_table(catalog, sizes, states, frozenset(unaccepted), roomy=roomy))
    console.print(_legend(catalog, sizes), style="dim")
    if unaccepted:
        console.print(_ABOUT_ACCEPTANCE, style="yellow", soft_wrap=True)
        for licence, link in {licence.id: licence.url for licence in unaccepted.values()}.items():
            console.print(f"  {licence}  {link}", style="yellow", soft_wrap=True)


_ABOUT_ACCEPTANCE = f"""
{TO_ACCEPT.strip()} refused until its licence is accepted: read it, then add it to
JUBAKO_ACCEPTED_LICENCES:"""


def _entry(model: Model, size: int | None, settings: Settings) -> dict[str, Any]:
    return {
        "name": model.name,
        "title": model.title,
        "family": model.family,
        "tasks": model.tasks,
        "licence": model.licence.model_dump() | {"accepted": is_accepted(model.licence, settings)},
        "gated": model.gated,
        "default": model.default,
        "repo": model.weights.repo,
        "memory_gb": model.memory_gb,
        "on_disk": size is not None,
        "size_bytes": size,
    }


def _state(size: int | None, served: Mapping[str, Any] | None) -> str:
    """In words: the server's where it knows the model, else the disk's."""
    state = served.get("state") if served else None
    if served and state == "resident":
        return f"{served['bytes'] / 1e9:.2f} GB in memory"
    if served and state == "loading":
        return f"loading {served['loading_fraction'] or 0:.0%}"
    if state == "broken":
        return "broken"
    return "on disk" if size is not None or state == "on_disk" else "-"


def _table(
    catalog: Catalog,
    sizes: Mapping[str, int | None],
    states: Mapping[str, str],
    unaccepted: frozenset[str],
    *,
    roomy: bool,
) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2 if roomy else 1, 0, 0))
    headers = ["Model", "Family", "Tasks", "Licence", "Commercial", "Gated", "GB", "State"]
    left_out = set() if roomy else {"Family", "Tasks"}
    for header in headers:
        if header not in left_out:
            table.add_column(
                header,
                no_wrap=header not in {"Tasks", "Licence"},
                overflow="fold" if header == "Licence" else "ellipsis",
                min_width={"Tasks": 8, "Licence": LICENCE_WIDTH}.get(header),
                justify="right" if header == "GB" else "left",
            )
    for model in catalog:
        name = model.name
        row = _cells(model, sizes[name], states[name], accepted=name not in unaccepted)
        cells = zip(headers, row, strict=True)
        table.add_row(*(cell for header, cell in cells if header not in left_out))
    return table


def _cells(model: Model, size: int | None, state: str, *, accepted: bool) -> tuple[Text, ...]:
    is_here = state != "-"
    commercial = model.licence.commercial
    return (
        Text(model.name + (" *" if model.default else ""), style="bold" if is_here else ""),
        Text(model.family),
        Text(", ".join(model.tasks)),
        Text(model.licence.id, style=f"link {model.licence.url}"),
        Text(commercial + ("" if accepted else TO_ACCEPT), style=COMMERCIAL[commercial]),
        Text("gated" if model.gated else "-", style="yellow" if model.gated else "dim"),
        Text(f"{size / 1e9:.2f}") if size is not None else Text(f"~{model.memory_gb:.2f}", style="dim"),
        Text(state, style="red" if state == "broken" else "green" if is_here else "dim"),
    )


def _legend(catalog: Catalog, sizes: dict[str, int | None]) -> str:
    lines = ["", "* the default model"] if any(model.default for model in catalog) else [""]
    if None in sizes.values():
        lines.append("~ an estimate; fetch the weights with: jubako pull MODEL")
    return "\n".join(lines)
