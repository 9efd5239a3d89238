"""Models whose files can't be made into them: remembered, and not tried again until a file changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from jubako.errors import UnusableWeights

__all__ = ["BrokenModels"]

_State = tuple[tuple[int, int] | None, ...]


@dataclass(frozen=True)
class _Broken:
    reason: str
    files: tuple[Path, ...]
    state: _State


class BrokenModels:
    """Why each of them is broken. One thread loads; any may ask."""

    def __init__(self) -> None:
        self._broken: dict[str, _Broken] = {}

    @contextmanager
    def watched(self, model: str, files: Sequence[Path]) -> Iterator[None]:
        """Within, these files are read for the model.

        UnusableWeights at once where that failed before and they are the same since. A disk that can't be
        read is no fault of the files, and is not remembered.
        """
        if reason := self.reasons().get(model):
            raise UnusableWeights(reason)
        state = _state(files)
        try:
            yield
        except UnusableWeights as error:
            cause = error.__cause__
            if not (isinstance(cause, OSError) and cause.errno is not None):
                self._broken[model] = _Broken(error.message, tuple(files), state)
            raise

    def reasons(self) -> Mapping[str, str]:
        """What is wrong with each model that is broken now."""
        for model, broken in list(self._broken.items()):
            if _state(broken.files) != broken.state:
                self._broken.pop(model, None)
        return {model: broken.reason for model, broken in self._broken.items()}


def _state(files: Sequence[Path]) -> _State:
    """Size and time of each file, as far as it is there."""
    found: list[tuple[int, int] | None] = []
    for file in files:
        try:
            status = file.stat()
        except OSError:
            found.append(None)
        else:
            found.append((status.st_size, status.st_mtime_ns))
    return tuple(found)
