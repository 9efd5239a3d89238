"""Sizes: what is asked is legal or refused, and what a picture is brought to is always legal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jubako.catalog import Model, load_catalog
from jubako.errors import InvalidRequest
from jubako.request import ResizeMode
from jubako.sizes import fitted_size, legal_size

CATALOG = load_catalog()
TINY, SD15 = CATALOG.model("tiny-sd"), CATALOG.model("sd1.5")

MODELS = st.sampled_from(list(CATALOG))
SIDES = st.integers(1, 20_000)
MODES = st.sampled_from(["cover", "fit", "exact"])


def is_legal(size: tuple[int, int], model: Model) -> bool:
    limits = model.limits
    return (
        all(limits.min_side <= side <= limits.max_side and side % limits.multiple_of == 0 for side in size)
        and size[0] * size[1] <= limits.max_pixels
    )


@given(model=MODELS, picture=st.tuples(SIDES, SIDES), mode=MODES)
def test_a_picture_without_a_size_asked_for_always_gets_a_legal_one(
    model: Model, picture: tuple[int, int], mode: ResizeMode
) -> None:
    size = fitted_size(picture, None, None, mode, model)
    assert is_legal(size, model), size


@given(
    model=MODELS,
    picture=st.tuples(SIDES, SIDES),
    width=st.none() | st.integers(1, 3000),
    height=st.none() | st.integers(1, 3000),
    mode=MODES,
)
def test_a_size_asked_for_is_brought_to_a_legal_one_or_refused(
    model: Model, picture: tuple[int, int], width: int | None, height: int | None, mode: ResizeMode
) -> None:
    try:
        size = fitted_size(picture, width, height, mode, model)
    except InvalidRequest as error:
        assert error.param in {"width", "height"}
        return
    assert is_legal(size, model), size
    if mode != "fit" or width is None or height is None:
        assert width in {None, size[0]}
        assert height in {None, size[1]}


@given(model=MODELS, seed=st.integers(0, 10_000))
def test_a_picture_of_a_legal_size_keeps_it(model: Model, seed: int) -> None:
    limits = model.limits
    sides = range(-(-limits.min_side // limits.multiple_of), limits.max_side // limits.multiple_of + 1)
    size = (
        sides[seed % len(sides)] * limits.multiple_of,
        sides[seed // len(sides) % len(sides)] * limits.multiple_of,
    )
    if size[0] * size[1] <= limits.max_pixels:
        assert fitted_size(size, None, None, "cover", model) == size


@pytest.mark.parametrize(
    ("picture", "width", "height", "mode", "expected"),
    [
        ((64, 64), None, None, "cover", (64, 64)),
        ((1000, 500), None, None, "cover", (128, 64)),
        ((500, 1000), None, None, "fit", (64, 128)),
        ((10, 10), None, None, "cover", (32, 32)),
        ((100, 70), None, None, "cover", (96, 64)),
        ((100, 50), 64, None, "cover", (64, 32)),
        ((100, 50), None, 64, "cover", (128, 64)),
        ((100, 50), 64, 64, "cover", (64, 64)),
        ((100, 50), 64, 64, "exact", (64, 64)),
        ((100, 50), 128, 128, "fit", (128, 64)),
        ((50, 100), 128, 128, "fit", (64, 128)),
    ],
)
def test_the_resize_modes_by_example(
    picture: tuple[int, int],
    width: int | None,
    height: int | None,
    mode: ResizeMode,
    expected: tuple[int, int],
) -> None:
    assert fitted_size(picture, width, height, mode, TINY) == expected


def test_a_photograph_is_scaled_into_the_pixels_that_a_model_draws() -> None:
    width, height = fitted_size((4000, 3000), None, None, "cover", SD15)
    assert is_legal((width, height), SD15)
    assert width * height > 0.95 * SD15.limits.max_pixels
    assert abs(width / height - 4 / 3) < 0.02


def test_an_illegal_side_names_the_nearest_legal_ones() -> None:
    with pytest.raises(InvalidRequest, match="the nearest legal are 64 and 72"):
        legal_size(65, None, TINY)
