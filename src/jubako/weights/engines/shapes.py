"""Which shapes an engine is built for: a profile in pixels gives the free dims of a graph's inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

from jubako.errors import UnusableWeights
from jubako.weight_sets import Profile
from jubako.weights.engines.key import ShapeRange

__all__ = ["profile_shapes"]

# What vendors call the input that is a picture or its latents; conditioning never has four dims.
_PICTURES = frozenset({"sample", "hidden_states", "latent", "latent_sample", "images"})
_ROLES: Mapping[int, tuple[str, ...]] = {
    4: ("rows", "channels", "height", "width"),
    5: ("rows", "frames", "channels", "height", "width"),
}

# SD3's ControlNet gives one residual a layer, in tokens: squares of the transformer's patch size.
_RESIDUALS = "block_controlnet_hidden_states"
_RESIDUAL_ROLES = ("layers", "rows", "tokens", "channels")
_PATCH = 2

_NOTHING: Mapping[str, int] = MappingProxyType({})


class _Extent(NamedTuple):
    rows: int
    height: int
    width: int

    def numbers(self) -> Mapping[str, int]:
        return {**self._asdict(), "tokens": (self.height // _PATCH) * (self.width // _PATCH)}


def profile_shapes(
    inputs: Mapping[str, Sequence[int | str]],
    profile: Profile,
    *,
    size: tuple[int, int],
    rows: int = 2,
    latent_factor: int = 8,
    fixed: Mapping[str, int] = _NOTHING,
) -> dict[str, ShapeRange]:
    """The range of shapes of each input that has free dims, in the graph's order.

    ``inputs`` maps the graph's names to dims, where a word is a free one. ``size`` is (width, height) in
    pixels and ``rows`` the number of rows that the engine is to be fastest at. ``latent_factor`` is how many
    pixels a latent has along a side; 1 for a graph that takes pictures. ``fixed`` gives other free dims by
    their word, or by what they are: frames, channels, layers. UnusableWeights names a dim that nothing
    tells.
    """
    extents = [
        _Extent(count, height // latent_factor, width // latent_factor)
        for count, (width, height) in zip(
            (profile.rows[0], profile.padded(rows), profile.rows[-1]), _sizes(profile, size), strict=True
        )
    ]
    return {
        name: ShapeRange(*(_shape(name, dims, extent.numbers(), fixed) for extent in extents))
        for name, dims in inputs.items()
        if any(isinstance(dim, str) for dim in dims)
    }


def _sizes(profile: Profile, size: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """The least size, the one to be fast at and the largest, as (width, height) in pixels."""
    if profile.sizes:
        widths, heights = zip(*profile.sizes, strict=True)
        best = size if size in profile.sizes else profile.sizes[0]
        return (min(widths), min(heights)), best, (max(widths), max(heights))
    least, most = profile.min_side, profile.max_side
    width, height = (min(max(side, least), most) for side in size)
    return (least, least), (width, height), (most, most)


def _shape(
    name: str, dims: Sequence[int | str], extent: Mapping[str, int], fixed: Mapping[str, int]
) -> tuple[int, ...]:
    lengths = []
    for dim, role in zip(dims, _roles(name, len(dims)), strict=True):
        length = dim if isinstance(dim, int) else fixed.get(dim, extent.get(role, fixed.get(role)))
        if length is None:
            raise UnusableWeights(
                f"no engine can be built: nothing tells the length of dim {dim!r} of the graph's input {name}"
            )
        lengths.append(length)
    return tuple(lengths)


def _roles(name: str, rank: int) -> tuple[str, ...]:
    """What each dim is; all but pictures and residuals have rows and then what the graph says."""
    if name in _PICTURES and rank in _ROLES:
        return _ROLES[rank]
    if name == _RESIDUALS and rank == len(_RESIDUAL_ROLES):
        return _RESIDUAL_ROLES
    return ("rows", *("",) * (rank - 1))[:rank]
