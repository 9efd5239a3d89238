"""Clips of several jobs in one batcher against the stock pipelines with the same weights and seeds."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CATALOG, SIDE, Difference, Outcome, batched, difference, photograph
from PIL import Image
from video_pipelines import animatediff_pipeline, sv3d_pipeline, svd_pipeline

from jubako.engine.batcher import StepBatcher
from jubako.engine.ticket import Ticket
from jubako.families import video
from jubako.job import Clip, Job
from jubako.schedulers import resolve_scheduler

Check = Callable[[str, str, str, Difference], None]

PIPELINES: dict[str, Callable[[], Any]] = {
    "svd": svd_pipeline,
    "animatediff": animatediff_pipeline,
    "sv3d-u": sv3d_pipeline,
}
_numbers = itertools.count()


@lru_cache(1)
def loaded(model: str) -> Any:
    return video.wrap(PIPELINES[model](), CATALOG.model(model))


def job(model: str, *, clip: dict[str, Any] | None = None, **fields: Any) -> Job:
    """A short small clip; what is not given is the catalog's."""
    entry, number = CATALOG.model(model), next(_numbers)
    own = entry.defaults.clip
    assert own is not None
    given: dict[str, Any] = {
        "id": f"{number}",
        "task": entry.tasks[0],
        "family": "video",
        "model": model,
        "prompt": f"a red circle {number}" if model == "animatediff" else "",
        "negative_prompt": "",
        "width": SIDE,
        "height": SIDE,
        "num_inference_steps": 4,
        "guidance_scale": entry.defaults.guidance_scale,
        "scheduler": entry.defaults.scheduler,
        "seed": 100 + number,
        "image": photograph() if "img2vid" in entry.tasks else None,
        "clip": Clip.model_validate({**own.model_dump(), "num_frames": 5, **(clip or {})}),
        "output_format": "mp4",
        "output_compression": 90,
    }
    return Job.model_validate(given | fields)


def stock(pipeline: Any, one: Job) -> Outcome:
    """One call of the stock pipeline."""
    latents = []

    def keep(_: Any, __: int, ___: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        latents.append(tensors["latents"])
        return {}

    assert one.clip is not None
    scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config)
    oracle = type(pipeline)(**{**pipeline.components, "scheduler": scheduler})
    oracle.set_progress_bar_config(disable=True)
    frames = oracle(
        **_arguments(one, one.clip),
        width=one.width,
        height=one.height,
        num_frames=one.clip.num_frames,
        num_inference_steps=one.num_inference_steps,
        decode_chunk_size=one.clip.decode_chunk_size,
        generator=torch.Generator("cpu").manual_seed(one.seed),
        output_type="pt",
        callback_on_step_end=keep,
    ).frames[0]
    return Outcome(latents[-1], frames)


def _arguments(one: Job, clip: Clip) -> dict[str, Any]:
    if one.task == "txt2vid":
        return {
            "prompt": one.prompt,
            "negative_prompt": one.negative_prompt or None,
            "guidance_scale": one.guidance_scale,
        }
    return {
        "image": Image.open(io.BytesIO(one.image or b"")),
        "min_guidance_scale": clip.min_guidance_scale,
        "max_guidance_scale": one.guidance_scale,
        "fps": clip.fps,
        "motion_bucket_id": clip.motion_bucket_id,
        "noise_aug_strength": clip.noise_aug_strength,
    }


def svd_jobs() -> Sequence[Job]:
    """Jobs that differ in all that a job of SVD can differ in; five frames, but for the last one."""
    return [
        job("svd"),
        job("svd", num_inference_steps=7, clip={"fps": 12, "motion_bucket_id": 40}),
        job("svd", guidance_scale=1.0, clip={"noise_aug_strength": 0.5, "decode_chunk_size": 1}),
        job("svd", guidance_scale=4.5, clip={"min_guidance_scale": 2.0, "decode_chunk_size": 2}),
        job("svd", num_inference_steps=3, clip={"num_frames": 3, "decode_chunk_size": 3}),
    ]


@pytest.mark.parametrize("number", range(5))
def test_one_clip_alone_equals_the_stock_pipeline(number: int, check: Check) -> None:
    model, one = loaded("svd"), svd_jobs()[number]
    expected = stock(model.pipeline, one)
    (ours,) = batched({"svd": model}, [one])
    assert ours.picture.shape == expected.picture.shape
    check("svd", one.task, one.scheduler, difference(ours, expected))


