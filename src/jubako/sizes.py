"""Sizes of pictures, in pixels: what a model can draw, and what a picture of another size is brought to."""

from __future__ import annotations

import math

from jubako.catalog import Limits, Model
from jubako.errors import InvalidRequest
from jubako.request import ResizeMode

__all__ = ["fitted_size", "legal_size"]


def legal_size(width: int | None, height: int | None, model: Model) -> tuple[int, int]:
    """The size asked for, the model's own where unset; InvalidRequest names the nearest legal ones."""
    width = _side("width", width or model.defaults.width, model)
    height = _side("height", height or model.defaults.height, model)
    limit = model.limits.max_pixels
    if width * height > limit:
        raise InvalidRequest(
            f"width: {width}x{height} is past the limit of {limit} pixels of {model.name}", param="width"
        )
    return width, height


def fitted_size(
    picture: tuple[int, int], width: int | None, height: int | None, mode: ResizeMode, model: Model
) -> tuple[int, int]:
    """The size that a picture is brought to.

    Without a size asked for: the picture's own, scaled into the model's limits. A side that is not asked for
    follows the other one. ``fit`` shrinks the size asked for to the picture's proportions.
    """
    own_width, own_height = picture
    if width is None and height is None:
        return _rounded(picture, _scale_into_limits(picture, model.limits), model.limits)
    if width is not None and height is not None:
        asked = legal_size(width, height, model)
        if mode != "fit":
            return asked
        return _rounded(picture, min(asked[0] / own_width, asked[1] / own_height), model.limits)
    if width is not None:
        return legal_size(width, _follow(width * own_height / own_width, model.limits), model)
    assert height is not None  # noqa: S101 # the case of neither is above
    return legal_size(_follow(height * own_width / own_height, model.limits), height, model)


def _follow(side: float, limits: Limits) -> int:
    step = limits.multiple_of
    return min(max(round(side / step) * step, _least(limits)), _most(limits))


def _scale_into_limits(picture: tuple[int, int], limits: Limits) -> float:
    width, height = picture
    most = min(limits.max_side / max(picture), math.sqrt(limits.max_pixels / (width * height)))
    least = limits.min_side / min(picture)
    return min(max(1.0, least), most)


def _rounded(picture: tuple[int, int], scale: float, limits: Limits) -> tuple[int, int]:
    """The picture's size at this scale, each side rounded down to a legal one."""
    step = limits.multiple_of
    # A hair more than exact, so that 512.0000 in floating point does not become 504.
    sides = [int(side * scale * (1 + 1e-9)) // step * step for side in picture]
    return max(sides[0], _least(limits)), max(sides[1], _least(limits))


def _least(limits: Limits) -> int:
    return -(-limits.min_side // limits.multiple_of) * limits.multiple_of


def _most(limits: Limits) -> int:
    return limits.max_side // limits.multiple_of * limits.multiple_of


def _side(field: str, value: int, model: Model) -> int:
    limits = model.limits
    if not limits.min_side <= value <= limits.max_side:
        raise InvalidRequest(
            f"{field}: {value} is outside of {limits.min_side} to {limits.max_side} of {model.name}",
            param=field,
        )
    if value % limits.multiple_of:
        below = value - value % limits.multiple_of
        nearest_legal = [
            side for side in (below, below + limits.multiple_of) if limits.min_side <= side <= limits.max_side
        ]
        raise InvalidRequest(
            f"{field}: {value} is not a multiple of {limits.multiple_of}; the nearest legal are "
            f"{' and '.join(map(str, nearest_legal))}",
            param=field,
        )
    return value
