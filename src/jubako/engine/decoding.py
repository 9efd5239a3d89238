"""Finished samples to pictures, clips and objects: together, apart where the memory does not hold them all.

Those of one bucket are decoded in one call, but samples that have a way of their own (clips, a few frames at
a time) one by one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from time import perf_counter

import torch

from jubako.engine.samples import Decode, Sample
from jubako.engine.ticket import Ticket
from jubako.errors import Cancelled
from jubako.memory import give_back, out_of_memory

__all__ = ["decode"]

logger = logging.getLogger(__name__)


def decode(finished: Sequence[tuple[Sample, Ticket]]) -> None:
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
            ticket.fail(Cancelled("the job was cancelled"))
        else:
            _hand_out([(sample, ticket)], sample.decode)


def _hand_out(finished: Sequence[tuple[Sample, Ticket]], way: Decode, *, sparing: bool = False) -> None:
    """Decode these in one call; where the memory does not hold it in two, and one alone in a sparing way."""
    try:
        decoded = way(torch.cat([sample.latents for sample, _ in finished]), sparing=sparing)
    except Exception as error:
        if short := out_of_memory(error):
            logger.warning("no memory to decode %d samples: %s", len(finished), str(error))
        else:
            logger.exception("decoding %d samples failed", len(finished))
        if not short or sparing:
            for _, ticket in finished:
                ticket.fail(error)
    else:
        now = perf_counter()
        for (_, ticket), result in zip(finished, decoded, strict=True):
            ticket.decoded_at = now
            ticket.decoded.set_result(result)
        return
    if not short:
        return
    # Only now: the error's frames held what had been decoded so far.
    give_back()
    if len(finished) > 1:
        half = len(finished) // 2
        _hand_out(finished[:half], way)
        _hand_out(finished[half:], way)
    elif not sparing:
        _hand_out(finished, way, sparing=True)
