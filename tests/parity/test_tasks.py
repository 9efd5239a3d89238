"""Every family and task against the stock pipelines, with rows of all tasks in the same forwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from oracle import (
    CATALOG,
    TEN_SCHEDULERS,
    Difference,
    Outcome,
    alone,
    batched,
    difference,
    job,
    stock,
    wrapped,
)
from pipelines import refiner_pipeline, sd3_pipeline, sd_pipeline, sdxl_pipeline

from jubako.families.latent import LatentModel
from jubako.job import Job, MicroConditioning, Refinement
from jubako.request import SkipLayerGuidance

Check = Callable[[str, str, str, Difference], None]

TASKS = ("txt2img", "img2img", "inpaint")


@dataclass(frozen=True)
class Row:
    """A model with one scheduler, and the tasks that share one batcher."""

    model: str
    scheduler: str
    tasks: tuple[str, ...] = TASKS
    steps: tuple[int, ...] = (4, 9)
    guidance: tuple[float, ...] = (5.0, 1.0)


ROWS = (
    *(Row("sd1.5", scheduler) for scheduler in TEN_SCHEDULERS),
    *(Row("sd1.5-inpainting", scheduler, ("inpaint",)) for scheduler in ("PLMS", "Euler a", "DDIM")),
    *(Row("sd2.1", scheduler) for scheduler in ("DDIMScheduler", "Euler", "DPM++ 2M")),
    Row("sd-turbo", "EulerDiscreteScheduler", steps=(2, 4), guidance=(0.0,)),
    *(Row("sdxl", scheduler) for scheduler in TEN_SCHEDULERS),
    *(Row("sdxl-inpainting", scheduler, ("inpaint",)) for scheduler in ("Euler", "Euler a", "DDIM")),
    Row("sdxl-turbo", "EulerAncestralDiscreteScheduler", steps=(2, 4), guidance=(0.0,)),
    Row("sdxl-lightning-1step", "EulerDiscreteScheduler", ("txt2img",), (1,), (0.0,)),
    *(
        Row(f"sdxl-lightning-{steps}step", "EulerDiscreteScheduler", steps=(steps,), guidance=(0.0,))
        for steps in (2, 4, 8)
    ),
    *(Row("sd3.5-medium", scheduler) for scheduler in ("Euler", "Euler Karras", "Heun")),
    # The stock pipelines give these schedulers no way to start from a picture.
    *(Row("sd3.5-medium", scheduler, ("txt2img",)) for scheduler in ("DPM++ 2M", "UniPC")),
    Row("sd3.5-large-turbo", "FlowMatchEulerDiscreteScheduler", steps=(4,), guidance=(0.0,)),
)
REFINED = ("Euler", "Heun", "DPM++ 2M", "Euler a")

_PIPELINES: dict[str, Callable[[], Any]] = {
    "sd1.5": sd_pipeline,
    "sd1.5-inpainting": lambda: sd_pipeline(in_channels=9),
    "sd2.1": lambda: sd_pipeline("sd2"),
    "sd-turbo": lambda: sd_pipeline("sd-turbo"),
    "sdxl": sdxl_pipeline,
    "sdxl-inpainting": lambda: sdxl_pipeline(in_channels=9),
    "sdxl-turbo": lambda: sdxl_pipeline("sdxl-turbo"),
    "sdxl-lightning-1step": lambda: sdxl_pipeline("sdxl-lightning-1step"),
    "sdxl-lightning-2step": lambda: sdxl_pipeline("sdxl-lightning"),
    "sdxl-lightning-4step": lambda: sdxl_pipeline("sdxl-lightning"),
    "sdxl-lightning-8step": lambda: sdxl_pipeline("sdxl-lightning"),
    "sd3.5-medium": sd3_pipeline,
    "sd3.5-large-turbo": sd3_pipeline,
}


@lru_cache(2)
def loaded(model: str) -> LatentModel:
    return wrapped(_PIPELINES[model](), model)


def jobs_of(row: Row) -> list[Job]:
    """Jobs of all the row's tasks that differ in steps, guidance, strength and negative prompt."""
    settings = itertools.product(row.steps, row.guidance)
    jobs = []
    for (steps, guidance), strength, negative in zip(
        settings, itertools.cycle((0.5, 1.0)), itertools.cycle(("", "a blue square")), strict=False
    ):
        for task in row.tasks:
            fields: dict[str, Any] = {"strength": strength} if task != "txt2img" else {}
            if CATALOG.model(row.model).flow:
                fields["max_sequence_length"] = 32
            jobs.append(
                job(
                    row.model,
                    task,
                    scheduler=row.scheduler,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    negative_prompt=negative if guidance > 1 else "",
                    **fields,
                )
            )
    return jobs


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.model}-{row.scheduler}")
def test_samples_of_all_tasks_in_one_batcher_equal_the_stock_pipelines(row: Row, check: Check) -> None:
    model = loaded(row.model)
    jobs = jobs_of(row)
    expected = [stock(model.pipeline, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched({row.model: model}, jobs), expected, strict=True):
        check(one.model, one.task, one.scheduler, difference(ours, theirs))


@pytest.mark.parametrize("scheduler", REFINED)
def test_base_and_refiner_equal_the_stock_ensemble(scheduler: str, check: Check) -> None:
    base = loaded("sdxl")
    models = {"sdxl": base, "sdxl-refiner": wrapped(refiner_pipeline(base.pipeline), "sdxl-refiner")}
    refined = [
        job(
            "sdxl",
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_scale=guidance,
            refinement=Refinement(model="sdxl-refiner", after=after),
        )
        for steps, guidance, after in ((10, 5.0, 0.8), (6, 1.0, 0.5), (10, 5.0, 0.75))
    ]
    mates = [
        job("sdxl", "img2img", scheduler=scheduler),
        job("sdxl-refiner", "img2img", scheduler=scheduler, strength=0.5, num_inference_steps=8),
        job("sdxl", "inpaint", scheduler=scheduler),
    ]
    jobs = [one for pair in zip(refined, mates, strict=True) for one in pair]
    expected = [_ensemble(models, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched(models, jobs), expected, strict=True):
        label = "sdxl + refiner" if one.refinement else one.model
        check(label, one.task, one.scheduler, difference(ours, theirs))


def _ensemble(models: dict[str, LatentModel], one: Job) -> Outcome:
    if not one.refinement:
        return stock(models[one.model].pipeline, one)
    begun = stock(models["sdxl"].pipeline, one, denoising_end=one.refinement.after, output_type="latent")
    refining = one.model_copy(update={"task": "img2img", "strength": None})
    return stock(
        models["sdxl-refiner"].pipeline,
        refining,
        image=begun.picture[None],
        denoising_start=one.refinement.after,
    )


def test_sizes_and_crop_reach_sdxl_as_in_the_stock_pipeline() -> None:
    model = loaded("sdxl")
    sizes = MicroConditioning(original_size=(512, 256), crop=(16, 8), target_size=(1024, 768))
    told, untold = (
        job("sdxl", seed=1, prompt="x"),
        job("sdxl", seed=1, prompt="x", micro_conditioning=sizes),
    )
    for one in (told, untold):
        apart = difference(alone({"sdxl": model}, one), stock(model.pipeline, one))
        assert apart.latents < 1e-3
    changed = difference(alone({"sdxl": model}, told), alone({"sdxl": model}, untold))
    assert changed.latents > 1e-3, "the sizes change nothing"


def test_skip_layer_guidance_equals_the_stock_pipeline_beside_samples_without(check: Check) -> None:
    model = loaded("sd3.5-medium")
    skipping = SkipLayerGuidance(layers=(1,), scale=2.8, start=0.1, stop=0.6)
    other = SkipLayerGuidance(layers=(0, 2), scale=1.5, start=0.01, stop=0.9)
    fields: dict[str, Any] = {"num_inference_steps": 8, "max_sequence_length": 16}
    jobs = [
        job("sd3.5-medium", skip_layer_guidance=skipping, **fields),
        job("sd3.5-medium", **fields),
        job("sd3.5-medium", skip_layer_guidance=other, **fields),
        job("sd3.5-medium", skip_layer_guidance=skipping, **fields | {"guidance_scale": 1.0}),
        job("sd3.5-medium", skip_layer_guidance=skipping, **fields),
    ]
    expected = [stock(model.pipeline, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched({"sd3.5-medium": model}, jobs), expected, strict=True):
        check("sd3.5-medium, skip-layer guidance", one.task, one.scheduler, difference(ours, theirs))
    without = jobs[0].model_copy(update={"skip_layer_guidance": None})
    assert difference(alone({"sd3.5-medium": model}, without), expected[0]).latents > 1e-3


def test_sd3_without_its_t5_equals_the_stock_pipeline(check: Check) -> None:
    model = wrapped(sd3_pipeline(t5=False), "sd3-medium")
    jobs = [
        job("sd3-medium", task, max_sequence_length=length)
        for task in ("txt2img", "inpaint")
        for length in (16, 48)
    ]
    expected = [stock(model.pipeline, one) for one in jobs[::2]]
    ours = batched({"sd3-medium": model}, jobs)
    for one, mine, theirs in zip(jobs[::2], ours[::2], expected, strict=True):
        check("sd3-medium without T5", one.task, one.scheduler, difference(mine, theirs))


def test_the_table_in_the_docs_lists_every_row() -> None:
    table = (Path(__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    listed = {
        tuple(cell.strip() for cell in line.split("|")[1:4])
        for line in table.splitlines()
        if line.startswith("| sd")
    }
    for row in ROWS:
        for task in row.tasks:
            assert (row.model, task, row.scheduler) in listed
    assert {("sdxl + refiner", "txt2img", scheduler) for scheduler in REFINED} <= listed
