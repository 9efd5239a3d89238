"""The ledger on both databases: one end for each job, ordered events, progress that never goes back."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from jubako.errors import GenerationFailed
from jubako.jobs.ledger import Advance, Ledger
from jubako.jobs.record import Output, Record
from jubako.jobs.tables import open_database

Made = Callable[..., Record]


@pytest.fixture
def ledger(database: sa.Engine) -> Ledger:
    return Ledger(database)


def output(digest: str = "a" * 64, size: int = 10) -> Output:
    return Output(digest=digest, content_type="image/png", bytes=size, seed=7)


def kinds(ledger: Ledger, job_id: str) -> list[str]:
    return [event.kind for event in ledger.events(job_id, 0)]


def ended(ledger: Ledger, record: Record, digest: str = "a" * 64, size: int = 10) -> Record:
    ledger.add(record)
    ledger.begin(record.id)
    ledger.succeed(record.id, [output(digest, size)])
    found = ledger.get(record.id)
    assert found
    return found


def test_a_record_comes_back_as_it_was(ledger: Ledger, record: Made) -> None:
    one = record(owner="alice", request_id="r", traceparent="00-1-2-01")
    assert ledger.add(one)
    assert ledger.get(one.id) == one
    assert ledger.get("x") is None


def test_an_error_of_the_database_does_not_say_which_values(database: sa.Engine) -> None:
    statement = sa.text("SELECT * FROM nothing WHERE prompt = :prompt")
    with database.connect() as connection, pytest.raises(sa.exc.DBAPIError) as failure:
        connection.execute(statement, {"prompt": "a red circle"})
    assert "nothing" in str(failure.value)
    assert "red" not in str(failure.value)


def test_an_id_is_taken_once(ledger: Ledger, record: Made) -> None:
    one = record()
    assert ledger.add(one)
    assert not ledger.add(one)
    assert kinds(ledger, one.id) == ["queued"]


def test_a_job_goes_from_queued_to_running_to_succeeded(ledger: Ledger, record: Made) -> None:
    one = record()
    ledger.add(one)
    began = ledger.begin(one.id)
    assert began
    assert began.state == "running"
    ledger.advance({one.id: Advance(0, 5, 25, 0.2, "cHJldmlldw==")})
    assert ledger.succeed(one.id, [output()])
    done = ledger.get(one.id)
    assert done
    assert (done.state, done.progress, done.outputs) == ("succeeded", 1.0, (output(),))
    assert done.started is not None
    assert done.ended is not None
    assert done.created <= done.started <= done.ended
    assert kinds(ledger, one.id) == ["queued", "started", "progress", "completed"]
    assert ledger.events(one.id, 0)[2].data["preview"] == "cHJldmlldw=="


def test_it_begins_again_after_a_crash_without_saying_so_twice(ledger: Ledger, record: Made) -> None:
    one = record()
    ledger.add(one)
    assert ledger.begin(one.id)
    assert ledger.begin(one.id)
    assert kinds(ledger, one.id) == ["queued", "started"]


def test_of_many_who_end_a_job_one_wins(ledger: Ledger, record: Made) -> None:
    error = GenerationFailed("no").body()
    for _ in range(5):
        one = record()
        ledger.add(one)
        ends = [
            lambda job_id=one.id: ledger.cancel(job_id),
            lambda job_id=one.id: ledger.fail(job_id, error),
            lambda job_id=one.id: ledger.succeed(job_id, [output()]),
        ] * 3
        with ThreadPoolExecutor(9) as threads:
            won = list(threads.map(lambda end: end(), ends))
        assert sum(won) == 1
        assert len(kinds(ledger, one.id)) == 2
        assert ledger.begin(one.id) is None


def test_progress_never_goes_back(ledger: Ledger, record: Made) -> None:
    one = record()
    ledger.add(one)
    ledger.begin(one.id)
    for stage, step, progress in ((0, 5, 0.2), (0, 1, 0.04), (1, 1, 0.6), (0, 25, 0.5), (1, 9, 0.9)):
        ledger.advance({one.id: Advance(stage, step, 25, progress)})
    told = [event.data["progress"] for event in ledger.events(one.id, 0) if event.kind == "progress"]
    assert told == [0.2, 0.6, 0.9]
    ledger.succeed(one.id, [output()])
    ledger.advance({one.id: Advance(1, 10, 25, 0.95)})
    assert kinds(ledger, one.id)[-1] == "completed"


def test_events_go_on_behind_the_one_that_was_seen(ledger: Ledger, record: Made) -> None:
    one, other = record(), record()
    for each in (one, other):
        ledger.add(each)
        ledger.begin(each.id)
    first, second = ledger.events(one.id, 0)
    assert first.id < second.id
    assert ledger.events(one.id, first.id) == [second]
    assert ledger.events(one.id, second.id) == []


def test_the_place_in_the_queue_counts_the_family_s_earlier_jobs(ledger: Ledger, record: Made) -> None:
    now = time.time()
    mine = [record(created=now + i) for i in range(3)]
    for each in [*mine, record("tiny-sdxl", created=now - 1)]:
        ledger.add(each)
    assert [ledger.ahead(each) for each in mine] == [0, 1, 2]
    ledger.begin(mine[0].id)
    assert [ledger.ahead(each) for each in mine[1:]] == [0, 1]


def test_owners_take_turns_however_many_jobs_each_has_sent(ledger: Ledger, record: Made) -> None:
    now = itertools.count(time.time())

    def sent(owner: str | None) -> Record:
        turn = ledger.next_turn("sd", owner)
        one = record(created=next(now)).model_copy(update={"owner": owner, "turn": turn})
        ledger.add(one)
        return one

    ada = [sent("ada") for _ in range(4)]
    bob, nobody = [sent("bob") for _ in range(2)], sent(None)
    order = sorted([*ada, *bob, nobody], key=ledger.ahead)
    assert order == [ada[0], bob[0], nobody, ada[1], bob[1], ada[2], ada[3]]
    for each in order[:5]:
        ledger.begin(each.id)
    assert sorted([*ada[2:], late := sent("cid")], key=ledger.ahead) == [ada[2], late, ada[3]]
    assert ledger.next_turn("sdxl", "ada") == 0


def test_jobs_of_the_same_moment_have_an_order(ledger: Ledger, record: Made) -> None:
    now = time.time()
    same = [record(created=now) for _ in range(5)]
    for each in same:
        ledger.add(each)
    assert sorted(ledger.ahead(each) for each in same) == [0, 1, 2, 3, 4]


def test_pages_hold_every_job_once_in_order(ledger: Ledger, record: Made) -> None:
    now = time.time()
    made = [record(created=now + i // 2) for i in range(7)]
    for each in made:
        ledger.add(each)
    for newest_first in (True, False):
        seen: list[Record] = []
        while page := ledger.page({}, seen[-1].id if seen else None, 3, newest_first=newest_first):
            assert len(page) <= 3
            seen += page
        places = [(each.created, each.id) for each in seen]
        assert places == sorted(places, reverse=newest_first)
        assert {each.id for each in seen} == {each.id for each in made}


def test_pages_are_filtered(ledger: Ledger, record: Made) -> None:
    one, other = record(), record("tiny-sdxl")
    ended(ledger, one)
    ledger.add(other)

    def found(**filters: str) -> list[str]:
        asked = {name: (value,) for name, value in filters.items()}
        return [each.id for each in ledger.page(asked, None, 10, newest_first=True)]

    assert found(state="succeeded") == [one.id]
    assert found(state="queued") == [other.id]
    assert found(family="sdxl") == [other.id]
    assert found(model="tiny-sd", state="queued") == []


def test_the_usual_time_is_that_of_the_last_successes(ledger: Ledger, record: Made) -> None:
    assert ledger.usual_seconds("sd") is None
    done = ended(ledger, record())
    assert done.started is not None
    assert done.ended is not None
    assert ledger.usual_seconds("sd") == pytest.approx(done.ended - done.started)


def test_jobs_past_their_age_are_forgotten(ledger: Ledger, record: Made) -> None:
    done, waiting = ended(ledger, record()), record()
    ledger.add(waiting)
    assert ledger.ended_before(time.time() - 10) == []
    assert ledger.ended_before(time.time() + 1) == [done.id]
    assert ledger.referred() == {"a" * 64}
    ledger.forget([done.id])
    assert ledger.get(done.id) is None
    assert kinds(ledger, done.id) == []
    assert ledger.referred() == set()
    assert ledger.get(waiting.id) == waiting


def test_past_the_bytes_the_oldest_results_go_and_the_jobs_say_so(ledger: Ledger, record: Made) -> None:
    done = [ended(ledger, record(), digest=letter * 64, size=100) for letter in "abc"]
    assert ledger.expire_past(250) == 1
    assert [each.expired for job in done if (each := ledger.get(job.id))] == [True, False, False]
    assert ledger.referred() == {"b" * 64, "c" * 64}
    assert ledger.expire_past(250) == 0


def test_what_is_not_over_is_told(ledger: Ledger, record: Made) -> None:
    running, waiting, done = record(), record(), ended(ledger, record())
    for each in (running, waiting):
        ledger.add(each)
    ledger.begin(running.id)
    assert {each.id for each in ledger.unfinished()} == {running.id, waiting.id}
    assert ledger.over([running.id, done.id, "gone"]) == {done.id, "gone"}


def test_a_database_of_an_older_version_gets_the_columns_that_it_lacks(
    database: sa.Engine, record: Made
) -> None:
    old = record()
    Ledger(database).add(old)
    with database.begin() as connection:
        connection.execute(sa.text("ALTER TABLE jubako_jobs DROP COLUMN owner"))
    url = database.url.render_as_string(hide_password=False)
    with ThreadPoolExecutor(4) as threads:
        engines = list(threads.map(open_database, [url] * 4))
    ledger = Ledger(engines[0])
    assert ledger.get(old.id) == old
    new = record(owner="alice")
    assert ledger.add(new)
    assert ledger.get(new.id) == new
    found = ledger.page({"owner": ("alice",)}, None, 10, newest_first=True)
    assert [each.id for each in found] == [new.id]
    for engine in engines:
        engine.dispose()
