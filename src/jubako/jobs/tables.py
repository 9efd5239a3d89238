"""The ledger's tables and its database: SQLite for one machine, PostgreSQL for several gateways."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event

from jubako.disk import no_room
from jubako.errors import JobsUnavailable, JubakoError

__all__ = [
    "database_url",
    "events",
    "files",
    "gateways",
    "jobs",
    "metadata",
    "open_database",
    "prints",
    "refusal",
]

BUSY_SECONDS = 30

_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_POSTGRESQL_IS_FULL = "53100"

metadata = sa.MetaData()

jobs = sa.Table(
    "jubako_jobs",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("task", sa.Text, nullable=False),
    sa.Column("family", sa.Text, nullable=False),
    sa.Column("model", sa.Text, nullable=False),
    sa.Column("request_hash", sa.Text, nullable=False),
    sa.Column("work", sa.Text, nullable=False),
    sa.Column("created", sa.Double, nullable=False),
    sa.Column("started", sa.Double),
    sa.Column("ended", sa.Double),
    sa.Column("progress", sa.Double, nullable=False),
    sa.Column("stage", sa.Integer, nullable=False),
    sa.Column("step", sa.Integer, nullable=False),
    sa.Column("steps", sa.Integer, nullable=False),
    sa.Column("outputs", sa.Text, nullable=False),
    sa.Column("error", sa.Text),
    sa.Column("expired", sa.Boolean, nullable=False),
    sa.Column("owner", sa.Text),
    sa.Column("request_id", sa.Text),
    sa.Column("traceparent", sa.Text),
    sa.Column("turn", sa.Integer),
    sa.Index("jubako_jobs_by_age", "created", "id"),
    sa.Index("jubako_jobs_by_state", "state", "family", "created"),
)

events = sa.Table(
    "jubako_events",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("data", sa.Text, nullable=False),
    sa.Index("jubako_events_of_job", "job_id", "id"),
    # Without it SQLite gives the numbers of removed events again, and a reader would take new ones for old.
    sqlite_autoincrement=True,
)

files = sa.Table(
    "jubako_files",
    metadata,
    sa.Column("job_id", sa.Text, primary_key=True),
    sa.Column("digest", sa.Text, primary_key=True),
    sa.Column("bytes", sa.BigInteger, nullable=False),
    sa.Index("jubako_files_by_digest", "digest"),
)

# Of each picture and clip what it looks like; also of those that were answered at once, which are in no job.
prints = sa.Table(
    "jubako_prints",
    metadata,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=True),
    sa.Column("owner", sa.Text, nullable=False),
    sa.Column("job_id", sa.Text, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("print", sa.Text, nullable=False),
    sa.Column("at", sa.Double, nullable=False),
    sa.Index("jubako_prints_of_owner", "owner", "id"),
    sa.Index("jubako_prints_of_job", "job_id"),
    # As of events: what was read already is known by the number of the last.
    sqlite_autoincrement=True,
)

gateways = sa.Table(
    "jubako_gateways",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("seen", sa.Double, nullable=False),
    sa.Column("heir", sa.Text),
)


def database_url(setting: str | None, home: Path) -> str:
    """The database of a setting, for SQLAlchemy and for DBOS."""
    if setting is None:
        return f"sqlite:///{home / 'jobs.sqlite'}"
    scheme, _, rest = setting.partition("://")
    return f"postgresql+psycopg://{rest}" if scheme.startswith("postgres") else setting


def open_database(url: str) -> sa.Engine:
    """An engine with the tables made; the folder of a SQLite file is made as well.

    Whatever is done with it raises DiskFull and JobsUnavailable where that is what is wrong. Other errors,
    which are logged, do not say of which values: there are prompts among them.
    """
    if not url.startswith("sqlite"):
        engine = sa.create_engine(url, pool_size=10, pool_pre_ping=True, hide_parameters=True)
        event.listen(engine, "handle_error", _refuse)
        with engine.begin() as connection:
            # Two gateways that start together must not both make the tables.
            connection.execute(sa.text("SELECT pg_advisory_xact_lock(8140251)"))
            _make_tables(connection)
        return engine
    if database := sa.make_url(url).database:
        Path(database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_SECONDS}, hide_parameters=True)
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "handle_error", _refuse)
    with engine.begin() as connection:
        # As above. By itself SQLite's driver begins nothing before a change of tables.
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        # A file that was cut off opens as if nothing were wrong.
        if (found := connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()) != "ok":
            raise _damaged(found)
        _make_tables(connection)
    return engine


def refusal(error: sa.exc.DBAPIError) -> JubakoError | None:
    """What a database's error means for a client, where it is one of the disk."""
    return _refusal(error.orig)


def _refuse(context: sa.engine.ExceptionContext) -> None:
    if (refused := _refusal(context.original_exception)) is not None:
        raise refused from context.original_exception


def _refusal(error: BaseException | None) -> JubakoError | None:
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return no_room("JUBAKO_HOME")
    if getattr(error, "sqlstate", None) == _POSTGRESQL_IS_FULL:
        return no_room("JUBAKO_DATABASE_URL")
    return _damaged(error) if code in _DAMAGED else None


def _damaged(what: object) -> JobsUnavailable:
    told = " ".join(str(what).split())
    return JobsUnavailable(
        f"the database of the jobs is damaged ({told}); stop the server and put a copy in the place of "
        "jobs.sqlite in JUBAKO_HOME, or move jobs.sqlite* away to begin without jobs"
    )


def _make_tables(connection: sa.Connection) -> None:
    """Make the tables that are missing, and in one that an older version made the columns that are."""
    metadata.create_all(connection)
    there = {column["name"] for column in sa.inspect(connection).get_columns(jobs.name)}
    for column in jobs.columns:
        if column.name not in there:
            kind = column.type.compile(connection.dialect)
            connection.execute(sa.text(f"ALTER TABLE {jobs.name} ADD COLUMN {column.name} {kind}"))


def _set_up_sqlite(connection: Any, _: object) -> None:
    # Writers wait for each other at their start; one that began as a reader could not.
    connection.isolation_level = "IMMEDIATE"
    # Readers are not held up by a writer. The mode stays with the file, so that DBOS has it too.
    connection.execute("PRAGMA journal_mode=WAL")
