"""The queue of a family in simulated time: fair among owners, promises that are kept, bounds that hold."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest

from jubako.errors import Overloaded
from jubako.fair_queue import Ask, FairQueue, Priority


class Simulation:
    """An event loop's worth of time that passes only when everybody waits for it."""

    def __init__(self) -> None:
        self.now = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []

    def clock(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        event = asyncio.Event()
        heapq.heappush(self._sleepers, (self.now + seconds, id(event), event))
        await event.wait()

    async def run(self, until: float = float("inf")) -> None:
        """Let everybody act, then move on to the next who wakes."""
        while True:
            for _ in range(5):
                await asyncio.sleep(0)
            if not self._sleepers or self._sleepers[0][0] > until:
                return
            self.now, _, event = heapq.heappop(self._sleepers)
            event.set()


@dataclass(frozen=True)
class Done:
    owner: str
    priority: Priority
    work: float
    arrived: float
    ended: float
    promise: float | None


class Family:
    """Does so much work a second, shared by what is at work."""

    def __init__(
        self, simulation: Simulation, *, rate: float = 10.0, window: int = 4, longest: float = 60
    ) -> None:
        self.simulation, self.rate, self.window = simulation, rate, window
        self.queue = FairQueue(window, longest, simulation.clock)
        self.done: list[Done] = []
        self.rejected: list[tuple[float, Overloaded]] = []

    async def serve(self, ask: Ask, *, durable: bool = False) -> None:
        arrived = self.simulation.now
        try:
            promise = None if durable else self.queue.require_room(ask)
        except Overloaded as error:
            self.rejected.append((self.simulation.now, error))
            return
        async with self.queue.turn(ask):
            # A full window takes as long for each as it would take alone for all of them.
            await self.simulation.sleep(ask.work * self.window / self.rate)
        self.done.append(Done(ask.owner, ask.priority, ask.work, arrived, self.simulation.now, promise))


def simulated(check: Callable[[Simulation], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(check(Simulation()))


def test_owners_share_fairly_whatever_each_of_them_sends() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, longest=60)
        tasks = [asyncio.ensure_future(family.serve(Ask(1, 1, "greedy"), durable=True)) for _ in range(200)]
        await simulation.run(until=1)
        tasks += [asyncio.ensure_future(family.serve(Ask(1, 1, "modest"), durable=True)) for _ in range(20)]
        await simulation.run()
        await asyncio.gather(*tasks)
        ends = {
            owner: max(d.ended for d in family.done if d.owner == owner) for owner in ("greedy", "modest")
        }
        # Alone its 20 would take 2 s; with half of the family 4, and what was at work before.
        assert ends["modest"] < 1 + 4 + 1
        assert ends["greedy"] == pytest.approx(22, abs=1)

    simulated(check)


def test_one_with_large_requests_gets_no_more_than_one_with_small_ones() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=1, longest=60)
        asks = [Ask(5, 1, "large") for _ in range(40)] + [Ask(1, 1, "small") for _ in range(200)]
        tasks = [asyncio.ensure_future(family.serve(ask, durable=True)) for ask in asks]
        await simulation.run(until=20)
        work = Counter[str]()
        for done in family.done:
            work[done.owner] += 5 if done.owner == "large" else 1
        assert work["large"] == pytest.approx(work["small"], abs=6)
        await simulation.run()
        await asyncio.gather(*tasks)

    simulated(check)


def test_interactive_goes_first_and_batch_is_not_starved() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=1, longest=60)
        tasks = [asyncio.ensure_future(family.serve(Ask(1, 1, "", "batch"), durable=True)) for _ in range(20)]
        tasks += [asyncio.ensure_future(family.serve(Ask(1, 1), durable=True)) for _ in range(80)]
        await simulation.run()
        await asyncio.gather(*tasks)
        order = [done.priority for done in sorted(family.done, key=lambda done: done.ended)]
        assert order[1:9].count("interactive") == 8 - order[1:9].count("batch")
        assert order[1:82].count("batch") == pytest.approx(81 / 9, abs=2)

    simulated(check)


@pytest.mark.parametrize("seed", range(5))
def test_past_ten_times_saturation_promises_hold_and_rejects_tell_the_truth(seed: int) -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=8, longest=6)
        rng = random.Random(seed)
        tasks = []

        async def arrivals() -> None:
            while simulation.now < 60:
                work = rng.choice([0.2, 0.5, 1.0, 2.0])
                tasks.append(asyncio.ensure_future(family.serve(Ask(work, 1))))
                # About ten times what the family does.
                await simulation.sleep(rng.expovariate(100 / 0.925))

        tasks.append(asyncio.ensure_future(arrivals()))
        await simulation.run()
        await asyncio.gather(*tasks)
        promised = [done for done in family.done if done.promise is not None]
        assert len(promised) > 300
        kept = sum(done.ended - done.arrived <= (done.promise or 0) for done in promised)
        assert kept >= 0.99 * len(promised)
        assert all(error.retry_after >= 1 for _, error in family.rejected)
        assert len(family.rejected) > len(family.done)
        busy = max(done.ended for done in family.done)
        assert sum(done.work for done in family.done) / busy >= 0.9 * family.rate

    simulated(check)


