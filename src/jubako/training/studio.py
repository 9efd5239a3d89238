"""Pictures that a training draws with its own model: of the class, on the way, and of what came out.

They are drawn by the engine that serves, under whatever the denoiser has learned so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image

from jubako.catalog import Catalog
from jubako.engine.batcher import StepBatcher
from jubako.engine.ticket import Ticket
from jubako.families.latent import LatentModel
from jubako.job import Job
from jubako.planning import plan
from jubako.request import TextToImage

__all__ = ["Studio"]

_TOGETHER = 8


class Studio:
    """Draws with one model, in squares of the side that it is trained with."""

    def __init__(self, model: LatentModel, catalog: Catalog, resolution: int) -> None:
        self._model = model
        self._catalog = catalog
        self._resolution = resolution

    def job(self, prompt: str, seed: int = 0, steps: int | None = None, *, guided: bool = True) -> Job:
        """The job of one picture; unguided it has a single row."""
        request = TextToImage(
            model=self._model.model.name,
            prompt=prompt,
            seed=seed,
            width=self._resolution,
            height=self._resolution,
            num_inference_steps=steps,
            guidance_scale=None if guided else 0.0,
        )
        return plan(request, self._catalog)

    def draw(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        steps: int | None = None,
        on_progress: Callable[[int, int], None] = lambda _done, _of: None,
    ) -> list[Image.Image]:
        """One picture for each prompt and seed; ``on_progress`` may raise to end it."""
        # Made anew around the pipeline, since a model keeps the states of prompts, which may have changed.
        model = type(self._model)(self._model.pipeline, self._model.model)
        jobs = [self.job(prompt, seed, steps) for prompt, seed in zip(prompts, seeds, strict=True)]
        pictures: list[Image.Image] = []
        batcher = StepBatcher()
        try:
            for start in range(0, len(jobs), _TOGETHER):
                tickets = [_submitted(batcher, model, job) for job in jobs[start : start + _TOGETHER]]
                pictures += [model.to_image(ticket.decoded.result()) for ticket in tickets]
                on_progress(len(pictures), len(jobs))
        finally:
            batcher.close()
        return pictures


def _submitted(batcher: StepBatcher, model: LatentModel, job: Job) -> Ticket:
    ticket = Ticket()
    batcher.submit(model.prepare(job), ticket)
    return ticket
