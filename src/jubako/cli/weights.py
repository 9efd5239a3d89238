"""`jubako pull`: fetch a model's weights, an adapter or a checker, with its licence first and a bar."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from jubako.catalog import AdapterEntry, Catalog, CheckerEntry, Licence, Model, load_catalog
from jubako.cli.parcels import brought, print_licence
from jubako.errors import UnknownModel, nearest
from jubako.licences import is_accepted, require_accepted, require_known_licences
from jubako.settings import Settings, load_settings
from jubako.weight_sets import GraphSet, Vendor, WeightsChoice
from jubako.weights.graphs.store import GraphRecord, read_graph_record
from jubako.weights.layout import PullFailed
from jubako.weights.manifest import damaged, discard
from jubako.weights.store import find_weights, read_record, require_own_files

if TYPE_CHECKING:
    from jubako.hub import Shipment

__all__ = ["pull"]


def pull(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="A name of `jubako models` or `jubako adapters list`, or safety-checker."
        ),
    ],
    weights: Annotated[
        WeightsChoice, typer.Option(help="Whose weights: standard, nvidia or amd; `jubako models --weights`.")
    ] = "standard",
    precision: Annotated[
        str | None, typer.Option(help="In which precision, where a vendor has several; without it the first.")
    ] = None,
    accept_licence: Annotated[
        bool, typer.Option("--accept-licence", help="You have read the licence and accept it.")
    ] = False,
) -> None:
    """Fetch weights or an adapter from the Hugging Face hub; an interrupted pull goes on where it was."""
    settings = load_settings()
    catalog = load_catalog(settings.catalog)
    require_known_licences(settings, catalog)
    console = Console(highlight=False)
    agree = partial(_agree, console, settings, given=accept_licence)
    if (entry := catalog.adapters.get(name)) is not None:
        _pull_adapter(console, entry, settings, weights, agree)
        return
    if (checker := catalog.checkers.get(name)) is not None:
        _pull_checker(console, checker, settings, agree)
        return
    model = _model(catalog, name)
    if weights in {"nvidia", "amd"}:
        graphs = _graph_set(model, weights, precision)
        _print_licence(console, model, graphs)
        agree(model.name, model.licence)
        _discard_damaged(console, settings, model, read_graph_record(settings.home, model, weights, graphs))
        with _patient():
            _fetch(console, model, settings, lambda hub: hub.inspect_graphs(model, weights, graphs))
        return
    if model.weights.folder is not None and not _overlay_repo(model):
        console.print(_about_folder(model, settings), soft_wrap=True)
        return
    require_own_files(model)
    _print_licence(console, model)
    _discard_damaged(console, settings, model)
    if _is_pinned_and_here(model, settings):
        console.print(f"{model.name} is on disk already, at its pinned commit", soft_wrap=True)
        return
    agree(model.name, model.licence)
    models = catalog.families[model.family].models
    with _patient():
        _fetch(console, model, settings, lambda hub: hub.inspect(model, settings.home, models))


def _model(catalog: Catalog, name: str) -> Model:
    if name in catalog.names:
        return catalog.model(name)
    hint = nearest(name, (*catalog.names, *catalog.adapters, *catalog.checkers))
    raise UnknownModel(
        f"there is no {name!r} to pull.{hint} Models: {', '.join(catalog.names)}. "
        f"Adapters: {', '.join(catalog.adapters)}. Safety checkers: {', '.join(catalog.checkers)}"
    )


def _agree(console: Console, settings: Settings, name: str, licence: Licence, *, given: bool) -> None:
    """Ask whether the licence is accepted, where nobody has said so; LicenceNotAccepted where it is not."""
    if is_accepted(licence, settings):
        return
    if not given:
        asked = console.is_terminal and sys.stdin.isatty()
        if not (asked and typer.confirm(f"Have you read {licence.id}, and do you accept it?")):
            require_accepted(name, licence, settings, ", or pulls it with --accept-licence")
    console.print(f"To serve it, add {licence.id} to JUBAKO_ACCEPTED_LICENCES as well", style="yellow")


def _pull_adapter(
    console: Console,
    entry: AdapterEntry,
    settings: Settings,
    weights: WeightsChoice,
    agree: Callable[[str, Licence], None],
) -> None:
    if weights != "standard":
        raise PullFailed(
            f"weights: {entry.name} is an adapter, of which there is one file; leave --weights out"
        )
    from jubako.adapters.store import AdapterStore

    store = AdapterStore(settings.home)
    print_licence(console, entry.title, [entry.repo], entry.licence)
    here = store.named(entry.name)
    if here is not None and (here.card.get("repo"), here.card.get("file")) == (entry.repo, entry.file):
        console.print(
            f"{entry.name} is here already, of commit {here.card.get('commit')}; to fetch it anew, remove it "
            f"first: jubako adapters remove {entry.name}",
            soft_wrap=True,
        )
        return
    store.require_free(entry.name)
    agree(entry.name, entry.licence)
    with _patient():
        with console.status("Asking the hub"):
            from jubako import hub  # as for a model

            parcel = hub.inspect_adapter(entry)
        brought(console, [parcel], lambda report: hub.fetch_adapter(entry, parcel, store, report))
    console.print(f"[green]{entry.name} is ready[/] for {', '.join(entry.base)}", soft_wrap=True)


def _pull_checker(
    console: Console, entry: CheckerEntry, settings: Settings, agree: Callable[[str, Licence], None]
) -> None:
    print_licence(console, entry.title, [entry.repo or entry.folder], entry.licence)
    if entry.repo is None:
        console.print(f"{entry.name} lies in a folder of yours, not on the hub", soft_wrap=True)
        return
    agree(entry.name, entry.licence)
    with _patient():
        with console.status("Asking the hub"):
            from jubako import hub  # as for a model

            shipment = hub.inspect_checker(entry)
        record = brought(console, shipment.parcels, lambda report: hub.fetch(shipment, settings.home, report))
    console.print(f"[green]{entry.name} is ready[/] in {escape(str(record.folder))}", soft_wrap=True)


def _discard_damaged(
    console: Console, settings: Settings, model: Model, graphs: GraphRecord | None = None
) -> None:
    """Remove what was pulled before and is damaged now, so that it is fetched again."""
    record = graphs.base if graphs else read_record(settings.home, model)
    known = (*(record.manifests if record else ()), *([graphs.manifest] if graphs else []))
    for path in damaged(known, settings.home):
        if path.exists():
            console.print(f"{path} is damaged and will be fetched again", style="yellow", soft_wrap=True)
            discard(path)


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
    own = model.weights
    origins = (own.repo, own.file, own.folder, _overlay_repo(model), graphs.repo if graphs else None)
    print_licence(console, model.title, filter(None, origins), model.licence)


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
    if shipment.record.config is not None:
        console.print(f"Configs and tokenizers: those of {shipment.record.config}", soft_wrap=True)
    record = brought(console, shipment.parcels, lambda report: hub.fetch(shipment, settings.home, report))
    place = shipment.graphs.folder if shipment.graphs else model.weights.file or record.folder
    console.print(f"[green]{model.name} is ready[/] in {escape(str(place))}", soft_wrap=True)
