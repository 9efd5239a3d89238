"""`jubako key`: an API key that nobody can guess, and the line that lets it in."""

from __future__ import annotations

from typing import Annotated

import typer

from jubako.errors import InvalidRequest
from jubako.keys import SCOPES, key_line, new_key

__all__ = ["key"]


def key(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Whose key it is.")],
    scopes: Annotated[
        str, typer.Option(help=f"What it allows, separated by commas: {', '.join(SCOPES)}.")
    ] = "generate,jobs",
    expires: Annotated[str | None, typer.Option(help="From when it is refused, as 2027-01-31.")] = None,
) -> None:
    """Make an API key: the key for the client, and its line for the server's JUBAKO_API_KEYS_FILE."""
    secret = new_key()
    try:
        line = key_line(name, secret, scopes.split(","), expires)
    except ValueError as error:
        raise InvalidRequest(str(error)) from error
    print(f"JUBAKO_API_KEY={secret}")
    print(line)
