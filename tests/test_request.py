"""What a request takes, by which names, and what it refuses."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from pydantic import ValidationError

from jubako.errors import JubakoError, refusal
from jubako.request import MAX_FILE_BYTES, ImageToImage, TextToImage


def refused(fields: dict[str, Any], request: type[TextToImage] = TextToImage) -> JubakoError:
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
        ({"prompt": "x", "refiner": 1.5}, "refiner", "a share of the steps between 0 and 1"),
        ({"prompt": "x", "refiner": "no way"}, "refiner", "take true, false or"),
        ({"prompt": "x", "original_size": [512]}, "original_size", "at least 2 items"),
        ({"prompt": "x", "crop": [0, -8]}, "crop.1", "greater than or equal to 0"),
        ({"prompt": "x", "skip_layer_guidance": "much"}, "skip_layer_guidance", "an object of layers"),
        (
            {"prompt": "x", "skip_layer_guidance": {"layers": [7], "scal": 3}},
            "skip_layer_guidance.scal",
            "unknown field 'scal'. Did you mean 'scale'?",
        ),
        (
            {"prompt": "x", "steps": 3, "num_inference_steps": 4},
            "steps",
            "is another name of num_inference_steps",
        ),
    ],
)
def test_a_bad_value_names_its_field_and_the_choices(fields: Any, param: str, message: str) -> None:
    error = refused(fields)
    assert error.param == param
    assert message in error.message


def test_jpg_means_jpeg() -> None:
    assert TextToImage.model_validate({"prompt": "x", "output_format": "jpg"}).output_format == "jpeg"


def test_a_request_can_not_be_changed() -> None:
    request = TextToImage(prompt="x")
    with pytest.raises(ValidationError, match="frozen"):
        request.prompt = "y"  # type: ignore[misc] # that it is refused is the point


ADDRESSES = ["http://localhost/x.png", "https://localhost/x.png", "file:///etc/passwd", "ftp://localhost/x"]


@pytest.mark.parametrize("sent", [b"abc", "YWJj", "YW\nJj", "data:image/png;base64,YWJj"])
def test_a_picture_comes_as_bytes_base64_or_a_data_url(sent: object) -> None:
    assert ImageToImage.model_validate({"prompt": "x", "image": sent}).image == b"abc"


@pytest.mark.parametrize("address", ADDRESSES)
def test_an_address_is_refused_and_not_fetched(address: str) -> None:
    error = refused({"prompt": "x", "image": address}, ImageToImage)
    assert error.message.startswith("image: addresses are not fetched; send the picture as an upload")


@pytest.mark.parametrize(
    ("sent", "told"), [("ä", "not base64"), ("abc", "not base64"), ("", "at least 1"), (7, "")]
)
def test_what_is_no_picture_s_file_is_refused(sent: object, told: str) -> None:
    error = refused({"prompt": "x", "image": sent}, ImageToImage)
    assert error.param == "image"
    assert told in error.message


def test_a_file_past_the_limit_is_too_large_in_base64_too() -> None:
    large = bytes(MAX_FILE_BYTES + 1)
    for sent in (large, base64.b64encode(large).decode()):
        error = refused({"prompt": "x", "image": sent}, ImageToImage)
        assert (error.status, error.param) == (413, "image")
        assert error.message == "image: a file of more than 50 MB is not taken"
    assert ImageToImage.model_validate({"prompt": "x", "image": large[:-1]})


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_is_a_share(strength: float) -> None:
    assert refused({"prompt": "x", "image": b"x", "strength": strength}, ImageToImage).param == "strength"
