"""What a request takes, by which names, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from jubako.errors import InvalidRequest, refusal
from jubako.request import ImagesGenerate, TextToImage


def refused(fields: dict[str, Any], request: type[TextToImage] = TextToImage) -> InvalidRequest:
    with pytest.raises(ValidationError) as caught:
        request.model_validate(fields)
    return refusal(caught.value.errors())


def test_a_prompt_is_enough_and_the_rest_stays_unset() -> None:
    request = TextToImage.model_validate({"prompt": "a red circle"})
    unset = ("model", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed")
    assert [getattr(request, name) for name in unset] == [None] * len(unset)


@pytest.mark.parametrize(
    ("alias", "field", "value"),
    [
        ("steps", "num_inference_steps", 7),
        ("cfg_scale", "guidance_scale", 3.5),
        ("sampler", "scheduler", "Euler a"),
    ],
)
def test_other_programs_names_are_taken(alias: str, field: str, value: object) -> None:
    request = TextToImage.model_validate({"prompt": "x", alias: value})
    assert getattr(request, field) == value


def test_an_unknown_field_is_refused_by_name_with_the_nearest() -> None:
    error = refused({"prompt": "x", "stpes": 3})
    assert error.param == "stpes"
    assert "unknown field 'stpes'. Did you mean 'steps'? Known: prompt, model" in error.message


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({}, "prompt", "prompt: Field required"),
        ({"prompt": 3}, "prompt", "valid string"),
        ({"prompt": "x", "num_inference_steps": 0}, "num_inference_steps", "greater than 0"),
        ({"prompt": "x", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "x", "seed": 2**63}, "seed", "less than"),
        ({"prompt": "x", "guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"prompt": "x", "output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"prompt": "x", "width": "wide"}, "width", "valid integer"),
    ],
)
def test_a_bad_value_names_its_field_and_the_choices(fields: Any, param: str, message: str) -> None:
    error = refused(fields)
    assert error.param == param
    assert message in error.message


def test_jpg_means_jpeg() -> None:
    assert TextToImage.model_validate({"prompt": "x", "output_format": "jpg"}).output_format == "jpeg"


def test_openai_fields_without_a_meaning_here_are_named() -> None:
    request = ImagesGenerate.model_validate({"prompt": "x", "quality": "hd", "style": "vivid", "user": "me"})
    assert request.ignored() == ["quality is ignored", "style is ignored"]
    assert ImagesGenerate.model_validate({"prompt": "x", "quality": "auto"}).ignored() == []


def test_a_request_can_not_be_changed() -> None:
    request = TextToImage(prompt="x")
    with pytest.raises(ValidationError, match="frozen"):
        request.prompt = "y"  # type: ignore[misc] # that it is refused is the point
