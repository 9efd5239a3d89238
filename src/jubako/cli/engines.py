"""`jubako engines`: list what was compiled for this machine's GPU, remove it, compile it ahead of time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jubako.catalog import load_catalog
from jubako.settings import load_settings

if TYPE_CHECKING:
    from jubako.weights.engines import EngineStore, Entry

__all__ = ["engines"]

# Where the output is no terminal, nothing is cut off to fit one.
PIPED_COLUMNS = 160

engines = typer.Typer(
    help="Engines compiled for this machine's GPU: list, clear, build ahead of time.", no_args_is_help=True
)


@engines.command("list")
def _list_engines(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """List engines, the last used first."""
    found = _store().entries()
    if as_json:
        print(json.dumps([_facts(entry) for entry in found], indent=1))
        return
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, PIPED_COLUMNS)
    if not found:
        console.print("There are no engines.")
        return
    console.print(_table(found))
    total = sum(entry.record.bytes for entry in found)
    console.print(f"\n{_amount(total)} of {_amount(load_settings().engine_bytes)}", style="dim")


@engines.command("clear")
def _clear_engines(
    keys: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]...", help="Keys, or as much of them as tells them apart; or models."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All engines.")] = False,
) -> None:
    """Remove engines that no process uses; a server that needs one again builds it again."""
    if bool(keys) == everything:
        raise typer.BadParameter("name the engines to remove, or give --all")
    cleared = _store().clear(None if everything else keys)
    console = Console(highlight=False)
    freed = sum(entry.record.bytes for entry in cleared.removed)
    console.print(f"{_count(cleared.removed)} removed, {_amount(freed)}", soft_wrap=True)
    if cleared.in_use:
        names = ", ".join(entry.digest[:12] for entry in cleared.in_use)
        console.print(f"{_count(cleared.in_use)} kept, in use by a process: {names}", soft_wrap=True)
        raise typer.Exit(1)


@engines.command("build")
def _build_engines(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A name from `jubako models`.")],
) -> None:
    """Compile all engines of a model now, rather than when a server first loads it; this takes minutes."""
    model = load_catalog(load_settings().catalog).model(name)
    # Building takes torch and ONNX Runtime, which the command line does without.
    done = subprocess.run([sys.executable, "-m", "jubako.prebuild", model.name], check=False)
    raise typer.Exit(done.returncode)


def _store() -> EngineStore:
    from jubako.weights.engines import EngineStore

    settings = load_settings()
    return EngineStore(settings.home / "engines", settings.engine_bytes)


def _facts(entry: Entry) -> dict[str, Any]:
    record = entry.record
    return {
        "key": entry.digest,
        "model": record.model,
        "slot": record.slot,
        "created": record.created,
        "seconds": record.seconds,
        "bytes": record.bytes,
        "used": entry.used,
        "in_use": entry.in_use,
        "facts": record.key.model_dump(mode="json"),
    }


def _table(entries: Iterable[Entry]) -> Table:
    table = Table("Key", "Model", "Graph", "Compiled by", "For", box=None, header_style="bold")
    for header in ("Size", "Built in"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("Last used", no_wrap=True)
    for entry in entries:
        record = entry.record
        table.add_row(
            entry.digest[:12],
            Text(record.model),
            record.slot,
            f"{record.key.provider} {record.key.provider_version}",
            Text(record.key.gpu),
            _amount(record.bytes),
            f"{record.seconds:.0f} s",
            "[green]in use[/]" if entry.in_use else _date(entry.used),
        )
    return table


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


def _count(entries: tuple[Entry, ...]) -> str:
    return "1 engine" if len(entries) == 1 else f"{len(entries)} engines"


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
