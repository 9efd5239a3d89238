"""The oracle: the stock pipeline's ``__call__`` with the same weights, seed and settings.

Samples arrive while others run: each submits the next one after its second step, so that a forward holds
samples at different steps, with and without guidance.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from pipelines import sd_pipeline

from jubako.engine.batcher import StepBatcher, Ticket
from jubako.engine.samples import Sample
from jubako.families.sd import StableDiffusion
from jubako.job import Job
from jubako.schedulers import resolve_scheduler

# The stock pipeline announces the clipping that it turns off for latents; that it does so is what we compare.
pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")

TEN_SCHEDULERS = (
    "Euler",
    "Euler a",
    "Heun",
    "LMS",
    "DPM2 a",
    "DPM++ 2M Karras",
    "DPM++ 2M SDE",
    "UniPC",
    "DDIM",
    "PLMS",
)
SETTINGS = list(itertools.product((1, 4, 20), (1.0, 5.0, 7.5), ("", "a blue square")))


@dataclass
class Outcome:
    """The last latents, relative to which errors are judged, and the picture."""

    latents: torch.Tensor
    picture: torch.Tensor


def job(seed: int, scheduler: str, steps: int, guidance_scale: float, negative_prompt: str) -> Job:
    return Job(
        id=str(seed),
        task="txt2img",
        family="sd",
        model="random",
        prompt=f"a red circle {seed}",
        negative_prompt=negative_prompt,
        width=64,
        height=64,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        seed=seed,
        output_format="png",
        output_compression=90,
    )


def stock(pipeline: Any, job: Job) -> Outcome:
    """One call of the stock pipeline, built anew around the asked scheduler as a user would."""
    choice = resolve_scheduler(job.scheduler)
    scheduler = getattr(diffusers, choice.scheduler).from_config(pipeline.scheduler.config, **choice.options)
    components = {**pipeline.components, "scheduler": scheduler}
    oracle = type(pipeline)(**components, requires_safety_checker=False)
    oracle.set_progress_bar_config(disable=True)
    latents = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return {}

    picture = oracle(
        job.prompt,
        negative_prompt=job.negative_prompt or None,
        width=job.width,
        height=job.height,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(job.seed),
        output_type="pt",
        callback_on_step_end=keep,
    ).images[0]
    return Outcome(latents[-1], picture)


def batched(model: StableDiffusion, jobs: list[Job]) -> list[Outcome]:
    """All jobs through one batcher, each arriving while those before it run."""
    batcher = StepBatcher()
    samples: list[Sample] = []
    tickets: list[Ticket] = []

    def next_arrives() -> None:
        if len(samples) < len(jobs):
            samples.append(model.prepare(jobs[len(samples)]))
            tickets.append(Ticket(lambda step, steps: next_arrives() if step == min(2, steps) else None))
            batcher.submit(samples[-1], tickets[-1])

    next_arrives()
    # Tickets are added while this waits for earlier ones; each is there when the one before it is done.
    pictures: list[torch.Tensor] = []
    while len(pictures) < len(jobs):
        pictures.append(tickets[len(pictures)].picture.result(60))
    if any(len(sample.schedule) > 1 for sample in samples):
        assert batcher.rows > batcher.forwards, "nothing was batched"
    batcher.close()
    return [Outcome(s.latents, p) for s, p in zip(samples, pictures, strict=True)]


def assert_equal(ours: Outcome, theirs: Outcome, what: Job) -> None:
    largest = theirs.latents.abs().max()
    relative = float((ours.latents - theirs.latents).abs().max() / largest)
    difference = float((ours.picture - theirs.picture).abs().max() * 255)
    where = f"{what.scheduler}, {what.num_inference_steps} steps, guidance {what.guidance_scale}"
    assert relative < 1e-3, f"{where}: latents differ by {relative:.2e} of the largest"
    assert difference < 2, f"{where}: the picture differs by {difference:.3f}/255"


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    return StableDiffusion(sd_pipeline("sd1"), max_rows=16)


@pytest.mark.parametrize("scheduler", TEN_SCHEDULERS)
def test_batched_samples_equal_the_stock_pipeline(model: StableDiffusion, scheduler: str) -> None:
    jobs = [job(seed, scheduler, *settings) for seed, settings in enumerate(SETTINGS)]
    expected = [stock(model.pipeline, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched(model, jobs), expected, strict=True):
        assert_equal(ours, theirs, one)


def test_ten_schedulers_share_one_batcher(model: StableDiffusion) -> None:
    jobs = [job(seed, name, 3 + seed, 5.0, "") for seed, name in enumerate(TEN_SCHEDULERS)]
    expected = [stock(model.pipeline, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched(model, jobs), expected, strict=True):
        assert_equal(ours, theirs, one)


@pytest.mark.parametrize(
    ("kind", "scheduler", "steps", "guidance_scale"),
    [
        ("sd2", "DDIMScheduler", 20, 7.5),
        ("sd2", "Euler", 10, 5.0),
        ("sd2", "DPM++ 2M", 10, 7.5),
        ("sd-turbo", "EulerDiscreteScheduler", 1, 0.0),
        ("sd-turbo", "EulerDiscreteScheduler", 4, 0.0),
        ("sd1", "PNDMScheduler", 20, 7.5),
    ],
)
def test_other_kinds_of_models_equal_the_stock_pipeline(
    kind: str, scheduler: str, steps: int, guidance_scale: float
) -> None:
    model = StableDiffusion(sd_pipeline(kind), max_rows=16)
    jobs = [job(seed, scheduler, steps, guidance_scale, "") for seed in range(3)]
    expected = [stock(model.pipeline, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched(model, jobs), expected, strict=True):
        assert_equal(ours, theirs, one)


def test_v_prediction_and_trailing_timesteps_come_from_the_model_s_own_config() -> None:
    v_prediction = StableDiffusion(sd_pipeline("sd2"), 16).prepare(job(0, "Euler", 4, 1.0, ""))
    assert v_prediction.schedule._scheduler.config.prediction_type == "v_prediction"
    turbo = StableDiffusion(sd_pipeline("sd-turbo"), 16).prepare(job(0, "Euler", 4, 0.0, ""))
    assert turbo.schedule._timesteps.tolist() == [999, 749, 499, 249]
    assert turbo.rows == 1


def test_pndm_runs_one_forward_more_than_its_steps(model: StableDiffusion) -> None:
    assert len(model.prepare(job(0, "PLMS", 20, 5.0, "")).schedule) == 21


def test_the_same_job_alone_and_among_seven_mates_gives_the_same_picture(model: StableDiffusion) -> None:
    one = job(7, "Euler a", 12, 7.5, "a blue square")
    (alone,) = [Outcome(s.latents, p) for s, p in [run_alone(model, one)]]
    mates = [job(seed, name, 8, 5.0, "") for seed, name in enumerate(TEN_SCHEDULERS[:7])]
    together = batched(model, [*mates[:3], one, *mates[3:]])[3]
    assert float((together.picture - alone.picture).abs().max() * 255) < 1


def run_alone(model: StableDiffusion, one: Job) -> tuple[Sample, torch.Tensor]:
    batcher, ticket, sample = StepBatcher(), Ticket(), model.prepare(one)
    batcher.submit(sample, ticket)
    picture = ticket.picture.result(60)
    batcher.close()
    return sample, picture
