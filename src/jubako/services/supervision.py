"""How soon a worker that died is started again by ``bentoml serve``, outside of containers."""

from __future__ import annotations

from typing import Any

__all__ = ["watch_workers_closely"]

LOOK_SECONDS = 0.25


def watch_workers_closely() -> None:
    """Have BentoML's process manager look four times a second whether a worker has died.

    By itself it looks every ten seconds, and BentoML has no setting for it. This changes the arbiter's class,
    in the one process that makes an arbiter.
    """
    from bentoml._internal.utils.circus import Arbiter

    original = Arbiter.__init__
    if getattr(original, "watches_closely", False):
        return

    def closely(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **{**options, "check_delay": LOOK_SECONDS})

    closely.watches_closely = True  # type: ignore[attr-defined] # so that twice is as good as once
    Arbiter.__init__ = closely
