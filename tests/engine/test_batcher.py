"""The batcher's logic on a denoiser that only counts: joining, leaving, turns, cancelling, failing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import pytest
import torch

from jubako.engine.batcher import StepBatcher
from jubako.engine.samples import Decode, Sample, predict_together
from jubako.engine.schedule import Schedule, make_scheduler
from jubako.engine.ticket import Ticket
from jubako.errors import Cancelled, GenerationFailed

EULER = {"num_train_timesteps": 1000}


@dataclass
class CountingDenoiser:
    """Records the seeds of each forward's samples (they ride in the conditioning); waits for its gate."""

    max_rows: int = 8
    gate: threading.Event = field(default_factory=threading.Event)
    forwards: list[list[int]] = field(default_factory=list)
    decoded: list[int] = field(default_factory=list)
    before: Callable[[], None] = lambda: None
    predicts: Callable[[torch.Tensor], torch.Tensor] = torch.zeros_like
    shown: Callable[[torch.Tensor], torch.Tensor | None] = lambda latents: latents[0, :3]

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
        return self.predicts(inputs)

    def decode(self, latents: torch.Tensor, *, sparing: bool = False, upcast: bool = False) -> torch.Tensor:
        self.decoded.append(len(latents))
        return latents[:, :3]

    def preview(self, latents: torch.Tensor) -> torch.Tensor | None:
        return self.shown(latents)


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
        assert ticket.decoded.result(10).flatten()[0] == seed
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
    first.decoded.result(10)
    joined.decoded.result(10)
    assert denoiser.forwards == [[1]] * 3 + [[1, 2]] * 2 + [[1]] * 5


