"""The step batcher: one thread that runs one forward a turn for all samples that can share it.

A sample joins at any step boundary and leaves when its last step is done, or when it is cancelled. Buckets
take turns, and so do the samples of a bucket that has more rows than one forward may hold: nobody starves,
and a short job is not held up by a long one. Finished samples of a turn are decoded together, but those that
have a way of their own (clips, a few frames at a time) one by one.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from time import perf_counter

import torch

from jubako.engine.samples import Denoiser, Sample, predict_together
from jubako.errors import Cancelled, GenerationFailed

__all__ = ["StepBatcher", "Ticket"]

logger = logging.getLogger(__name__)


class Ticket:
    """A job's place in the batcher: cancel it, hear of its steps, wait for what is decoded of it.

    That is a picture [3, H, W] from 0 to 1, or whatever else the model's ``decode`` gives. After every
    ``preview_every`` steps but the last, ``on_preview`` gets a small picture [3, h, w] of what there is so
    far. Both listeners are called on the denoiser's thread, a step's ``on_step`` before its ``on_preview``.
    """

    def __init__(
        self,
        on_step: Callable[[int, int], None] | None = None,
        *,
        preview_every: int = 0,
        on_preview: Callable[[torch.Tensor], None] | None = None,
    ) -> None:
        self.decoded: Future[torch.Tensor] = Future()
        # Marked as running, so that a waiter that goes away can't take the future with it.
        self.decoded.set_running_or_notify_cancel()
        self.denoised_at = self.decoded_at = 0.0
        self._on_step = on_step
        self._preview_every = preview_every
        self._on_preview = on_preview
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Ask that it stop; the batcher obeys before the next forward."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """Whether cancelling was asked for."""
        return self._cancelled.is_set()

    def stepped(self, step: int, steps: int) -> None:
        """Tell the listener of a step; a listener's own failure is its own affair."""
        if self._on_step is not None:
            try:
                self._on_step(step, steps)
            except Exception:
                logger.exception("a progress listener failed")

    def shows(self, step: int, steps: int) -> bool:
        """Whether a preview is wanted after this step."""
        wanted = self._on_preview is not None and self._preview_every > 0
        return wanted and step < steps and step % self._preview_every == 0

    def show(self, picture: torch.Tensor) -> None:
        """Hand over a preview."""
        if self._on_preview is not None:
            self._on_preview(picture)


class StepBatcher:
    """Owns the denoiser thread. ``submit`` from any thread; ``close`` lets the running samples finish.

    ``forwards`` and ``rows`` count what was run since the start, ``live_rows`` what is under denoising now.
    """

    def __init__(self) -> None:
        self._inbox: queue.SimpleQueue[tuple[Sample, Ticket] | None] = queue.SimpleQueue()
        self._buckets: OrderedDict[Hashable, deque[tuple[Sample, Ticket]]] = OrderedDict()
        self._closed = False
        self._pace = _Pace()
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
                member[1].decoded.set_exception(Cancelled("the job was cancelled"))
            if not members:
                del self._buckets[key]

    def _turn(self) -> None:
        """One forward for the bucket that has waited longest."""
        key = next(iter(self._buckets))
        members = self._buckets[key]
        batch, inputs = _scaled(_take(members))
        try:
            predictions = predict_together([sample for sample, _ in batch], inputs) if batch else []
        except Exception as error:
            logger.exception("a forward of %d samples failed", len(batch))
            _fail(batch, error)
            batch, predictions = [], []
        if batch:
            self._pace.forward_queued(predictions[0].device)
        self.forwards += bool(batch)
        self.rows += sum(sample.rows for sample, _ in batch)
        finished = []
        for (sample, ticket), prediction in zip(batch, predictions, strict=True):
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
            _decode(finished)


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


def _take(members: deque[tuple[Sample, Ticket]]) -> list[tuple[Sample, Ticket]]:
    """The longest waiting members whose rows fit one forward; at least one."""
    limit = members[0][0].denoiser.max_rows
    batch = [members.popleft()]
    rows = batch[0][0].rows
    while members and rows + members[0][0].rows <= limit:
        rows += members[0][0].rows
        batch.append(members.popleft())
    return batch


def _scaled(
    batch: Sequence[tuple[Sample, Ticket]],
) -> tuple[list[tuple[Sample, Ticket]], list[torch.Tensor]]:
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


def _decode(finished: Sequence[tuple[Sample, Ticket]]) -> None:
    """Decode the latents of one bucket and hand out what they become."""
    now = perf_counter()
    for _, ticket in finished:
        ticket.denoised_at = now
    together = [member for member in finished if member[0].decode is None]
    if together:
        _hand_out(together, together[0][0].denoiser.decode)
    for sample, ticket in finished:
        if sample.decode is None:
            continue
        if ticket.cancelled:  # a clip takes seconds to decode
            ticket.decoded.set_exception(Cancelled("the job was cancelled"))
        else:
            _hand_out([(sample, ticket)], sample.decode)


def _hand_out(
    finished: Sequence[tuple[Sample, Ticket]], decode: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    try:
        decoded = decode(torch.cat([sample.latents for sample, _ in finished]))
    except Exception as error:
        logger.exception("decoding %d samples failed", len(finished))
        _fail(finished, error)
        return
    now = perf_counter()
    for (_, ticket), result in zip(finished, decoded, strict=True):
        ticket.decoded_at = now
        ticket.decoded.set_result(result)


def _fail(batch: Sequence[tuple[Sample, Ticket]], error: Exception) -> None:
    for _, ticket in batch:
        failure = GenerationFailed("the model failed on this job; the server's log says why")
        failure.__cause__ = error
        ticket.decoded.set_exception(failure)
