"""The ledger's SQLite file when its disk is full, and when what lies there is no longer what was written."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import event

from jubako.errors import DiskFull, JobsUnavailable
from jubako.jobs.ledger import Ledger
from jubako.jobs.record import Record
from jubako.jobs.tables import open_database

Made = Callable[..., Record]


def add_until_full(ledger: Ledger, record: Made) -> None:
    for _ in range(1000):
        ledger.add(record())


def test_a_full_disk_refuses_new_jobs_and_keeps_those_before(tmp_path: Path, record: Made) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    ledger, known, later = Ledger(engine), record(), record()
    assert ledger.add(known)
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one() + 3

    def bound(connection: Any, *_: object) -> None:
        connection.execute(f"PRAGMA max_page_count={pages}")

    event.listen(engine, "checkout", bound)
    with pytest.raises(DiskFull, match="the disk of JUBAKO_HOME is full") as caught:
        add_until_full(ledger, record)
    assert caught.value.status == 507
    assert ledger.get(known.id) == known
    pages = 6000
    assert ledger.add(later)
    assert ledger.get(later.id) == later
    engine.dispose()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, record: Made) -> Path:
    """A database of a hundred jobs, all of it in its one file."""
    file = tmp_path_factory.mktemp("whole") / "jobs.sqlite"
    engine = open_database(f"sqlite:///{file}")
    event.listen(engine, "checkout", lambda connection, *_: connection.execute("PRAGMA synchronous=OFF"))
    ledger = Ledger(engine)
    for _ in range(100):
        ledger.add(record())
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
    engine.dispose()
    return file


@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_a_file_that_was_cut_off_is_refused_when_it_is_opened(
    tmp_path: Path, whole: Path, share: float
) -> None:
    file = tmp_path / "jobs.sqlite"
    file.write_bytes(whole.read_bytes()[: int(share * whole.stat().st_size)])
    with pytest.raises(
        JobsUnavailable, match=r"the database of the jobs is damaged .*move jobs\.sqlite\* away"
    ):
        open_database(f"sqlite:///{file}")


def test_what_is_no_database_is_refused(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(bytes(range(256)) * 100)
    with pytest.raises(JobsUnavailable, match="file is not a database"):
        open_database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")


def test_one_that_is_damaged_under_a_server_is_told_as_such(
    tmp_path: Path, whole: Path, record: Made
) -> None:
    shutil.copy(whole, tmp_path / "jobs.sqlite")
    engine = open_database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    content = (tmp_path / "jobs.sqlite").read_bytes()
    (tmp_path / "jobs.sqlite").write_bytes(content[:4096] + bytes(len(content) - 4096))
    engine.dispose()
    with pytest.raises(JobsUnavailable, match="malformed") as caught:
        Ledger(engine).add(record())
    assert caught.value.status == 503
    engine.dispose()


def test_what_was_being_written_when_the_power_went_is_taken_back(tmp_path: Path, record: Made) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    ledger, known = Ledger(engine), record()
    ledger.add(known)
    before = (tmp_path / "jobs.sqlite-wal").stat().st_size
    ledger.add(record())
    # The files as they are in the midst of the second job's pages.
    (tmp_path / "torn").mkdir()
    shutil.copy(tmp_path / "jobs.sqlite", tmp_path / "torn")
    log = (tmp_path / "jobs.sqlite-wal").read_bytes()
    (tmp_path / "torn" / "jobs.sqlite-wal").write_bytes(log[: (before + len(log)) // 2])
    engine.dispose()
    torn = open_database(f"sqlite:///{tmp_path / 'torn' / 'jobs.sqlite'}")
    assert [each.id for each in Ledger(torn).page({}, None, 10, newest_first=True)] == [known.id]
    torn.dispose()


def test_other_errors_of_the_database_stay_what_they_are(tmp_path: Path) -> None:
    engine = open_database(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    with engine.connect() as connection, pytest.raises(sa.exc.OperationalError, match="no such table"):
        connection.exec_driver_sql("SELECT * FROM elsewhere")
    engine.dispose()
