"""The batcher's logic on a denoiser that only counts: joining, leaving, turns, cancelling, failing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch

from jubako.engine.batcher import StepBatcher, Ticket
from jubako.engine.samples import Sample
from jubako.engine.schedule import Schedule, make_scheduler
from jubako.errors import Cancelled, GenerationFailed

EULER = {"num_train_timesteps": 1000}


@dataclass
class CountingDenoiser:
    """Records the seeds of each forward's samples (they ride in the conditioning); waits for its gate."""

    max_rows: int = 8
    gate: threading.Event = field(default_factory=threading.Event)
    forwards: list[list[int]] = field(default_factory=list)
    before: Callable[[], None] = lambda: None

    def predict(
        self,
        inputs: torch.Tensor,
        timesteps: torch.Tensor,
        conditioning: Mapping[str, torch.Tensor],
        skip_layers: tuple[int, ...] = (),
    ) -> torch.Tensor:
        assert len(inputs) == len(timesteps) == len(conditioning["seed"]) <= self.max_rows
        self.gate.wait(10)
        self.forwards.append([int(seed) for seed in conditioning["seed"]])
        self.before()
        return torch.zeros_like(inputs)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents[:, :3]


def sample(
    denoiser: CountingDenoiser, seed: int, steps: int, *, guided: bool = False, side: int = 2
) -> Sample:
    schedule = Schedule(make_scheduler(EULER, "Euler"), steps, torch.Generator())
    rows = 2 if guided else 1
    return Sample(
        denoiser=denoiser,
        schedule=schedule,
        latents=torch.full((1, 4, side, side), float(seed)),
        conditioning={"seed": torch.full((rows,), seed)},
        guidance_scale=5.0 if guided else 1.0,
    )


@pytest.fixture
def batcher() -> Iterator[StepBatcher]:
    batcher = StepBatcher()
    yield batcher
    batcher.close()


def submit(batcher: StepBatcher, sample: Sample, ticket: Ticket | None = None) -> Ticket:
    ticket = ticket or Ticket()
    batcher.submit(sample, ticket)
    return ticket


