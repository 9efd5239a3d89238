"""`jubako pull`: fetch a model's weights, with its licence first and a progress bar."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jubako.catalog import Model, load_catalog
from jubako.settings import Settings, load_settings
from jubako.weight_sets import GraphSet, Vendor, WeightsChoice
from jubako.weights.layout import PullFailed
from jubako.weights.store import find_weights, read_record, require_own_files

if TYPE_CHECKING:
    from jubako.hub import Shipment

__all__ = ["pull"]

COMMERCIAL = {
    "yes": "commercial use is allowed",
    "limited": "commercial use is allowed under conditions",
    "no": "no commercial use",
}


def pull(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A name from `jubako models`.")],
    weights: Annotated[
        WeightsChoice, typer.Option(help="Whose weights: standard, nvidia or amd; `jubako models --weights`.")
    ] = "standard",
    precision: Annotated[
        str | None, typer.Option(help="In which precision, where a vendor has several; without it the first.")
    ] = None,
) -> None:
    """Fetch a model's weights from the Hugging Face hub; an interrupted pull goes on where it was."""
    settings = load_settings()
    catalog = load_catalog(settings.catalog)
    model = catalog.model(name)
    console = Console(highlight=False)
    if weights in {"nvidia", "amd"}:
        graphs = _graph_set(model, weights, precision)
        _print_licence(console, model, graphs)
        with _patient():
            _fetch(console, model, settings, lambda hub: hub.inspect_graphs(model, weights, graphs))
        return
    if model.weights.folder is not None and not _overlay_repo(model):
        console.print(_about_folder(model, settings), soft_wrap=True)
        return
    require_own_files(model)
    _print_licence(console, model)
    if _is_pinned_and_here(model, settings):
        console.print(f"{model.name} is on disk already, at its pinned commit", soft_wrap=True)
        return
    models = catalog.families[model.family].models
    with _patient():
        _fetch(console, model, settings, lambda hub: hub.inspect(model, settings.home, models))


@contextmanager
def _patient() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        Console(stderr=True).print("\nInterrupted. What has come is kept: run the same command to go on.")
        raise typer.Exit(130) from None


def _graph_set(model: Model, vendor: Vendor, precision: str | None) -> GraphSet:
    """The vendor's set of a precision; BadParameter says which there are."""
    sets = model.graph_sets(vendor)
    if not sets:
        raise PullFailed(f"{vendor} has no weights of {model.name}: {model.absence(vendor)}")
    found = next((each for each in sets if precision in {None, each.precision}), None)
    if found is None:
        known = ", ".join(each.precision for each in sets)
        raise PullFailed(f"precision: {vendor} has no {precision} weights of {model.name}, but {known}")
    if found.repo is None:
        raise PullFailed(f"these weights lie in a folder of yours, not on the hub: {found.folder}")
    return found


def _overlay_repo(model: Model) -> str | None:
    return model.weights.overlay.repo if model.weights.overlay else None


def _about_folder(model: Model, settings: Settings) -> str:
    if find_weights(settings.home, model) is not None:
        return f"{model.name} ships with Jubako: there is nothing to fetch"
    return f"{model.name} lies in a folder of yours, not on the hub: {escape(str(model.weights.folder))}"


def _print_licence(console: Console, model: Model, graphs: GraphSet | None = None) -> None:
    licence, own = model.licence, model.weights
    origins = filter(
        None, (own.repo, own.file, own.folder, _overlay_repo(model), graphs.repo if graphs else None)
    )
    console.print(f"[bold]{escape(model.title)}[/]  {escape(' + '.join(map(str, origins)))}", soft_wrap=True)
    console.print(f"Licence: {licence.id}, {COMMERCIAL[licence.commercial]}  {licence.url}", soft_wrap=True)
    if licence.commercial != "yes" and licence.note:
        console.print(f"         {escape(licence.note)}", style="yellow", soft_wrap=True)


def _is_pinned_and_here(model: Model, settings: Settings) -> bool:
    """Whether there is nothing to ask the hub: the catalog names commits, and all of them is on disk."""
    record = read_record(settings.home, model)
    if record is None or model.weights.repo is None or find_weights(settings.home, model) is None:
        return False
    pinned = [(model.weights.revision, record.commit)]
    if record.overlay is not None and model.weights.overlay is not None:
        pinned.append((model.weights.overlay.revision, record.overlay.commit))
    return all(re.fullmatch("[0-9a-f]{40}", wanted) and wanted == had for wanted, had in pinned)


def _fetch(console: Console, model: Model, settings: Settings, ask: Callable[[ModuleType], Shipment]) -> None:
    with console.status("Asking the hub"):
        # The hub's client takes a good part of a second to import; only this command pays for it.
        from jubako import hub

        shipment = ask(hub)
    missing = shipment.missing
    for parcel in shipment.parcels:
        console.print(
            f"{parcel.repo} {parcel.commit[:12]}: {len(parcel.files)} files, {_amount(parcel.size)}, "
            f"{_amount(parcel.missing) if parcel.missing else 'nothing'} of it to fetch",
            soft_wrap=True,
        )
    if shipment.record.config is not None:
        console.print(f"Configs and tokenizers: those of {shipment.record.config}", soft_wrap=True)
    width = max((len(_part(file.name)) for file in shipment.files), default=0)
    with _bar(console) as progress:
        task = progress.add_task("", total=shipment.size, completed=shipment.size - missing)
        current = ""

        def report(name: str, gained: int) -> None:
            nonlocal current
            if progress.disable and name != current:
                print(name, flush=True)  # a log shows no bar, but how far it is
            current = name
            progress.update(task, advance=gained, description=f"{_part(name):{width}}")

        record = hub.fetch(shipment, settings.home, report)
        progress.update(task, completed=shipment.size, description=f"{'done':{width}}")
    place = shipment.graphs.folder if shipment.graphs else model.weights.file or record.folder
    console.print(f"[green]{model.name} is ready[/] in {escape(str(place))}", soft_wrap=True)


def _part(name: str) -> str:
    """The component that a file belongs to: its whole name would leave a bar no room."""
    return name.partition("/")[0]


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )
