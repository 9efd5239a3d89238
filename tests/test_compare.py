"""Comparisons are planned whole; the first cell that is not legal is refused by model and field."""

from __future__ import annotations

import io
from typing import Any

import pytest
from PIL import Image
from pydantic import ValidationError

from jubako.catalog import load_catalog
from jubako.compare import Cell, Comparison, plan_comparison
from jubako.errors import InvalidRequest, JubakoError, refusal

CATALOG = load_catalog()


def picture() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, "PNG")
    return buffer.getvalue()


def compared(**fields: Any) -> list[list[Cell]]:
    try:
        request = Comparison.model_validate({"prompt": "a red circle", "models": ["tiny-sd"], **fields})
    except ValidationError as error:
        raise refusal(error.errors()) from error
    return plan_comparison(request, CATALOG)


def test_rows_are_models_columns_are_values_and_the_seed_is_one() -> None:
    rows = compared(models=["tiny-sd", "sd1.5"], axis={"field": "num_inference_steps", "values": [4, 8, 20]})
    assert [[(cell.model, cell.value) for cell in row] for row in rows] == [
        [("tiny-sd", 4), ("tiny-sd", 8), ("tiny-sd", 20)],
        [("sd1.5", 4), ("sd1.5", 8), ("sd1.5", 20)],
    ]
    jobs = [cell.job for row in rows for cell in row]
    assert [job.num_inference_steps for job in jobs] == [4, 8, 20] * 2
    assert len({job.seed for job in jobs}) == 1
    assert len({job.id for job in jobs}) == 6
    assert [job.width for job in jobs] == [64] * 3 + [512] * 3


def test_without_an_axis_each_model_makes_one_picture() -> None:
    rows = compared(models=["tiny-sd", "sd-turbo"], seed=7)
    assert [(row[0].model, row[0].value, row[0].job.seed) for row in rows] == [
        ("tiny-sd", None, 7),
        ("sd-turbo", None, 7),
    ]


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ({"field": "steps", "values": "4, 8"}, [4, 8]),
        ({"field": "cfg_scale", "values": ["1", 2.5]}, [1.0, 2.5]),
        ({"field": "sampler", "values": ["Euler a", "DDIM"]}, ["Euler a", "DDIM"]),
    ],
)
def test_other_names_of_fields_and_values_as_text_are_taken(axis: Any, values: list[Any]) -> None:
    assert [cell.value for cell in compared(axis=axis)[0]] == values


def test_a_picture_makes_it_img2img_and_a_mask_inpainting() -> None:
    axis = {"field": "strength", "values": [0.3, 0.9]}
    (row,) = compared(image=picture(), axis=axis)
    assert [(cell.job.task, cell.job.strength) for cell in row] == [("img2img", 0.3), ("img2img", 0.9)]
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 32))
    buffer = io.BytesIO()
    mask.save(buffer, "PNG")
    assert compared(image=picture(), mask=buffer.getvalue())[0][0].job.task == "inpaint"


def test_a_comparison_has_32_pictures_at_most() -> None:
    models = ["tiny-sd", "sd1.4", "sd1.5", "sd2"]
    assert sum(map(len, compared(models=models, axis={"field": "steps", "values": [*range(1, 9)]}))) == 32
    with pytest.raises(InvalidRequest, match="5 models and 8 values are 40 pictures; at most 32"):
        compared(models=[*models, "sd2.1"], axis={"field": "steps", "values": [*range(1, 9)]})


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"models": []}, "models", "at least 1"),
        ({"models": ["tiny-sd"] * 9}, "models", "at most 8"),
        ({"models": ["tiny-sd", "tiny-sd"]}, "models", "named twice"),
        ({"models": ["tiny-sd", "nope"]}, "model", "unknown model 'nope'"),
        ({"model": "tiny-sd"}, "model", "name the models in models"),
        (
            {"axis": {"field": "width", "values": [1]}},
            "axis.field",
            "'num_inference_steps', 'guidance_scale'",
        ),
        ({"axis": {"field": "steps"}}, "axis.values", "required"),
        ({"axis": {"field": "steps", "values": []}}, "axis.values", "at least 1"),
        ({"axis": {"field": "steps", "values": [*range(1, 10)]}}, "axis.values", "at most 8"),
        ({"axis": {"field": "steps", "values": [4, 4]}}, "axis.values", "named twice"),
        ({"axis": {"field": "steps", "values": [4]}, "steps": 5}, "num_inference_steps", "it is the axis"),
        ({"axis": {"field": "strength", "values": [0.5]}}, "axis.field", "needs an image"),
        ({"strength": 0.5}, "strength", "there is no image"),
        ({"mask": b"x"}, "mask", "there is no image"),
        (
            {"axis": {"field": "steps", "values": [4, 1000]}},
            "num_inference_steps",
            "tiny-sd at num_inference_steps 1000: num_inference_steps: tiny-sd takes 1 to 150 steps",
        ),
        (
            {"axis": {"field": "steps", "values": ["many"]}},
            "num_inference_steps",
            "tiny-sd at num_inference_steps many: num_inference_steps: Input should be a valid integer",
        ),
        (
            {"axis": {"field": "scheduler", "values": ["Euler", "Eular"]}},
            "scheduler",
            "tiny-sd at scheduler Eular: scheduler: unknown scheduler 'Eular'. Did you mean 'Euler'",
        ),
        (
            {"models": ["tiny-sd", "sd-turbo"], "axis": {"field": "guidance_scale", "values": [1, 2]}},
            "guidance_scale",
            "sd-turbo at guidance_scale 1: guidance_scale: the model was made to run without guidance",
        ),
        (
            {"models": ["sdxl-lightning-4step"], "axis": {"field": "steps", "values": [4, 8]}},
            "num_inference_steps",
            "sdxl-lightning-4step at num_inference_steps 8: num_inference_steps: sdxl-lightning-4step takes",
        ),
        (
            {"models": ["tiny-sd", "sd1.5"], "width": 512},
            "width",
            "tiny-sd: width: 512 is outside of 32 to 128",
        ),
        (
            {"image": picture(), "axis": {"field": "strength", "values": [0.5, 0.001]}},
            "strength",
            "tiny-sd at strength 0.001: strength: 0.001 of 25 steps is less than one step",
        ),
    ],
)
def test_one_bad_cell_refuses_the_whole_comparison(fields: Any, param: str, message: str) -> None:
    with pytest.raises(JubakoError) as caught:
        compared(**fields)
    assert caught.value.param == param
    assert message in caught.value.message
