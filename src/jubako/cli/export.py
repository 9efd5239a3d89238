"""`jubako export`: write a model as graphs in a vendor's layout, to serve it as vendors' own are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from jubako.catalog import load_catalog
from jubako.settings import load_settings
from jubako.weight_sets import Vendor

__all__ = ["export"]

PRECISIONS = ("float32", "float16", "bfloat16", "mixed")


def export(
    name: Annotated[str, typer.Argument(metavar="MODEL", help="A name from `jubako models`.")],
    layout: Annotated[Vendor, typer.Option(help="Whose names, files and types: nvidia or amd.")],
    out: Annotated[Path, typer.Option(help="The folder to write, which must be new or empty.")],
    precision: Annotated[
        str, typer.Option(help="float32, float16, bfloat16, or mixed: float16 with float32 at the edges.")
    ] = "float16",
) -> None:
    """Write a model's graphs, and the catalog entry that serves them from JUBAKO_CATALOG."""
    model = load_catalog(load_settings().catalog).model(name)
    if precision not in PRECISIONS:
        raise typer.BadParameter(f"choose from {', '.join(PRECISIONS)}", param_hint="--precision")
    # Tracing takes torch, which the command line does without.
    command = [sys.executable, "-m", "jubako.export", model.name, "--layout", layout]
    done = subprocess.run([*command, "--precision", precision, "--out", str(out)], check=False)
    if done.returncode:
        raise typer.Exit(done.returncode)
    print(f"\nServe them with: JUBAKO_CATALOG={out} JUBAKO_WEIGHTS={model.name}={layout} scripts/serve")
