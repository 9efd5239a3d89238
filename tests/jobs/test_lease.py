"""Names that come back after a restart, and dead gateways that one other takes over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa

from jubako.jobs.lease import Lease, take_name

HOLD = """
import sys, time
from pathlib import Path
from jubako.jobs.lease import take_name
name, lock = take_name("box", Path(sys.argv[1]))
print(name, flush=True)
time.sleep(60)
"""


def holder(home: Path) -> tuple[subprocess.Popen[str], str]:
    """Another process that holds a name."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(home)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    return process, process.stdout.readline().strip()


def test_a_killed_gateway_s_name_comes_back_and_a_living_one_s_does_not(tmp_path: Path) -> None:
    first, name = holder(tmp_path)
    try:
        assert name == "box-0"
        second, lock = take_name("box", tmp_path)
        assert second == "box-1"
        lock.close()
    finally:
        first.kill()
        first.wait()
        if first.stdout:
            first.stdout.close()
    again, lock = take_name("box", tmp_path)
    assert again == "box-0"
    lock.close()


def test_without_a_setting_the_name_is_the_host_s(tmp_path: Path) -> None:
    name, lock = take_name(None, tmp_path)
    assert name.endswith("-0")
    lock.close()


@pytest.fixture
def gateways(database: sa.Engine) -> list[Lease]:
    return [Lease(database, name, seconds=5) for name in ("a", "b", "c")]


def pass_time(database: sa.Engine, name: str, seconds: float) -> None:
    with database.begin() as connection:
        connection.execute(
            sa.text("UPDATE jubako_gateways SET seen = seen - :seconds WHERE id = :name"),
            {"seconds": seconds, "name": name},
        )


def test_a_gateway_that_shows_signs_of_life_is_not_dead(gateways: list[Lease]) -> None:
    first, second, _ = gateways
    assert not first.renew()
    assert first.renew()
    second.renew()
    assert second.claim_dead() == []


def test_one_of_the_others_takes_a_dead_one_over(gateways: list[Lease], database: sa.Engine) -> None:
    dead, second, third = gateways
    for each in gateways:
        each.renew()
    pass_time(database, "a", 6)
    assert second.claim_dead() == ["a"]
    assert third.claim_dead() == []
    assert not dead.renew(), "it must hear that it was taken for dead"
    assert dead.renew()


def test_an_heir_that_dies_as_well_is_followed_by_the_next(
    gateways: list[Lease], database: sa.Engine
) -> None:
    _, second, third = gateways
    for each in gateways:
        each.renew()
    pass_time(database, "a", 6)
    assert second.claim_dead() == ["a"]
    pass_time(database, "a", 6)
    assert third.claim_dead() == ["a"]
    second.bury("a")
    assert third.claim_dead() == [], "it is third's to bury, and its lease begins anew"
    third.bury("a")
    pass_time(database, "b", 6)
    assert third.claim_dead() == ["b"]


def test_who_ends_in_order_is_taken_over_at_once(gateways: list[Lease]) -> None:
    first, second, _ = gateways
    first.renew()
    first.release()
    assert second.claim_dead() == ["a"]
