"""The command line: what can be served, fetching weights, a picture from a running server.

Starts fast: each command imports what it needs when it runs, and none imports torch.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from jubako import __version__
from jubako.catalog import CatalogError
from jubako.cli.adapters import adapters
from jubako.cli.comparison import compare
from jubako.cli.doctor import doctor
from jubako.cli.engines import engines
from jubako.cli.export import export
from jubako.cli.jobs import jobs
from jubako.cli.key import key
from jubako.cli.models import models
from jubako.cli.pictures import generate
from jubako.cli.train import train
from jubako.cli.weights import pull
from jubako.errors import JubakoError
from jubako.settings import SettingsError, forbid_remote_code

__all__ = ["app", "main"]

app = typer.Typer(
    name="jubako",
    help="A server for the Stable Diffusion family: what it can serve, its weights, and pictures from it.",
    epilog="Start a server with `scripts/serve` in the checkout.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(models)
app.command()(pull)
app.command()(generate)
app.command()(compare)
app.command()(train)
app.command()(doctor)
app.command()(export)
app.command()(key)
app.add_typer(jobs, name="jobs")
app.add_typer(engines, name="engines")
app.add_typer(adapters, name="adapters")


def main() -> None:
    """Run the command that the arguments name. What a user can mend is one sentence and exit status 1."""
    forbid_remote_code()
    try:
        app()
    except (JubakoError, SettingsError, CatalogError) as error:
        print(f"jubako: {error}", file=sys.stderr)
        sys.exit(1)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jubako {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Nothing to do between the options of the program and its command."""
