"""The shipped miniatures `tiny-sdxl` and `tiny-sdxl-lightning`: parts, pictures, micro-conditioning."""

from __future__ import annotations

import filecmp
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from jubako.miniatures import tiny_sdxl, tiny_sdxl_lightning
from jubako.miniatures.evaluation import Judged, evaluate, prompts
from jubako.miniatures.export import load
from jubako.miniatures.reader import Reading, read, shows
from jubako.miniatures.recipe import Defaults

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"
TEACHER, STUDENT = EMBEDDED / "tiny-sdxl", EMBEDDED / "tiny-sdxl-lightning"
CAPTION = "a large red square in the center of a white background"


@pytest.fixture(scope="module")
def teacher() -> StableDiffusionXLPipeline:
    return load(TEACHER)


@pytest.fixture(scope="module")
def student() -> StableDiffusionXLPipeline:
    return load(STUDENT)


def wrong(pipeline: StableDiffusionXLPipeline, count: int, objects: int, defaults: Defaults) -> list[Judged]:
    asked = prompts(count, objects, seed=11)
    judged = evaluate(pipeline, asked, steps=defaults.steps, guidance=defaults.guidance, seed=11)
    return [one for one in judged if not one.verdict.ok]


def drawn(pipeline: StableDiffusionXLPipeline, **numbers: Any) -> Any:
    return pipeline(
        CAPTION,
        num_inference_steps=tiny_sdxl.DEFAULTS.steps,
        guidance_scale=tiny_sdxl.DEFAULTS.guidance,
        generator=torch.Generator().manual_seed(0),
        **numbers,
    ).images[0]


def centre(reading: Reading) -> tuple[float, float]:
    (seen,) = reading.objects
    return seen.x, seen.y


def test_parts_are_those_of_sdxl(teacher: StableDiffusionXLPipeline) -> None:
    assert isinstance(teacher, StableDiffusionXLPipeline)
    assert isinstance(teacher.text_encoder, CLIPTextModel)
    assert isinstance(teacher.text_encoder_2, CLIPTextModelWithProjection)
    assert isinstance(teacher.scheduler, EulerDiscreteScheduler)
    assert teacher.config.force_zeros_for_empty_prompt
    assert teacher.unet.config.addition_embed_type == "text_time"
    widths = teacher.text_encoder.config.hidden_size + teacher.text_encoder_2.config.hidden_size
    assert teacher.unet.config.cross_attention_dim == widths


@pytest.mark.parametrize("objects", [1, 2])
def test_pictures_show_what_was_asked(teacher: StableDiffusionXLPipeline, objects: int) -> None:
    misses = wrong(teacher, 20, objects, tiny_sdxl.DEFAULTS)
    assert len(misses) <= 4, [(one.scene.caption(), one.verdict.misses) for one in misses]


@pytest.mark.parametrize("objects", [1, 2])
def test_four_steps_of_the_student_show_what_was_asked(
    student: StableDiffusionXLPipeline, objects: int
) -> None:
    assert Defaults(steps=4, guidance=0.0) == tiny_sdxl_lightning.DEFAULTS
    misses = wrong(student, 20, objects, tiny_sdxl_lightning.DEFAULTS)
    assert len(misses) <= 5, [(one.scene.caption(), one.verdict.misses) for one in misses]


def test_student_shares_all_but_the_unet_with_its_teacher() -> None:
    for part in tiny_sdxl_lightning.SHARED:
        names = sorted(path.name for path in (TEACHER / part).iterdir())
        assert names == sorted(path.name for path in (STUDENT / part).iterdir())
        assert filecmp.cmpfiles(TEACHER / part, STUDENT / part, names, shallow=False)[0] == names
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert not filecmp.cmp(TEACHER / weights, STUDENT / weights, shallow=False)


@pytest.mark.parametrize(("top", "left"), [(0, 10), (10, 0)])
def test_crop_moves_the_object_by_its_offset(teacher: StableDiffusionXLPipeline, top: int, left: int) -> None:
    x, y = centre(read(drawn(teacher)))
    cropped_x, cropped_y = centre(read(drawn(teacher, crops_coords_top_left=(top, left))))
    assert x - cropped_x == pytest.approx(left / 64, abs=0.05)
    assert y - cropped_y == pytest.approx(top / 64, abs=0.05)


def test_small_original_size_leaves_the_picture_right(teacher: StableDiffusionXLPipeline) -> None:
    assert shows(drawn(teacher, original_size=(16, 16)), CAPTION).ok