def test_who_comes_again_when_told_to_gets_in() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=1, longest=5)
        tasks = [asyncio.ensure_future(family.serve(Ask(1, 1))) for _ in range(10)]
        await simulation.run(until=0.65)
        while not family.rejected:
            tasks.append(asyncio.ensure_future(family.serve(Ask(2, 1))))
            await asyncio.sleep(0)
        _, error = family.rejected[-1]
        before = len(family.done)
        await simulation.run(until=simulation.now + error.retry_after)
        family.queue.require_room(Ask(2, 1))
        await simulation.run()
        await asyncio.gather(*tasks)
        assert len(family.done) > before

    simulated(check)


def test_a_client_s_own_deadline_counts() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=1, rate=1)
        for _ in range(4):
            task = asyncio.ensure_future(family.serve(Ask(1, 1)))
            await simulation.run()
            await task
        assert family.queue.rate == pytest.approx(1)
        with pytest.raises(Overloaded, match=r"4\.2 s"):
            family.queue.require_room(Ask(3, 1, within=4))
        assert family.queue.require_room(Ask(3, 1, within=5)) == pytest.approx(4.25)

    simulated(check)


def test_what_begins_at_once_is_promised_for_a_family_that_fills_up_meanwhile() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=4, rate=1)
        for _ in range(4):
            task = asyncio.ensure_future(family.serve(Ask(1, 1)))
            await simulation.run()
            await task
        assert family.queue.rate == pytest.approx(0.25)  # it was alone each time
        assert family.queue.require_room(Ask(1, 1)) == pytest.approx(1.25 * 4 / 0.25 + 0.5)
        tasks = [asyncio.ensure_future(family.serve(Ask(1, 1))) for _ in range(4)]
        await simulation.run(until=simulation.now)
        # One more has to wait for some of the four.
        assert family.queue.require_room(Ask(1, 1)) == pytest.approx(1.25 * (4 + 4) / 0.25 + 0.5)
        await simulation.run()
        await asyncio.gather(*tasks)

    simulated(check)


def test_before_anything_is_known_the_number_that_waits_is_bounded() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=4)
        tasks = [asyncio.ensure_future(family.serve(Ask(1, 1))) for _ in range(200)]
        for _ in range(10):
            await asyncio.sleep(0)
        assert len(family.rejected) == 200 - 4 - 16 * 4
        await simulation.run()
        await asyncio.gather(*tasks)

    simulated(check)


def test_who_goes_away_leaves_no_gap_and_no_trace() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=2, longest=60)
        tasks = [asyncio.ensure_future(family.serve(Ask(1, 1))) for _ in range(10)]
        await simulation.run(until=0.1)
        assert (family.queue.at_work, family.queue.depth["interactive"]) == (2, 8)
        for task in tasks[:5]:
            task.cancel()
        await simulation.run(until=0.1)
        assert (family.queue.at_work, family.queue.depth["interactive"]) == (2, 3)
        await simulation.run()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert len(family.done) == 5
        assert (family.queue.at_work, family.queue.depth["interactive"]) == (0, 0)

    simulated(check)


def test_one_that_is_larger_than_the_window_has_it_alone() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=2, longest=60)
        asks = [Ask(1, 1), Ask(1, 5), Ask(1, 1)]
        tasks = [asyncio.ensure_future(family.serve(ask)) for ask in asks]
        most = 0
        while not all(task.done() for task in tasks):
            await simulation.run(until=simulation.now + 0.01)
            most = max(most, family.queue.at_work)
            simulation.now += 0.01
        assert most == 1

    simulated(check)


def test_a_window_that_grows_is_filled_at_once_and_one_that_shrinks_takes_nothing_back() -> None:
    async def check(simulation: Simulation) -> None:
        family = Family(simulation, window=2)
        served = [asyncio.ensure_future(family.serve(Ask(10.0, 1))) for _ in range(8)]
        await simulation.run(until=0)
        assert family.queue.at_work == 2
        family.queue.resize(4)
        assert family.queue.at_work == 4
        family.queue.resize(1)
        assert family.queue.at_work == 4
        await simulation.run()
        assert all(each.done() for each in served)

    simulated(check)
