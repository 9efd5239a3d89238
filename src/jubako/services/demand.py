"""What a job asks of its family: rows at a time, and work in all."""

from __future__ import annotations

from math import ceil

from jubako.catalog import Family, Model
from jubako.fair_queue import Ask
from jubako.job import Job
from jubako.services.urgency import Urgency

__all__ = ["ask_of", "window_of"]

# So many forwards' rows are at work: the next one is full, and another waits behind it.
FORWARDS = 2


def ask_of(job: Job, model: Model, owner: str, urgency: Urgency) -> Ask:
    """Work is the denoiser's multiplications, in proportion: rows x steps x pixels x parameters."""
    guided = job.guidance_scale > 1 or job.clip is not None
    rows = (2 if guided else 1) + (job.skip_layer_guidance is not None)
    steps = ceil(job.num_inference_steps * (job.strength or 1.0))
    frames = job.clip.num_frames if job.clip else 1
    pixels = max(1, job.width * job.height) * frames
    work = rows * max(1, steps) * pixels * max(1, model.parameters) * 1e-12
    return Ask(work, rows, owner, urgency.priority, urgency.within)


def window_of(family: Family, replicas: int = 1) -> int:
    """Rows that are at work at a time on so many replicas, by whichever way the family batches.

    Where there is none, those whose turn it is hear of it at once.
    """
    rows = max(model.max_rows for model in family.models.values())
    return FORWARDS * max(rows, 2 * family.batching.max_batch_size) * max(1, replicas)
