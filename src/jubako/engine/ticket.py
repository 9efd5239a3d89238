"""A job's place in the step batcher, on the side of whoever waits for it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch

from jubako.errors import GenerationFailed, JubakoError
from jubako.memory import out_of_memory, too_large
from jubako.tracing import Link

__all__ = ["Ticket", "failure_of"]

logger = logging.getLogger(__name__)


class Ticket:
    """A job's place in the batcher: cancel it, hear of its steps, wait for what is decoded of it.

    That is a picture [3, H, W] from 0 to 1, or whatever else the model's ``decode`` gives. After every
    ``preview_every`` steps but the last, ``on_preview`` gets a small picture [3, h, w] of what there is so
    far. Both listeners are called on the denoiser's thread, a step's ``on_step`` before its ``on_preview``.
    ``link`` is the job's span, where it has one.
    """

    def __init__(
        self,
        on_step: Callable[[int, int], None] | None = None,
        *,
        preview_every: int = 0,
        on_preview: Callable[[torch.Tensor], None] | None = None,
        link: Link | None = None,
    ) -> None:
        self.link = link
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

    def fail(self, error: Exception) -> None:
        """End it for who waits."""
        self.decoded.set_exception(failure_of(error))


def failure_of(error: Exception) -> JubakoError:
    """What an error of the model's, or of ours, is to those who wait."""
    if isinstance(error, JubakoError):
        return error
    if out_of_memory(error):
        return too_large()  # without its cause, whose frames hold the tensors that there was no room for
    failure = GenerationFailed("the model failed on this job; the server's log says why")
    failure.__cause__ = error
    return failure