def test_samples_with_other_step_counts_share_forwards_and_leave_when_done(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    tickets = [submit(batcher, sample(denoiser, seed, steps)) for seed, steps in ((1, 4), (2, 2), (3, 4))]
    denoiser.gate.set()
    for seed, ticket in enumerate(tickets, 1):
        assert ticket.picture.result(10).flatten()[0] == seed
    whole = [forward for forward in denoiser.forwards if len(forward) == 3]
    assert len(whole) >= 1
    assert [sum(seed in forward for forward in denoiser.forwards) for seed in (1, 2, 3)] == [4, 2, 4]
    assert len(denoiser.forwards) <= 5


def test_a_newcomer_joins_at_the_next_step(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    denoiser.gate.set()
    late = sample(denoiser, 2, 2)
    joined = Ticket()

    def join(step: int, _: int) -> None:
        if step == 3:
            submit(batcher, late, joined)

    first = submit(batcher, sample(denoiser, 1, 10), Ticket(join))
    first.picture.result(10)
    joined.picture.result(10)
    assert denoiser.forwards == [[1]] * 3 + [[1, 2]] * 2 + [[1]] * 5


def test_a_guided_sample_takes_two_rows_and_no_forward_exceeds_the_limit(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser(max_rows=4)
    tickets = [submit(batcher, sample(denoiser, seed, 3, guided=seed % 2 == 0)) for seed in range(6)]
    denoiser.gate.set()
    for ticket in tickets:
        ticket.picture.result(10)
    rows = [sum(forward.count(seed) for forward in denoiser.forwards) for seed in range(6)]
    assert rows == [6, 3, 6, 3, 6, 3]
    assert batcher.rows == sum(rows)
    assert batcher.forwards == len(denoiser.forwards)


def test_samples_past_the_row_limit_take_turns(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser(max_rows=2)
    order: list[int] = []

    def note(seed: int, _: object) -> None:
        order.append(seed)

    tickets = []
    for seed, steps in ((1, 20), (2, 20), (3, 2)):
        ticket = submit(batcher, sample(denoiser, seed, steps))
        ticket.picture.add_done_callback(partial(note, seed))
        tickets.append(ticket)
    denoiser.gate.set()
    for ticket in tickets:
        ticket.picture.result(10)
    assert order[0] == 3, "the short job waited for the long ones"
    last = max(i for i, forward in enumerate(denoiser.forwards) if 3 in forward)
    assert last <= 4


def test_buckets_take_turns(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    tickets = [submit(batcher, sample(denoiser, side, 6, side=side)) for side in (2, 3, 4)]
    denoiser.gate.set()
    for ticket in tickets:
        ticket.picture.result(10)
    first_turns = [forward[0] for forward in denoiser.forwards[1:7]]
    assert sorted(first_turns) == [2, 2, 3, 3, 4, 4], "a bucket got more turns than another"


def test_cancelling_frees_the_rows_within_one_step(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    denoiser.gate.set()
    steps_taken = []

    def stop_at_ten(step: int, _: int) -> None:
        steps_taken.append(step)
        if step == 10:
            ticket.cancel()

    ticket = Ticket(stop_at_ten)
    submit(batcher, sample(denoiser, 1, 50), ticket)
    with pytest.raises(Cancelled):
        ticket.picture.result(10)
    assert steps_taken == list(range(1, 11))
    assert denoiser.forwards == [[1]] * 10
    other = submit(batcher, sample(denoiser, 2, 1))
    other.picture.result(10)
    assert denoiser.forwards[10:] == [[2]]


def test_a_job_cancelled_before_its_first_step_takes_none(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    ticket = Ticket()
    ticket.cancel()
    submit(batcher, sample(denoiser, 1, 5), ticket)
    with pytest.raises(Cancelled):
        ticket.picture.result(10)
    assert denoiser.forwards == []


def test_a_failing_forward_fails_its_samples_and_the_next_ones_run(batcher: StepBatcher) -> None:
    def explode() -> None:
        raise RuntimeError("no memory left")

    denoiser = CountingDenoiser(before=explode)
    denoiser.gate.set()
    with pytest.raises(GenerationFailed) as caught:
        submit(batcher, sample(denoiser, 1, 5)).picture.result(10)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "memory" not in caught.value.message
    denoiser.before = lambda: None
    submit(batcher, sample(denoiser, 2, 5)).picture.result(10)


@pytest.mark.parametrize("call", ["scale_model_input", "step"])
def test_a_failing_scheduler_takes_only_its_own_sample(
    batcher: StepBatcher, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("a scheduler's own fault")

    denoiser = CountingDenoiser()
    first, bad = sample(denoiser, 1, 5), sample(denoiser, 2, 5)
    monkeypatch.setattr(bad.schedule._scheduler, call, fail)
    # While the first waits in its forward, the other two arrive and are taken together.
    tickets = [submit(batcher, one) for one in (first, bad, sample(denoiser, 3, 5))]
    denoiser.gate.set()
    failing = tickets.pop(1)
    for ticket in tickets:
        ticket.picture.result(10)
    with pytest.raises(GenerationFailed):
        failing.picture.result(10)


def test_a_waiter_that_goes_away_does_not_harm_the_others(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    left, stays = submit(batcher, sample(denoiser, 1, 3)), submit(batcher, sample(denoiser, 2, 3))
    assert not left.picture.cancel()
    denoiser.gate.set()
    stays.picture.result(10)


def test_progress_is_told_after_every_step(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    denoiser.gate.set()
    told: list[tuple[int, int]] = []
    submit(batcher, sample(denoiser, 1, 4), Ticket(lambda *progress: told.append(progress))).picture.result(
        10
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_closing_finishes_what_runs() -> None:
    batcher = StepBatcher()
    denoiser = CountingDenoiser()
    ticket = submit(batcher, sample(denoiser, 1, 5))
    denoiser.gate.set()
    batcher.close()
    assert ticket.picture.done()
    assert len(denoiser.forwards) == 5
