"""The step batcher: one thread that runs one forward a turn for all samples that can share it.

A sample joins at any step boundary and leaves when its last step is done, or when it is cancelled. Buckets
take turns, and so do the samples of a bucket that has more rows than one forward may hold: nobody starves,
and a short job is not held up by a long one. A forward that the memory does not hold is run again in halves.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Hashable, Sequence
from time import perf_counter
from typing import Protocol

import torch

from jubako.engine.decoding import decode
from jubako.engine.row_bounds import RowBounds
from jubako.engine.samples import Denoiser, Sample, predict_together
from jubako.engine.ticket import Ticket
from jubako.errors import Cancelled
from jubako.memory import give_back, out_of_memory

__all__ = ["Observer", "StepBatcher"]

logger = logging.getLogger(__name__)

_Member = tuple[Sample, Ticket]


class Observer(Protocol):
    """Hears of what was run, on the denoiser's thread."""

    def ran(self, batch: Sequence[tuple[Sample, Ticket]], rows: int, live: int, seconds: float) -> None:
        """A forward of these samples and so many rows, of so many that are under denoising."""
        ...

    def dropped(self, sample: Sample) -> None:
        """A sample was cancelled."""
        ...

    def rested(self) -> None:
        """Nothing is under denoising any more."""
        ...