@pytest.mark.parametrize("count", [2, 3, 5])
def test_clips_that_arrive_while_others_run_equal_the_stock_pipeline(count: int, check: Check) -> None:
    model, jobs = loaded("svd"), svd_jobs()[:count]
    expected = [stock(model.pipeline, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched({"svd": model}, jobs), expected, strict=True):
        check("svd", one.task, one.scheduler, difference(ours, theirs))


@pytest.mark.parametrize("chunk_size", [1, 2, 5])
def test_clips_that_end_together_are_decoded_each_in_its_own_chunks(chunk_size: int, check: Check) -> None:
    model = loaded("svd")
    jobs = [job("svd", seed=7, clip={"decode_chunk_size": size}) for size in (chunk_size, 5, 1)]
    tickets, batcher = [Ticket() for _ in jobs], StepBatcher()
    samples = [model.prepare(one) for one in jobs]
    for sample, ticket in zip(samples, tickets, strict=True):
        batcher.submit(sample, ticket)
    clips = [ticket.decoded.result(60) for ticket in tickets]
    batcher.close()
    for one, sample, clip in zip(jobs, samples, clips, strict=True):
        apart = difference(Outcome(sample.latents, clip), stock(model.pipeline, one))
        check("svd", one.task, one.scheduler, apart)
    if chunk_size == 2:
        assert float((clips[0] - clips[1]).abs().max() * 255) > 2, "the decoder does not look along time"


def test_what_svd_is_told_matters() -> None:
    model = loaded("svd")
    plain = batched({"svd": model}, [job("svd", seed=1)])[0]
    for told in (
        {"fps": 20},
        {"motion_bucket_id": 20},
        {"noise_aug_strength": 1.0},
        {"min_guidance_scale": 3.0},
    ):
        other = batched({"svd": model}, [job("svd", seed=1, clip=told)])[0]
        assert difference(other, plain).latents > 1e-3, told


def test_animatediff_equals_the_stock_pipeline_alone_and_in_company(check: Check) -> None:
    model = loaded("animatediff")
    jobs = [
        job("animatediff"),
        job("animatediff", num_inference_steps=7, negative_prompt="a blue square", guidance_scale=3.0),
        job("animatediff", guidance_scale=1.0, clip={"decode_chunk_size": 2}),
        job("animatediff", num_inference_steps=3, clip={"num_frames": 8}),
    ]
    expected = [stock(model.pipeline, one) for one in jobs]
    for one, theirs in zip(jobs, expected, strict=True):
        (ours,) = batched({"animatediff": model}, [one])
        assert ours.picture.shape == theirs.picture.shape
        check("animatediff", one.task, one.scheduler, difference(ours, theirs))
    for one, ours, theirs in zip(jobs, batched({"animatediff": model}, jobs), expected, strict=True):
        check("animatediff", one.task, one.scheduler, difference(ours, theirs))


def test_animatediff_s_frames_see_each_other() -> None:
    model = loaded("animatediff")
    shorter, longer = (
        batched({"animatediff": model}, [job("animatediff", seed=1, clip={"num_frames": frames})])[0]
        for frames in (1, 5)
    )
    assert float((shorter.picture[0] - longer.picture[0]).abs().max()) > 0.01


@torch.inference_mode()
def by_hand(pipeline: Any, one: Job) -> Outcome:
    """SV3D's sampling as its paper and code have it: Euler over Karras sigmas, guidance up and down again."""
    clip = one.clip
    assert clip is not None
    generator = torch.Generator("cpu").manual_seed(one.seed)
    picture = pipeline.video_processor.preprocess(Image.open(io.BytesIO(one.image or b"")))
    embedding = pipeline._encode_image(Image.open(io.BytesIO(one.image or b"")), "cpu", 1, True)
    noised = picture + 1e-5 * torch.randn(picture.shape, generator=generator)
    known = pipeline.vae.encode(noised).latent_dist.mode()
    latents = torch.randn((1, clip.num_frames, 4, SIDE // 8, SIDE // 8), generator=generator)
    rho, steps = 7, one.num_inference_steps
    ramp = torch.linspace(0, 1, steps)
    sigmas = (700 ** (1 / rho) + ramp * (0.002 ** (1 / rho) - 700 ** (1 / rho))) ** rho
    latents = latents * (sigmas[0] ** 2 + 1) ** 0.5
    half = (clip.num_frames - 1) / 2
    scales = torch.tensor([1 + (1 - abs(i - half) / half) * 1.5 for i in range(clip.num_frames)])
    for sigma, following in itertools.pairwise([*sigmas.tolist(), 0.0]):
        scale = (sigma**2 + 1) ** 0.5
        inputs = torch.cat([latents / scale] * 2)
        beside = torch.stack([torch.zeros_like(known), known]).expand(-1, clip.num_frames, -1, -1, -1)
        told = torch.full((2, 1), 1e-5)
        timestep = torch.tensor(0.25 * np.log(sigma), dtype=torch.float32)
        negative, positive = pipeline.unet(
            torch.cat([inputs, beside], 2), timestep, embedding, told, return_dict=False
        )[0].chunk(2)
        velocity = negative + scales[None, :, None, None, None] * (positive - negative)
        clean = latents / scale**2 - velocity * sigma / scale
        latents = latents + (latents - clean) / sigma * (following - sigma)
    frames = pipeline.vae.decode(latents[0] / pipeline.vae.config.scaling_factor).sample
    return Outcome(latents, (frames / 2 + 0.5).clamp(0, 1))


def test_sv3d_equals_its_loop_written_out(check: Check) -> None:
    model = loaded("sv3d-u")
    jobs = [job("sv3d-u"), job("sv3d-u", num_inference_steps=6), job("sv3d-u", clip={"num_frames": 9})]
    expected = [by_hand(model.pipeline, one) for one in jobs]
    for one, ours, theirs in zip(jobs, batched({"sv3d-u": model}, jobs), expected, strict=True):
        check("sv3d-u", one.task, one.scheduler, difference(ours, theirs))


def test_sv3d_s_guidance_is_least_in_front_and_most_behind() -> None:
    scales = loaded("sv3d-u").guidance(job("sv3d-u", clip={"num_frames": 21}))
    assert scales.tolist() == pytest.approx([1 + 0.15 * min(i, 20 - i) for i in range(21)])


def test_an_orbit_ends_with_the_picture_itself() -> None:
    model, one = loaded("sv3d-u"), job("sv3d-u", output_format="zip")
    finished = model.finish(torch.zeros(5, 3, SIDE, SIDE), one, {})
    import zipfile

    with zipfile.ZipFile(io.BytesIO(finished.file.content)) as archive:
        first, *_, last = (Image.open(io.BytesIO(archive.read(name))) for name in archive.namelist())
        assert first.getextrema() == ((0, 0),) * 3
        assert np.array_equal(np.asarray(last), np.asarray(Image.open(io.BytesIO(one.image or b""))))


@pytest.mark.parametrize("model", PIPELINES)
def test_float16_stays_near_float32(model: str) -> None:
    """As on an accelerator: all in float16 but the autoencoders of the two that would overflow."""
    jobs = [job(model), job(model, num_inference_steps=6)]
    expected = batched({model: loaded(model)}, jobs)
    pipeline = PIPELINES[model]()
    parts = {"svd": ("unet", "image_encoder"), "animatediff": ("unet", "text_encoder", "vae")}
    for name in parts.get(model, parts["svd"]):
        getattr(pipeline, name).half()
    half = video.wrap(pipeline, CATALOG.model(model))
    for ours, theirs in zip(batched({model: half}, jobs), expected, strict=True):
        assert ours.latents.dtype == torch.float16
        assert difference(ours, theirs).latents < 0.02


@pytest.mark.parametrize("model", PIPELINES)
def test_a_clip_s_preview_is_a_small_picture(model: str) -> None:
    shown: list[torch.Tensor] = []
    batcher, ticket = StepBatcher(), Ticket(preview_every=1, on_preview=shown.append)
    batcher.submit(loaded(model).prepare(job(model)), ticket)
    ticket.decoded.result(60)
    batcher.close()
    assert len(shown) == 3
    for picture in shown:
        assert picture.shape == (3, SIDE // 8, SIDE // 8)
        assert 0 <= float(picture.min()) <= float(picture.max()) <= 1


@pytest.mark.parametrize("model", PIPELINES)
def test_a_finished_clip_is_a_file_with_a_thumbnail_and_a_spritesheet(model: str) -> None:
    wrapped, one = loaded(model), job(model)
    (outcome,) = batched({model: wrapped}, [one])
    finished = wrapped.finish(outcome.picture, one, {})
    assert finished.file.content_type == "video/mp4"
    kinds = {name: variant.content_type for name, variant in finished.variants.items()}
    assert kinds == {"thumbnail": "image/webp", "spritesheet": "image/jpeg"}


def test_the_catalog_s_schedulers_are_those_of_the_stock_pipelines() -> None:
    for name in PIPELINES:
        choice = resolve_scheduler(CATALOG.model(name).defaults.scheduler)
        assert choice.scheduler == type(loaded(name).pipeline.scheduler).__name__