def test_a_guided_sample_takes_two_rows_and_no_forward_exceeds_the_limit(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser(max_rows=4)
    tickets = [submit(batcher, sample(denoiser, seed, 3, guided=seed % 2 == 0)) for seed in range(6)]
    denoiser.gate.set()
    for ticket in tickets:
        ticket.decoded.result(10)
    rows = [sum(forward.count(seed) for forward in denoiser.forwards) for seed in range(6)]
    assert rows == [6, 3, 6, 3, 6, 3]
    assert batcher.rows == sum(rows)
    assert batcher.forwards == len(denoiser.forwards)


def test_rows_with_equal_adapters_stand_side_by_side(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser(predicts=torch.clone)
    told: list[list[tuple[str, ...]]] = []

    @contextmanager
    def adapted(rows: Sequence[tuple[str, ...]]) -> Iterator[None]:
        told.append(list(rows))
        yield

    sets = {1: ("ash",), 2: (), 3: ("ash",), 4: ("birch",), 5: ()}
    samples = [
        replace(sample(denoiser, seed, 2), adapters=own, adapted=adapted if own else None)
        for seed, own in sets.items()
    ]
    inputs = [one.inputs() for one in samples]
    denoiser.gate.set()
    predictions = predict_together(samples, inputs)
    assert denoiser.forwards == [[1, 3, 2, 5, 4]]
    assert told == [[("ash",), ("ash",), (), (), ("birch",)]]
    # Each gets the prediction of its own row.
    assert all(torch.equal(found, given) for found, given in zip(predictions, inputs, strict=True))


def test_samples_past_the_row_limit_take_turns(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser(max_rows=2)
    order: list[int] = []

    def note(seed: int, _: object) -> None:
        order.append(seed)

    tickets = []
    for seed, steps in ((1, 20), (2, 20), (3, 2)):
        ticket = submit(batcher, sample(denoiser, seed, steps))
        ticket.decoded.add_done_callback(partial(note, seed))
        tickets.append(ticket)
    denoiser.gate.set()
    for ticket in tickets:
        ticket.decoded.result(10)
    assert order[0] == 3, "the short job waited for the long ones"
    last = max(i for i, forward in enumerate(denoiser.forwards) if 3 in forward)
    assert last <= 4


def test_buckets_take_turns(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    tickets = [submit(batcher, sample(denoiser, side, 6, side=side)) for side in (2, 3, 4)]
    denoiser.gate.set()
    for ticket in tickets:
        ticket.decoded.result(10)
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
        ticket.decoded.result(10)
    assert steps_taken == list(range(1, 11))
    assert denoiser.forwards == [[1]] * 10
    other = submit(batcher, sample(denoiser, 2, 1))
    other.decoded.result(10)
    assert denoiser.forwards[10:] == [[2]]


def test_a_job_cancelled_before_its_first_step_takes_none(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    ticket = Ticket()
    ticket.cancel()
    submit(batcher, sample(denoiser, 1, 5), ticket)
    with pytest.raises(Cancelled):
        ticket.decoded.result(10)
    assert denoiser.forwards == []


def test_a_failing_forward_fails_its_samples_and_the_next_ones_run(batcher: StepBatcher) -> None:
    def explode() -> None:
        raise RuntimeError("no such layer")

    denoiser = CountingDenoiser(before=explode)
    denoiser.gate.set()
    with pytest.raises(GenerationFailed) as caught:
        submit(batcher, sample(denoiser, 1, 5)).decoded.result(10)
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "layer" not in caught.value.message
    denoiser.before = lambda: None
    submit(batcher, sample(denoiser, 2, 5)).decoded.result(10)


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
        ticket.decoded.result(10)
    with pytest.raises(GenerationFailed):
        failing.decoded.result(10)


def test_a_waiter_that_goes_away_does_not_harm_the_others(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    left, stays = submit(batcher, sample(denoiser, 1, 3)), submit(batcher, sample(denoiser, 2, 3))
    assert not left.decoded.cancel()
    denoiser.gate.set()
    stays.decoded.result(10)


def test_progress_is_told_after_every_step(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    denoiser.gate.set()
    told: list[tuple[int, int]] = []
    submit(batcher, sample(denoiser, 1, 4), Ticket(lambda *progress: told.append(progress))).decoded.result(
        10
    )
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_closing_finishes_what_runs() -> None:
    batcher = StepBatcher()
    denoiser = CountingDenoiser()
    ticket = submit(batcher, sample(denoiser, 1, 5))
    denoiser.gate.set()
    batcher.close()
    assert ticket.decoded.done()
    assert len(denoiser.forwards) == 5


def clip(denoiser: CountingDenoiser, seed: int, steps: int, decode: Decode) -> Sample:
    return replace(sample(denoiser, seed, steps), latents=torch.zeros(1, 5, 4, 2, 2), decode=decode)


def test_samples_without_a_way_of_their_own_are_decoded_together(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    first = submit(batcher, sample(denoiser, 0, 1))
    while not batcher.live_rows:  # until its forward has begun, without the others
        time.sleep(0.001)
    tickets = [submit(batcher, sample(denoiser, seed, 3)) for seed in (1, 2, 3)]
    denoiser.gate.set()
    for ticket in (first, *tickets):
        ticket.decoded.result(10)
    assert denoiser.decoded == [1, 3]


def test_clips_are_decoded_one_by_one_each_in_its_own_way(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser()
    seen = []

    def decode(number: int, latents: torch.Tensor, **_: bool) -> torch.Tensor:
        seen.append((number, tuple(latents.shape)))
        return latents + number

    first = submit(batcher, sample(denoiser, 0, 1))
    tickets = [submit(batcher, clip(denoiser, i, 3, partial(decode, i))) for i in (1, 2)]
    denoiser.gate.set()
    first.decoded.result(10)
    results = [ticket.decoded.result(10) for ticket in tickets]
    assert seen == [(1, (1, 5, 4, 2, 2)), (2, (1, 5, 4, 2, 2))]
    assert [len(forward) for forward in denoiser.forwards] == [1, 2, 2, 2]
    assert [int(result.mean()) for result in results] == [1, 2]
    assert results[0].shape == (5, 4, 2, 2)


def test_a_clip_that_can_not_be_decoded_harms_no_other(batcher: StepBatcher) -> None:
    def explode(latents: torch.Tensor, **_: bool) -> torch.Tensor:
        raise RuntimeError("no decoder left")

    denoiser = CountingDenoiser()
    bad = submit(batcher, clip(denoiser, 1, 2, explode))
    good = submit(batcher, clip(denoiser, 2, 2, lambda latents, **_: -latents))
    denoiser.gate.set()
    good.decoded.result(10)
    with pytest.raises(GenerationFailed):
        bad.decoded.result(10)


def test_a_clip_cancelled_at_its_last_step_is_not_decoded(batcher: StepBatcher) -> None:
    decoded = []

    def decode(latents: torch.Tensor, **_: bool) -> torch.Tensor:
        decoded.append(1)
        return latents

    denoiser = CountingDenoiser()
    denoiser.gate.set()
    ticket = Ticket(lambda step, steps: ticket.cancel() if step == steps else None)
    submit(batcher, clip(denoiser, 1, 2, decode), ticket)
    with pytest.raises(Cancelled):
        ticket.decoded.result(10)
    assert decoded == []


def test_guidance_of_its_own_for_each_frame() -> None:
    guided = replace(
        sample(CountingDenoiser(), 1, 1, guided=True),
        guidance=torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1),
    )
    negative, positive = torch.zeros(1, 3, 4, 2, 2), torch.ones(1, 3, 4, 2, 2)
    result = guided.guided(torch.cat([negative, positive]))
    assert result.mean((0, 2, 3, 4)).tolist() == [1, 2, 3]


@pytest.mark.parametrize("rows", [1, 2])
def test_channels_stand_beside_the_latents_of_every_row(rows: int) -> None:
    channels = torch.arange(float(rows)).view(rows, 1, 1, 1, 1).expand(rows, 5, 4, 2, 2)
    guided = replace(
        sample(CountingDenoiser(), 1, 1, guided=True),
        latents=torch.full((1, 5, 4, 2, 2), 7.0),
        channels=channels,
    )
    inputs = guided.inputs()
    assert inputs.shape == (2, 5, 8, 2, 2)
    assert torch.equal(inputs[0, :, :4], inputs[1, :, :4])
    assert inputs[:, 0, 4, 0, 0].tolist() == ([0, 0] if rows == 1 else [0, 1])


def test_previews_come_every_few_steps_but_not_after_the_last(
    batcher: StepBatcher,
) -> None:
    denoiser = CountingDenoiser()
    denoiser.gate.set()
    heard: list[int | torch.Tensor] = []
    ticket = Ticket(lambda step, _: heard.append(step), preview_every=2, on_preview=heard.append)
    submit(batcher, sample(denoiser, 3, 6), ticket).decoded.result(10)
    steps = [entry if isinstance(entry, int) else "preview" for entry in heard]
    assert steps == [1, 2, "preview", 3, 4, "preview", 5, 6]
    shown = heard[2]
    assert isinstance(shown, torch.Tensor)
    assert shown.shape == (3, 2, 2)


@pytest.mark.parametrize("wanted", [{}, {"preview_every": 2}, {"on_preview": lambda _: None}])
def test_without_a_listener_nothing_is_previewed(batcher: StepBatcher, wanted: dict[str, Any]) -> None:
    calls = []
    denoiser = CountingDenoiser(shown=lambda latents: calls.append(1))
    denoiser.gate.set()
    submit(batcher, sample(denoiser, 3, 6), Ticket(**wanted)).decoded.result(10)
    assert calls == []


def test_a_model_without_previews_shows_none(batcher: StepBatcher) -> None:
    denoiser = CountingDenoiser(shown=lambda _: None)
    denoiser.gate.set()
    shown: list[torch.Tensor] = []
    submit(batcher, sample(denoiser, 3, 6), Ticket(preview_every=1, on_preview=shown.append)).decoded.result(
        10
    )
    assert shown == []


@pytest.mark.parametrize("culprit", ["model", "estimate", "listener"])
def test_a_failing_preview_harms_nobody(
    batcher: StepBatcher,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    culprit: str,
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no colours today")

    denoiser = CountingDenoiser()
    denoiser.gate.set()
    one = sample(denoiser, 3, 4)
    if culprit == "model":
        denoiser.shown = fail
    if culprit == "estimate":
        monkeypatch.setattr(one.schedule, "estimate", fail)
    ticket = Ticket(preview_every=1, on_preview=fail if culprit == "listener" else lambda _: None)
    plain = submit(batcher, sample(denoiser, 3, 4)).decoded.result(10)
    assert torch.equal(submit(batcher, one, ticket).decoded.result(10), plain)
    assert "a preview failed" in caplog.text
