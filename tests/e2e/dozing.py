"""The deployment of ``slow.py`` with a runner that needs no torch: what is tested is all that is before it.

Its processes start in seconds and take next to nothing, so that several of them can be killed and started.
"""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from slow import FORWARD_SECONDS, Gateway, Slow

from jubako.catalog import Family
from jubako.job import Job
from jubako.residency import Residence
from jubako.result import Progress, Result
from jubako.services import ignition
from jubako.settings import Settings

__all__ = ["Gateway", "Slow"]

logger = logging.getLogger("jubako.dozing")


class Dozer:
    """Sleeps for a tenth of a second a step, however many jobs there are."""

    preloaded = True

    def __init__(self, family: Family, settings: Settings, preloaded: Sequence[str]) -> None:
        del settings, preloaded
        self._models = family.models

    async def generate(
        self, job: Job, on_progress: Callable[[Progress], None] | None = None, *, durable: bool = False
    ) -> Result:
        """A grey picture."""
        steps = job.num_inference_steps
        for step in range(1, steps + 1):
            await asyncio.sleep(FORWARD_SECONDS)
            if on_progress is not None:
                on_progress(Progress(job_id=job.id, step=step, steps=steps))
        if durable:
            logger.info("job %s ended", job.id)
        file = io.BytesIO()
        Image.new("RGB", (8, 8), (128, 128, 128)).save(file, "PNG")
        return Result(job_id=job.id, seed=job.seed, content_type="image/png", content=file.getvalue())

    def cancel(self, job_id: str) -> bool:
        """Let it sleep."""
        del job_id
        return False

    def states(self) -> dict[str, Residence]:
        """All there."""
        return dict.fromkeys(self._models, Residence("resident"))

    def choices(self) -> Mapping[str, Any]:
        """None."""
        return {}

    def close(self) -> None:
        """Nothing to end."""


ignition._started = Dozer  # type: ignore[assignment] # the one place where torch comes in
