"""Earlier results that a new one is like, on both databases: whose, how near, how many, for how long."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import sqlalchemy as sa

from jubako.jobs import similarity, tables
from jubako.jobs.ledger import Ledger
from jubako.jobs.record import Output, Record, Similar
from jubako.jobs.similarity import Printed, Similarity

ZERO, ONE_BIT, FIVE_BITS, FAR = "0" * 16, "0" * 15 + "1", "0" * 14 + "1f", "f" * 16


@pytest.fixture
def seen(database: sa.Engine) -> Similarity:
    return Similarity(database, 4)


def noted(seen: Similarity, owner: str, *results: Printed) -> list[tuple[Similar, ...]]:
    """What a gateway does with results."""
    found = seen.near(owner, results)
    seen.note(owner, results)
    return found


def ids(found: tuple[Similar, ...]) -> list[tuple[str, int]]:
    return [(each.id, each.distance) for each in found]


def test_the_nearest_come_first_and_what_is_too_far_does_not(seen: Similarity) -> None:
    for name, fingerprint in (("one", ONE_BIT), ("five", FIVE_BITS), ("same", ZERO), ("far", FAR)):
        noted(seen, "", Printed(name, 0, fingerprint))
    (found,) = noted(seen, "", Printed("new", 0, ZERO))
    assert ids(found) == [("same", 0), ("one", 1)]


def test_nobody_hears_of_another_s_results(seen: Similarity, database: sa.Engine) -> None:
    noted(seen, "alice", Printed("hers", 0, ZERO))
    for owner in ("bob", ""):
        assert noted(seen, owner, Printed(f"of {owner}", 0, ZERO)) == [()]
    assert Similarity(database, 4).near("alice", [Printed("new", 0, ZERO)]) == [
        (Similar(id="hers", index=0, distance=0),)
    ]


def test_results_of_one_request_are_compared_in_their_order(seen: Similarity) -> None:
    found = noted(seen, "", *(Printed("job", index, ZERO) for index in range(3)))
    assert [[each.index for each in similar] for similar in found] == [[], [0], [0, 1]]


def test_a_job_that_is_run_again_is_not_like_itself(seen: Similarity) -> None:
    for _ in range(2):
        assert noted(seen, "", Printed("job", 0, ZERO)) == [()]
    (found,) = seen.near("", [Printed("new", 0, ZERO)])
    assert ids(found) == [("job", 0)]


def test_a_clip_is_like_another_when_both_frames_are(seen: Similarity) -> None:
    noted(seen, "", Printed("clip", 0, ZERO + FAR), Printed("still", 0, ZERO + ZERO))
    noted(seen, "", Printed("picture", 0, ZERO))
    (found,) = seen.near("", [Printed("new", 0, ONE_BIT + FAR)])
    assert ids(found) == [("clip", 1)]
    (found,) = seen.near("", [Printed("new", 0, ONE_BIT)])
    assert ids(found) == [("picture", 1), ("still", 1)]


def test_only_the_nearest_few_are_told_of(seen: Similarity) -> None:
    for number in range(8):
        noted(seen, "", Printed(str(number), 0, ZERO))
    (found,) = seen.near("", [Printed("new", 0, ZERO)])
    assert ids(found) == [(str(number), 0) for number in (7, 6, 5, 4, 3)]


def test_what_another_gateway_made_counts_and_what_is_removed_does_not(
    seen: Similarity, database: sa.Engine, record: Callable[..., Record]
) -> None:
    ledger, other = Ledger(database), Similarity(database, 4)
    jobs = [record() for _ in range(2)]
    for number, job in enumerate(jobs):
        ledger.add(job)
        noted(other, "", Printed(job.id, 0, ZERO))
        digest = str(number) * 64
        ledger.succeed(job.id, [Output(digest=digest, content_type="image/png", bytes=10, seed=7)])
    (found,) = seen.near("", [Printed("new", 0, ZERO)])
    assert {each.id for each in found} == {job.id for job in jobs}
    ledger.expire_past(10)
    (found,) = seen.near("", [Printed("new", 0, ZERO)])
    assert [each.id for each in found] == [jobs[1].id]
    ledger.forget([jobs[1].id])
    assert seen.near("", [Printed("new", 0, ZERO)]) == [()]


def test_rows_past_their_age_and_number_go(
    seen: Similarity, database: sa.Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "KEPT", 3)
    for owner in ("alice", "bob"):
        for number in range(5):
            noted(seen, owner, Printed(f"{owner}-{number}", 0, ZERO))
    (found,) = seen.near("bob", [Printed("new", 0, ZERO)])
    assert ids(found) == [(f"bob-{number}", 0) for number in (4, 3, 2)]
    seen.sweep(0)
    assert rows(database) == ["alice-2", "alice-3", "alice-4", "bob-2", "bob-3", "bob-4"]
    seen.sweep(time.time())
    assert not rows(database)
    assert noted(seen, "bob", Printed("last", 0, ZERO)) == [()]


def rows(database: sa.Engine) -> list[str]:
    with database.connect() as connection:
        return sorted(connection.execute(sa.select(tables.prints.c.job_id)).scalars())