class StepBatcher:
    """Owns the denoiser thread. ``submit`` from any thread; ``close`` lets the running samples finish.

    ``forwards`` and ``rows`` count what was run since the start, ``live_rows`` what is under denoising now.
    """

    def __init__(self, observer: Observer | None = None) -> None:
        self._observer = observer
        self._inbox: queue.SimpleQueue[_Member | None] = queue.SimpleQueue()
        self._buckets: OrderedDict[Hashable, deque[_Member]] = OrderedDict()
        self._closed = False
        self._pace = _Pace()
        self._bounds = RowBounds()
        self.forwards = 0
        self.rows = 0
        self.live_rows = 0
        self._thread = threading.Thread(target=self._run, name="denoiser", daemon=True)
        self._thread.start()

    def submit(self, sample: Sample, ticket: Ticket) -> None:
        """Let the sample join at the next step boundary; what it becomes arrives in ``ticket.decoded``."""
        self._inbox.put((sample, ticket))

    def close(self) -> None:
        """Take no more samples, finish those that run, end the thread."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        with torch.inference_mode():
            while True:
                self._admit()
                self._drop_cancelled()
                self.live_rows = sum(
                    sample.rows for members in self._buckets.values() for sample, _ in members
                )
                if self._buckets:
                    self._turn()
                elif self._closed:
                    return
                if not self._buckets and self._observer is not None:
                    self._observer.rested()

    def _admit(self) -> None:
        """Take in everything that waits; sleep only when there is nothing to denoise."""
        while True:
            try:
                arrival = self._inbox.get(block=not self._buckets and not self._closed)
            except queue.Empty:
                return
            if arrival is None:
                self._closed = True
            else:
                self._buckets.setdefault(arrival[0].bucket, deque()).append(arrival)

    def _drop_cancelled(self) -> None:
        for key, members in list(self._buckets.items()):
            for member in [member for member in members if member[1].cancelled]:
                members.remove(member)
                if self._observer is not None:
                    self._observer.dropped(member[0])
                member[1].fail(Cancelled("the job was cancelled"))
            if not members:
                del self._buckets[key]

    def _turn(self) -> None:
        """One forward for the bucket that has waited longest."""
        key = next(iter(self._buckets))
        members = self._buckets[key]
        batch, inputs = _scaled(_take(members, self._bounds.rows(key, members[0][0].denoiser.max_rows)))
        finished = []
        for (sample, ticket), prediction in self._predicted(key, batch, inputs):
            if not _advance(sample, ticket, prediction):
                continue
            if not sample.schedule.done:
                members.append((sample, ticket))
            elif successor := sample.handed_over():
                self._buckets.setdefault(successor.bucket, deque()).append((successor, ticket))
            else:
                finished.append((sample, ticket))
        if members:
            self._buckets.move_to_end(key)
        else:
            del self._buckets[key]
        if finished:
            decode(finished)

    def _predicted(
        self, key: Hashable, batch: Sequence[_Member], inputs: Sequence[torch.Tensor]
    ) -> list[tuple[_Member, torch.Tensor]]:
        """The members with what the denoiser says of them; where the memory does not hold all, in parts.

        A forward that failed has moved nothing on, and is run again with the same inputs.
        """
        predicted: list[tuple[_Member, torch.Tensor]] = []
        count = len(batch)
        while batch:
            predictions = self._forward(batch[:count], inputs[:count])
            if predictions is None and count > 1:
                count = (count + 1) // 2
                self._bounds.lower(key, sum(sample.rows for sample, _ in batch[:count]))
                continue
            predicted += zip(batch, predictions or (), strict=False)
            batch, inputs = batch[count:], inputs[count:]
        return predicted

    def _forward(self, batch: Sequence[_Member], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """One forward, none of which is left when it fails; None where the memory does not hold it.

        Members fail with the model, and who does not fit alone.
        """
        began = perf_counter()
        try:
            predictions = predict_together([sample for sample, _ in batch], inputs)
        except Exception as error:
            if short := out_of_memory(error):
                # As text: whoever keeps what is logged would keep the error's frames, too.
                logger.warning("no memory for a forward of %d samples: %s", len(batch), str(error))
            else:
                logger.exception("a forward of %d samples failed", len(batch))
            if not short or len(batch) == 1:
                _fail(batch, error)
        else:
            self._pace.forward_queued(predictions[0].device)
            self.forwards += 1
            self.rows += (rows := sum(sample.rows for sample, _ in batch))
            if self._observer is not None:
                self._observer.ran(batch, rows, self.live_rows, perf_counter() - began)
            return predictions
        if not short:
            return []
        # Only now: the error's frames held what the forward had made so far.
        give_back()
        return None


class _Pace:
    """Keeps this thread at most one forward ahead of the device.

    Without it, every step of a job would be queued before its first is done: nobody could join, progress
    would be told too early, and cancelling would come too late.
    """

    def __init__(self) -> None:
        self._before: torch.cuda.Event | None = None

    def forward_queued(self, device: torch.device) -> None:
        """Note this forward, and wait for the one before it."""
        if device.type != "cuda":
            return
        queued = torch.cuda.Event(blocking=True)
        queued.record(torch.cuda.current_stream(device))
        if self._before is not None:
            self._before.synchronize()
        self._before = queued


def _take(members: deque[_Member], limit: int) -> list[_Member]:
    """The longest waiting members whose rows fit one forward; at least one."""
    batch = [members.popleft()]
    rows = batch[0][0].rows
    while members and rows + members[0][0].rows <= limit:
        rows += members[0][0].rows
        batch.append(members.popleft())
    return batch


def _scaled(batch: Sequence[_Member]) -> tuple[list[_Member], list[torch.Tensor]]:
    """The members with their inputs; a scheduler that fails takes only its own sample with it."""
    fine, inputs = [], []
    for sample, ticket in batch:
        try:
            inputs.append(sample.inputs())
        except Exception as error:
            logger.exception("a scheduler failed")
            _fail([(sample, ticket)], error)
        else:
            fine.append((sample, ticket))
    return fine, inputs


def _advance(sample: Sample, ticket: Ticket, prediction: torch.Tensor) -> bool:
    """One scheduler step; a scheduler that fails takes only its own sample with it."""
    estimate = None
    try:
        guided = sample.guided(prediction)
        step, steps = sample.progress
        if ticket.shows(step + 1, steps):
            estimate = _estimate(sample, guided)
        sample.advance(guided)
    except Exception as error:
        logger.exception("a scheduler failed")
        _fail([(sample, ticket)], error)
        return False
    ticket.stepped(*sample.progress)
    if estimate is not None:
        _show(sample.denoiser, estimate, ticket)
    return True


def _estimate(sample: Sample, guided: torch.Tensor) -> torch.Tensor | None:
    """The clean latents by now; a failure costs the preview only."""
    try:
        return sample.estimate(guided)
    except Exception:
        logger.exception("a preview failed")
        return None


def _show(denoiser: Denoiser, latents: torch.Tensor, ticket: Ticket) -> None:
    """Hand a preview to the listener; whatever fails costs the preview only."""
    try:
        if (picture := denoiser.preview(latents)) is not None:
            ticket.show(picture)
    except Exception:
        logger.exception("a preview failed")


def _fail(batch: Sequence[_Member], error: Exception) -> None:
    for _, ticket in batch:
        ticket.fail(error)
