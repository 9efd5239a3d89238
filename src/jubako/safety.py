"""The safety check: what is drawn is looked at once, before there is a file of it, whichever family drew it.

A checker is anything with one method, :class:`Checker`. What is done about what it flags is the
:class:`Screen`'s. A checker that is asked for and can't be had keeps its family from starting.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Literal, Protocol

import torch
from PIL import Image
from torch.nn import functional

from jubako.catalog import Family, load_catalog
from jubako.errors import ContentRefused, JubakoError, nearest
from jubako.settings import Settings, SettingsError
from jubako.weights.safety_checker import load_safety_checker

__all__ = ["Checker", "Screen", "screen_for"]

# What is left of a blurred picture along each side.
PATCHES = 8


class Checker(Protocol):
    """Looks at pictures. Called from several threads; one that raises fails the job that it looked at."""

    def flags(self, pictures: Sequence[Image.Image]) -> Sequence[bool]:
        """Of each picture, in RGB, whether it should not be shown."""
        ...


class Screen:
    """What lies between a decoder and the files."""

    def __init__(self, checker: Checker, mode: Literal["flag", "blur", "refuse"], every: int) -> None:
        """``every``: of so many frames of a clip one is looked at, and the last one."""
        self._checker = checker
        self._mode = mode
        self._every = every

    @property
    def hides(self) -> bool:
        """Whether what is flagged must not be seen, as it is, on its way either."""
        return self._mode != "flag"

    def screened(self, decoded: torch.Tensor) -> tuple[torch.Tensor, bool | None]:
        """A picture [3, H, W] or a clip [frames, 3, H, W] with values from 0 to 1 as it may be shown, and
        whether it was flagged; None of an object's latents, at which nobody looks. ContentRefused where it
        is flagged and that is refused.
        """
        if decoded.ndim < 3:
            return decoded, None
        frames = decoded[None] if decoded.ndim == 3 else decoded
        looked_at = sorted({*range(0, len(frames), self._every), len(frames) - 1})
        pictures = [_image(frames[number]) for number in looked_at]
        flags = self._checker.flags(pictures)
        if len(flags) != len(pictures):
            raise ValueError(f"the safety checker said {len(flags)} things of {len(pictures)} pictures")
        if not any(flags):
            return decoded, False
        if self._mode == "refuse":
            raise ContentRefused(
                "the safety checker flagged what was drawn, which is not given out here; another prompt or "
                "another seed may do"
            )
        return _blurred(decoded) if self._mode == "blur" else decoded, True


def screen_for(family: Family, settings: Settings, device: torch.device) -> Screen | None:
    """What the settings ask for; SettingsError when it can't be had. None for a family of objects."""
    draws = any(model.defaults.solid is None for model in family.models.values())
    if settings.safety == "off" or not draws:
        return None
    try:
        checker = _checker(settings, device)
    except JubakoError as error:
        raise SettingsError(f"JUBAKO_SAFETY={settings.safety}: {error}") from error
    return Screen(checker, settings.safety, settings.safety_frames)


def _checker(settings: Settings, device: torch.device) -> Checker:
    name = settings.safety_checker
    module, colon, attribute = name.partition(":")
    if colon:
        try:
            checker: Checker = getattr(import_module(module), attribute)()
        except Exception as error:
            raise SettingsError(f"JUBAKO_SAFETY_CHECKER={name}: {type(error).__name__}: {error}") from error
        return checker
    checkers = load_catalog(settings.catalog).checkers
    if name not in checkers:
        raise SettingsError(
            f"JUBAKO_SAFETY_CHECKER: the catalog has no checker {name!r}.{nearest(name, checkers)} Known: "
            f"{', '.join(checkers)}; or one of your own, as module:function"
        )
    return load_safety_checker(checkers[name], settings.home, device)


def _image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray((picture.float() * 255).round().byte().movedim(0, -1).cpu().numpy())


def _blurred(decoded: torch.Tensor) -> torch.Tensor:
    """The same in so few patches that nothing can be made out or made again."""
    pictures = (decoded[None] if decoded.ndim == 3 else decoded).float()
    patches = functional.adaptive_avg_pool2d(pictures, PATCHES)
    blurred = functional.interpolate(patches, decoded.shape[-2:], mode="bilinear")
    return blurred.reshape(decoded.shape).to(decoded)
