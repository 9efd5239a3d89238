"""Ten schedulers under many settings against the stock pipeline, and what a schedule takes from the model."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from oracle import TEN_SCHEDULERS, Difference, alone, batched, difference, job, stock, wrapped
from pipelines import sd_pipeline

from jubako.families.latent import LatentModel

SETTINGS = list(itertools.product((1, 4, 20), (1.0, 5.0, 7.5), ("", "a blue square")))


@pytest.fixture(scope="module")
def model() -> LatentModel:
    return wrapped(sd_pipeline("sd1"), "sd1.5")


@pytest.mark.parametrize("scheduler", TEN_SCHEDULERS)
def test_batched_samples_equal_the_stock_pipeline(
    model: LatentModel, scheduler: str, check: Callable[[str, str, str, Difference], None]
) -> None:
    jobs = [
        job(
            "sd1.5",
            scheduler=scheduler,
            num_inference_steps=steps,
            guidance_scale=guidance,
            negative_prompt=negative,
        )
        for steps, guidance, negative in SETTINGS
    ]
    expected = [stock(model.pipeline, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched({"sd1.5": model}, jobs), expected, strict=True):
        check(one.model, one.task, one.scheduler, difference(ours, theirs))


def test_ten_schedulers_share_one_batcher(model: LatentModel) -> None:
    jobs = [
        job("sd1.5", scheduler=name, num_inference_steps=3 + number)
        for number, name in enumerate(TEN_SCHEDULERS)
    ]
    expected = [stock(model.pipeline, one) for one in jobs]
    for ours, theirs in zip(batched({"sd1.5": model}, jobs), expected, strict=True):
        assert difference(ours, theirs).latents < 1e-3


def test_v_prediction_and_trailing_timesteps_come_from_the_model_s_own_config() -> None:
    v_prediction = wrapped(sd_pipeline("sd2"), "sd2.1").prepare(job("sd2.1", scheduler="Euler"))
    assert v_prediction.schedule._scheduler.config.prediction_type == "v_prediction"
    turbo = wrapped(sd_pipeline("sd-turbo"), "sd-turbo").prepare(job("sd-turbo", guidance_scale=0.0))
    assert turbo.schedule._timesteps.tolist() == [999, 749, 499, 249]
    assert turbo.rows == 1


def test_pndm_runs_one_forward_more_than_its_steps(model: LatentModel) -> None:
    assert len(model.prepare(job("sd1.5", scheduler="PLMS", num_inference_steps=20)).schedule) == 21


def test_the_same_job_alone_and_among_seven_mates_gives_the_same_picture(model: LatentModel) -> None:
    one = job(
        "sd1.5",
        scheduler="Euler a",
        num_inference_steps=12,
        guidance_scale=7.5,
        negative_prompt="a blue square",
    )
    apart = alone({"sd1.5": model}, one)
    mates = [job("sd1.5", scheduler=name, num_inference_steps=8) for name in TEN_SCHEDULERS[:7]]
    together = batched({"sd1.5": model}, [*mates[:3], one, *mates[3:]])[3]
    assert float((together.picture - apart.picture).abs().max() * 255) < 1
    assert torch.isfinite(together.latents).all()
