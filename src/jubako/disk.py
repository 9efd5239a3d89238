"""Disks that are full: told as such, with the setting of the folder on them."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from jubako.errors import DiskFull

__all__ = ["is_full", "no_room", "room_in"]

_FULL = {errno.ENOSPC, errno.EDQUOT}
# safetensors and shutil.copytree have words for it only.
_TOLD = re.compile(rf"(os error |Errno )({errno.ENOSPC}|{errno.EDQUOT})\b")


def is_full(error: BaseException) -> bool:
    """Whether something could not be written for want of room."""
    return getattr(error, "errno", None) in _FULL or _TOLD.search(str(error)) is not None


@contextmanager
def room_in(setting: str) -> Iterator[None]:
    """Within, what finds no room on the disk of this setting's folder is DiskFull."""
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        raise no_room(setting) from error


def no_room(setting: str) -> DiskFull:
    """The error in words."""
    return DiskFull(f"the disk of {setting} is full; make room on it, or set {setting} to another disk")
