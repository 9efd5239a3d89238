"""When a family imports torch: at once where there is a model to preload, else with its first job."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from jubako.catalog import Family, load_catalog
from jubako.errors import FamilyUnavailable
from jubako.residency import Residence, located
from jubako.settings import Settings, SettingsError
from jubako.weights.graphs.store import is_on_disk
from jubako.weights.selection import Choice

if TYPE_CHECKING:
    from jubako.runner import Runner

__all__ = ["Ignition"]

logger = logging.getLogger(__name__)


class Ignition:
    """The family's runner. The service answers, and takes jobs, while it is being started.

    Importing the libraries takes some seven seconds of a core and half a gigabyte, which a family that nobody
    asks for need not take.
    """

    def __init__(self, family: Family, settings: Settings) -> None:
        self._family, self._settings = family, settings
        self._preloaded = _to_preload(family, settings)
        self._starting: Future[Runner] | None = None
        self._lock = threading.Lock()
        if self._preloaded:
            self._start()

    async def runner(self) -> Runner:
        """The runner, as soon as it is there; FamilyUnavailable says which setting keeps it from starting."""
        try:
            return await asyncio.wrap_future(self._start())
        except SettingsError as error:
            raise FamilyUnavailable(str(error)) from error

    @property
    def started(self) -> Runner | None:
        """The runner, if it is there."""
        starting = self._starting
        return starting.result() if starting and starting.done() and not starting.exception() else None

    @property
    def ready(self) -> bool:
        """Whether all that is to be preloaded is in memory."""
        return not self._preloaded or (self.started is not None and self.started.preloaded)

    def states(self) -> dict[str, Residence]:
        """Where each model of the family is."""
        if self.started is not None:
            return self.started.states()
        awaited = dict.fromkeys(self._preloaded, Residence("loading", 0.0))
        return located(self._family.models, self._settings.home, awaited)

    def choices(self) -> Mapping[str, Choice]:
        """What each model that was loaded is served from."""
        return self.started.choices() if self.started is not None else {}

    def close(self) -> None:
        """Let running jobs end."""
        if self._starting is not None and not self._starting.exception():
            self._starting.result().close()

    def _start(self) -> Future[Runner]:
        with self._lock:
            if self._starting is None:
                threads = ThreadPoolExecutor(1, "start")
                self._starting = threads.submit(_started, self._family, self._settings, self._preloaded)
                threads.shutdown(wait=False)
            return self._starting


def _to_preload(family: Family, settings: Settings) -> tuple[str, ...]:
    """The models that the setting names, or the default one, where they are of this family and on disk."""
    default = load_catalog(settings.catalog).default_model(settings.default_model)
    models = family.models
    return tuple(
        name
        for name in settings.preload or (default.name,)
        if name in models and is_on_disk(settings.home, models[name], models)
    )


def _started(family: Family, settings: Settings, preloaded: tuple[str, ...]) -> Runner:
    # The libraries make half a million objects that stay: looking through them again and again costs a tenth
    # of the start. The runner looks once, and takes them for good.
    gc.disable()
    # Torch comes in here, in this family's own process, and nowhere above.
    from jubako.runner import Runner

    try:
        runner = Runner(family, settings)
    except SettingsError as error:
        logger.error("%s does not start: %s", family.service, error)  # noqa: TRY400 # the sentence says all
        raise
    finally:
        gc.enable()
    runner.preload(preloaded)
    return runner
