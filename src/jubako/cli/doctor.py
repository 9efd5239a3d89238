"""`jubako doctor`: what this machine has, what is to be mended, and which weights each model is served from.

The machine is looked at in another process, so that neither PyTorch nor a broken GPU library is in this one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jubako.catalog import Model, load_catalog
from jubako.errors import WeightsUnavailable
from jubako.hardware import NAMES, VENDORS, Machine, Signals, machine, require_device
from jubako.probe import signals_apart
from jubako.settings import Settings, SettingsError, load_settings
from jubako.weight_sets import GraphSet
from jubako.weights.graphs.store import missing_graphs
from jubako.weights.selection import Choice, choose

__all__ = ["doctor", "examined"]

# Where the output is no terminal, reasons get lines of this length.
PIPED_COLUMNS = 100

Missing = Callable[[Model, GraphSet], str | None]


def doctor(
    model: Annotated[
        str | None, typer.Option(help="Tell about this model only; without it about all of the catalog.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Tell what this machine has, what is to be mended, and which weights each model is served from.

    Exits with 1 when there is something to mend.
    """
    settings = load_settings()
    catalog = load_catalog(settings.catalog).only(settings.families)
    models = [catalog.model(model)] if model else list(catalog)
    report = examined(signals_apart(), models, settings)
    if as_json:
        print(json.dumps(report, indent=1))
    else:
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = PIPED_COLUMNS
        _print(console, report)
    if report["problems"]:
        raise typer.Exit(1)


def examined(
    signals: Signals, models: Iterable[Model], settings: Settings, missing: Missing | None = None
) -> dict[str, Any]:
    """Everything that the command tells, as JSON has it.

    A model has a ``choice``, or an ``error`` where what is set for it can't be served or the server would not
    start. Whether graphs are admitted is not looked into: that is done when a model is loaded.
    """
    found = machine(signals)
    # Whoever asks for the CPU has nothing to mend about GPUs.
    without = signals.model_copy(update={"torch_sees": (), "device_files": ()})
    problems = list((machine(without) if settings.device == "cpu" else found).problems)
    device: str | None = None
    try:
        device = require_device(found, settings.device)
    except SettingsError as error:
        # What auto can't use is a problem of the machine and among them already.
        problems += [] if settings.device == "auto" else [str(error)]
    used = found.using(device) if device else None
    return {
        "device": device,
        "problems": problems,
        "signals": signals.model_dump(mode="json"),
        "machine": found.model_dump(mode="json"),
        "models": [_model(each, used, settings, missing or _missing(settings)) for each in models],
    }


def _model(model: Model, machine: Machine | None, settings: Settings, missing: Missing) -> dict[str, Any]:
    if machine is None:
        return {"name": model.name, "choice": None, "error": "no server starts on this machine as it is"}
    choice: Choice | None = None
    error = None
    try:
        choice = choose(
            model,
            machine,
            weights=settings.weights_for(model.name) or model.weight_set,
            precision=settings.precision_for(model.name) or model.precision,
            provider=settings.execution_provider,
            missing=lambda graphs: missing(model, graphs),
            refused=lambda _: None,
        )
    except WeightsUnavailable as refusal:
        error = refusal.message
    told = choice.model_dump(mode="json", exclude={"graphs"}) if choice else None
    return {"name": model.name, "choice": told, "error": error}


def _missing(settings: Settings) -> Missing:
    def missing(model: Model, graphs: GraphSet) -> str | None:
        vendor = next(each for each in VENDORS if graphs in model.graph_sets(each))
        return missing_graphs(settings.home, model, vendor, graphs)

    return missing


def _print(console: Console, report: dict[str, Any]) -> None:
    signals = Signals.model_validate(report["signals"])
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(signals):
        facts.add_row(name, Text(value))
    facts.add_row("Device", Text(report["device"] or "none: see below"))
    console.print(facts)
    if report["problems"]:
        console.print("\nTo be mended", style="bold red")
        for problem in report["problems"]:
            console.print(Text(f"- {problem}"))
    console.print()
    console.print(_table(report["models"]))


def _facts(signals: Signals) -> Iterable[tuple[str, str]]:
    for gpu in signals.torch_sees:
        kind = gpu.architecture or f"compute capability {gpu.compute_capability}"
        yield "GPU", f"{gpu.name}, {kind}, {gpu.free / 1e9:.1f} GB of {gpu.memory / 1e9:.1f} GB free"
    if not signals.torch_sees:
        hints = ", ".join(signals.device_files)
        yield "GPU", f"none that PyTorch sees, but {hints}" if hints else "none"
    for vendor in VENDORS:
        if vendor in signals.drivers:
            yield "Driver", f"{NAMES[vendor]} {signals.drivers[vendor]}"
    build = {"cpu": "for CPUs", "cuda": "for CUDA", "rocm": "for ROCm", None: ""}[signals.torch_build]
    about = " ".join(filter(None, (signals.torch_version, build, signals.toolkit)))
    yield "PyTorch", about or f"can't be imported: {signals.torch_problem}"
    installed = ", ".join(f"{each.name} {each.version}" for each in signals.onnxruntimes)
    yield "ONNX Runtime", installed or "not installed"
    for name, reason in signals.loading.items():
        yield "", f"{name}: {reason or 'runs'}"


def _table(models: Iterable[dict[str, Any]]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("Model", no_wrap=True)
    table.add_column("Served from", no_wrap=True)
    table.add_column("Not from", overflow="fold")
    for each in models:
        choice = each["choice"]
        if choice is None:
            table.add_row(each["name"], Text("-", style="red"), Text(each["error"]))
            continue
        served = Text(f"{choice['vendor']} {choice['precision']}", style="green")
        table.add_row(each["name"], served, Text(_reasons(choice["rejected"]), style="dim"))
    return table


def _reasons(rejected: Iterable[dict[str, Any]]) -> str:
    """A line for each reason, with all the sets that it goes for."""
    sets: dict[str, list[str]] = {}
    for rung in rejected:
        name = " ".join(filter(None, (rung["weights"], rung["precision"])))
        sets.setdefault(rung["reason"], []).append(name)
    return "\n".join(f"{', '.join(names)}: {reason}" for reason, names in sets.items())
