"""The service with a leak planted in its gateway, which the gauge must find. Never served but by a soak."""

from __future__ import annotations

import os
from collections.abc import Sequence

from jubako.job import Job
from jubako.services.families import Families
from service import Gateway

__all__ = ["Gateway"]

BYTES = int(os.environ.get("SOAK_LEAK", "4096"))

_kept: list[bytes] = []
_sound = Families.require_room


def _leaking(families: Families, jobs: Sequence[Job]) -> float | None:
    _kept.append(os.urandom(BYTES))
    return _sound(families, jobs)


Families.require_room = _leaking  # type: ignore[assignment, method-assign] # the fault that is planted
