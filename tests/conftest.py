"""What all tests share."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
import torch

# Modules that are no tests are imported by their names: pipelines, server.
sys.path.insert(0, str(Path(__file__).parent))

from api_keys import as_setting
from databases import postgresql
from exported_graphs import Exported, exporting
from oracle import Difference
from recorder import recording
from server import Server, serving

from jubako.catalog import load_catalog
from jubako.job import new_id
from jubako.jobs import tables
from jubako.jobs.record import Record, Work
from jubako.planning import plan
from jubako.request import TextToImage

TABLE = Path(__file__).parents[1] / "docs" / "parity.md"

# The pipelines here are so small that a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The gateway and the family of the default model; the other families would only take memory."""
    with serving(tmp_path_factory.mktemp("server"), JUBAKO_FAMILIES="sd") as server:
        yield server


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The same with API keys, its processes' outgoing connections written down in ``connections``."""
    folder = tmp_path_factory.mktemp("guarded")
    with serving(folder, JUBAKO_FAMILIES="sd", JUBAKO_API_KEYS=as_setting(), **recording(folder)) as server:
        yield server


def pytest_addoption(parser: pytest.Parser) -> None:
    """A switch for the one table that a test run makes."""
    parser.addoption("--write-parity", action="store_true", help="rewrite the table of docs/parity.md")


@pytest.fixture(scope="session")
def check(request: pytest.FixtureRequest) -> Iterator[Callable[[str, str, str, Difference], None]]:
    """Hold a difference under a model, task and scheduler to the bounds; keep the largest for the table."""
    found: dict[tuple[str, str, str], Difference] = {}

    def hold(model: str, task: str, scheduler: str, apart: Difference) -> None:
        key = (model, task, scheduler)
        before = found.get(key, Difference(0.0, 0.0))
        found[key] = Difference(max(apart.latents, before.latents), max(apart.picture, before.picture))
        where = f"{model}, {task}, {scheduler}"
        assert apart.latents < 1e-3, f"{where}: latents differ by {apart.latents:.2e} of the largest"
        assert apart.picture < 2, f"{where}: the picture differs by {apart.picture:.3f}/255"

    yield hold
    if request.config.getoption("--write-parity"):
        head, _, _ = TABLE.read_text(encoding="utf-8").partition("| model |")
        lines = [
            "| model | task | scheduler | latents, relative | picture, of 255 |",
            "| --- | --- | --- | --- | --- |",
            *(
                f"| {model} | {task} | {scheduler} | {apart.latents:.0e} | {apart.picture:.3f} |"
                for (model, task, scheduler), apart in found.items()
            ),
        ]
        TABLE.write_text(head + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    """A PostgreSQL server, for as long as the tests run."""
    with postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """An empty database of each kind, as a setting has it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'jobs.sqlite'}"
        return
    found: str = request.getfixturevalue("postgresql_url")
    yield found
    engine = sa.create_engine(tables.database_url(found, tmp_path))
    tables.metadata.drop_all(engine)
    with engine.begin() as connection:
        connection.execute(sa.text("DROP SCHEMA IF EXISTS dbos CASCADE"))
    engine.dispose()


@pytest.fixture
def database(ledger_url: str, tmp_path: Path) -> Iterator[sa.Engine]:
    """The ledger's tables in it."""
    engine = tables.open_database(tables.database_url(ledger_url, tmp_path))
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """The miniatures' graphs."""
    return exporting(tmp_path_factory.mktemp("graphs"))


@pytest.fixture(scope="session")
def record() -> Callable[..., Record]:
    """A job that could be recorded, on the model of that name."""

    def made(model: str = "tiny-sd", **fields: Any) -> Record:
        job = plan(TextToImage(prompt="a red circle", model=model, seed=7), load_catalog())
        own = {"task": job.task, "family": job.family, "model": job.model, "work": Work(jobs=(job,))}
        given = {"id": new_id(), "state": "queued", "request_hash": "x", "created": time.time(), **own}
        return Record.model_validate(given | fields)

    return made
