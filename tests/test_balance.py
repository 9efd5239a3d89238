"""Which replica has the next work: the least loaded one, in simulated time where that takes time."""

from __future__ import annotations

import heapq
from collections import Counter

from jubako.balance import Balance
from jubako.fair_queue import Ask

ONE = Ask(1.0, 1)


def test_the_one_with_the_fewest_rows_is_chosen_and_then_the_one_with_the_least_work() -> None:
    balance: Balance[str] = Balance()
    balance.begin("a", Ask(1.0, 4))
    balance.begin("b", Ask(9.0, 2))
    assert balance.choose(["a", "b"]) == "b"
    balance.begin("b", Ask(1.0, 2))
    assert balance.choose(["a", "b"]) == "a"
    assert balance.choose(["b"]) == "b"
    assert balance.choose([]) is None


def test_equals_are_chosen_in_turn() -> None:
    balance: Balance[str] = Balance()
    chosen = []
    for _ in range(6):
        replica = balance.choose("abc")
        assert replica is not None
        balance.begin(replica, ONE)
        balance.end(replica, ONE)
        chosen.append(replica)
    assert chosen == [*"abcabc"]


def test_one_that_was_tried_is_chosen_only_where_there_is_no_other() -> None:
    balance: Balance[str] = Balance()
    balance.begin("b", ONE)
    assert balance.choose("ab") == "a"
    assert balance.choose("ab", tried=["a"]) == "b"
    assert balance.choose("a", tried=["a"]) == "a"


def test_what_has_ended_leaves_nothing_behind() -> None:
    balance: Balance[str] = Balance()
    for _ in range(1000):
        balance.begin("a", Ask(0.1, 1))
        balance.begin("a", Ask(0.2, 1))
        balance.end("a", Ask(0.1, 1))
        balance.end("a", Ask(0.2, 1))
    balance.begin("a", Ask(0.5, 1))
    balance.begin("b", Ask(0.6, 1))
    assert balance.rows("a") == 1
    assert balance.choose("ab") == "a"
    balance.forget("b")
    assert balance.choose("ab") == "b"


def test_a_thousand_replicas_of_two_speeds_are_all_kept_busy_and_each_does_what_it_can() -> None:
    """Twice as fast is twice as much done, though nobody is told how fast a replica is."""
    replicas = range(1000)
    seconds = {replica: 1.0 if replica % 2 else 0.5 for replica in replicas}
    balance: Balance[int] = Balance()
    done: Counter[bool] = Counter()
    ending: list[tuple[float, int, int]] = []
    free: dict[int, float] = dict.fromkeys(replicas, 0.0)

    def give(now: float, number: int) -> None:
        replica = balance.choose(replicas)
        assert replica is not None
        balance.begin(replica, ONE)
        free[replica] = max(now, free[replica]) + seconds[replica]
        heapq.heappush(ending, (free[replica], number, replica))

    for number in range(2000):
        give(0.0, number)
    assert {balance.rows(replica) for replica in replicas} == {2}
    for number in range(2000, 8000):
        now, _, replica = heapq.heappop(ending)
        balance.end(replica, ONE)
        done[seconds[replica] == 0.5] += 1
        give(now, number)
        assert all(balance.rows(each) >= 1 for each in (replica, number % 1000))
    assert 1.8 < done[True] / done[False] < 2.2
