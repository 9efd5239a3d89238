"""Numbers that are none and pictures of one colour: found, decoded again in float32, or told."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from faults import spoiled
from five_families import catalog_of_five, order, running
from PIL import Image

from jubako.catalog import Catalog
from jubako.job import Job
from jubako.result import Result
from jubako.runner import Runner

Spoil = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    return catalog_of_five(tmp_path_factory.mktemp("catalog"))


@pytest.fixture(scope="module", params=["sd", "sdxl", "sd3", "video"])
def one(
    request: pytest.FixtureRequest, catalog: Catalog, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Runner, Job]]:
    """A runner of each family that decodes, its model loaded, and a job."""
    with running(catalog, request.param, tmp_path_factory.mktemp(request.param)) as runner:
        job = order(catalog, request.param, steps=1)
        made(runner, job).checked()
        yield runner, job


@pytest.fixture(scope="module")
def pictures(catalog: Catalog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runner]:
    with running(catalog, "sd", tmp_path_factory.mktemp("pictures")) as runner:
        yield runner


def made(runner: Runner, job: Job) -> Result:
    return asyncio.run(runner.generate(job))


def pixels(result: Result) -> npt.NDArray[np.int16]:
    content = result.checked().content
    if zipfile.is_zipfile(io.BytesIO(content)):
        with zipfile.ZipFile(io.BytesIO(content)) as frames:
            files = [frames.read(name) for name in sorted(frames.namelist()) if name.endswith(".png")]
    else:
        files = [content]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB"), np.int16) for file in files])


def error(result: Result) -> dict[str, Any]:
    assert result.error is not None, "it was taken for a picture"
    body: dict[str, Any] = result.error["error"]
    return body


def pipeline(runner: Runner) -> Any:
    (tray,) = runner.residency._trays.values()
    return tray.model.pipeline  # type: ignore[attr-defined] # all families have one


def denoiser(runner: Runner) -> torch.nn.Module:
    components = pipeline(runner).components
    found: torch.nn.Module = next(
        components[name] for name in ("unet", "transformer", "prior") if name in components
    )
    return found


def at_one_place(value: float) -> Spoil:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        spoilt = tensor.clone(memory_format=torch.contiguous_format)
        spoilt.view(-1)[spoilt.numel() // 3] = value
        return spoilt

    return spoil


def black(tensor: torch.Tensor) -> torch.Tensor:
    """What pixels of 0 are before they are brought to 0 to 1."""
    return torch.full_like(tensor, -1.0)


def is_narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.bfloat16


OVERFLOWS: dict[str, Spoil] = {
    "all of it NaN": lambda tensor: torch.full_like(tensor, torch.nan),
    "one number NaN": at_one_place(torch.nan),
    "one number infinite": at_one_place(torch.inf),
    "one number infinite below": at_one_place(-torch.inf),
    "all black": black,
    "all white": torch.ones_like,
}


@pytest.mark.parametrize("what", OVERFLOWS)
def test_what_comes_out_spoiled_is_decoded_again(one: tuple[Runner, Job], what: str) -> None:
    runner, job = one
    expected = pixels(made(runner, job))
    with spoiled(pipeline(runner).vae.decoder, OVERFLOWS[what], times=1) as done:
        ours = pixels(made(runner, job))
    assert done
    assert np.abs(ours - expected).max() <= 1


@pytest.mark.parametrize("family", ["sd", "video"])
def test_what_overflows_in_the_autoencoder_s_precision_is_decoded_in_float32(
    catalog: Catalog, tmp_path: Path, family: str
) -> None:
    job = order(catalog, family, steps=1)
    with running(catalog, family, tmp_path) as runner:
        expected = pixels(made(runner, job))
        # No setting gives this precision on a CPU.
        vae = pipeline(runner).vae.to(torch.bfloat16)
        with spoiled(vae.decoder, OVERFLOWS["all of it NaN"], is_narrow) as done:
            ours = pixels(made(runner, job))
        assert done
        assert np.abs(ours - expected).mean() < 3
        assert vae.dtype == torch.bfloat16, "the shared autoencoder was cast"


@pytest.mark.parametrize("what", [name for name in OVERFLOWS if name.startswith(("all of it", "one"))])
def test_what_is_no_picture_in_float32_either_fails_and_says_so(one: tuple[Runner, Job], what: str) -> None:
    runner, job = one
    made(runner, job).checked()
    with spoiled(pipeline(runner).vae.decoder, OVERFLOWS[what]):
        told = error(made(runner, job))
    assert told["code"] == "not_finite"
    assert f"the autoencoder of {job.model} gave numbers that are none" in told["message"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_denoiser_that_overflows_fails_the_job_and_the_next_one_succeeds(
    one: tuple[Runner, Job], value: float
) -> None:
    runner, job = one
    made(runner, job).checked()
    with spoiled(denoiser(runner), at_one_place(value)):
        told = error(made(runner, job))
    assert told["code"] == "not_finite"
    assert f"the denoiser of {job.model} gave numbers that are none" in told["message"]
    assert "runs in float32 already" in told["message"]
    made(runner, job).checked()


def test_of_a_narrow_denoiser_the_setting_is_named_that_may_help(catalog: Catalog, tmp_path: Path) -> None:
    job = order(catalog, "sd", steps=1)
    with running(catalog, "sd", tmp_path) as runner:
        made(runner, job).checked()
        (tray,) = runner.residency._trays.values()
        tray.model.forget_prompts()  # type: ignore[attr-defined] # of this family
        for module in (pipeline(runner).unet, pipeline(runner).text_encoder, pipeline(runner).vae):
            module.to(torch.bfloat16)
        with spoiled(denoiser(runner), at_one_place(torch.inf)):
            assert "JUBAKO_PRECISION=tiny-sd=float32" in error(made(runner, job))["message"]


def test_the_latents_of_an_object_are_looked_at_too(catalog: Catalog, tmp_path: Path) -> None:
    job = order(catalog, "mesh", steps=2)
    with running(catalog, "mesh", tmp_path) as runner:
        made(runner, job).checked()
        with spoiled(denoiser(runner), at_one_place(torch.nan)):
            told = error(made(runner, job))
        assert told["code"] == "not_finite"
        assert "runs in float32 already" in told["message"]
        made(runner, job).checked()


@pytest.mark.parametrize("colour", [-1.0, 1.0, 0.25])
def test_a_picture_that_is_of_one_colour_in_float32_as_well_is_the_truth(
    pictures: Runner, catalog: Catalog, colour: float
) -> None:
    job = order(catalog, "sd", steps=2)
    made(pictures, job).checked()
    with spoiled(pipeline(pictures).vae.decoder, lambda tensor: torch.full_like(tensor, colour)) as done:
        picture = pixels(made(pictures, job))
    assert len(done) == 2, "it was not asked again"
    assert (picture.min(), picture.max()) == (round(255 * (colour / 2 + 0.5)),) * 2


def test_a_dark_picture_that_is_not_of_one_colour_is_decoded_once(pictures: Runner, catalog: Catalog) -> None:
    job = order(catalog, "sd", prompt="a small purple ring on the left of a black background", steps=12)
    made(pictures, job).checked()
    with spoiled(pipeline(pictures).vae.decoder, lambda tensor: tensor) as done:
        assert pixels(made(pictures, job)).std() > 1
    assert len(done) == 1


def test_one_that_overflows_takes_no_mate_along(
    pictures: Runner, catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [order(catalog, "sd", seed=seed, steps=6) for seed in range(4)]
    expected = [pixels(made(pictures, job)) for job in jobs]
    (tray,) = pictures.residency._trays.values()
    prepare = tray.model.prepare

    def poisoned(job: Job) -> Any:
        sample = prepare(job)
        if job.seed == 2:
            sample.latents = at_one_place(torch.nan)(sample.latents)
        return sample

    monkeypatch.setattr(tray.model, "prepare", poisoned)

    async def together() -> list[Result]:
        return await asyncio.gather(*(pictures.generate(job) for job in jobs))

    results = asyncio.run(together())
    assert error(results.pop(2))["code"] == "not_finite"
    expected.pop(2)
    for ours, alone in zip(results, expected, strict=True):
        assert np.abs(pixels(ours) - alone).max() <= 2
