"""Which models are in memory: loaded on demand, kept while there is room, evicted when another needs it.

Whoever uses models holds a lease on them, and what is leased is never evicted. One thread loads and evicts,
one model at a time, in the order in which models were asked for. Where leased models take up the room that
the first in the queue needs, the least recently used of them get no new leases until they are free: a stream
of requests to models in memory can't keep another one out.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import MappingProxyType
from typing import Any, Generic, Literal, Protocol, TypeVar

from jubako.catalog import Model
from jubako.errors import Cancelled, FamilyUnavailable, OutOfMemory
from jubako.weights.graphs.store import is_on_disk

__all__ = ["Lease", "Loader", "Residence", "Residency", "located"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
R = TypeVar("R")


class Loader(Protocol[T_co]):
    """What brings models into memory. Only the residency's thread calls it."""

    @property
    def bytes(self) -> int:
        """What all loaded models take."""
        ...

    def needed(self, names: Sequence[str]) -> int:
        """About what loading them now would add to ``bytes``; raises when one can't be loaded."""
        ...

    def load(self, name: str, on_progress: Callable[[float], None]) -> T_co:
        """The model in memory, the fraction that is read told on the way."""
        ...

    def unload(self, name: str) -> None:
        """Give back its memory, but for what it shares with others. Nobody else may hold it."""
        ...

    def bytes_of(self, name: str) -> int:
        """What a loaded model takes, shared parts included."""
        ...

    def freed_by(self, name: str) -> int:
        """What unloading it would take from ``bytes``."""
        ...


@dataclass(frozen=True)
class Residence:
    """Where a model is. One that waits for its turn to be loaded is ``loading`` with a fraction of 0.

    The ``reason`` is that of one whose files are ``broken``.
    """

    state: Literal["missing", "on_disk", "broken", "loading", "resident"]
    loading_fraction: float | None = None
    bytes: int = 0
    reason: str | None = None


def located(
    models: Mapping[str, Model],
    home: Path,
    here: Mapping[str, Residence],
    broken: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Residence]:
    """Where each model of a family is, given those that are in memory or on their way, and those broken."""

    def elsewhere(name: str) -> Residence:
        if name in broken:
            return Residence("broken", reason=broken[name])
        return Residence("on_disk" if is_on_disk(home, models[name], models) else "missing")

    return {name: here.get(name) or elsewhere(name) for name in models}


class Lease(Generic[T]):
    """A claim on models, all at once; ``async with`` waits for them and gives them in their names' order."""

    def __init__(self, residency: Residency[T], names: tuple[str, ...]) -> None:
        self.names = names
        self.models: Future[tuple[T, ...]] = Future()
        # Marked as running, so that a waiter that goes away can't take the future with it.
        self.models.set_running_or_notify_cancel()
        self._residency = residency
        self._stage: Future[Any] | None = None

    async def __aenter__(self) -> tuple[T, ...]:
        """Wait for the models; being cancelled meanwhile ends the claim."""
        self._residency.ask(self)
        try:
            return await asyncio.wrap_future(self.models)
        except BaseException:
            self._residency.end(self)
            raise

    async def __aexit__(self, *_: object) -> None:
        """End the lease, or let it end with the stage that still runs on another thread."""
        if self._stage is None:
            self._residency.end(self)
        else:
            self._stage.add_done_callback(lambda _: self._residency.end(self))

    async def during(self, stage: Future[R]) -> R:
        """Wait for work with the models. If the waiter goes away, the lease lasts until the work is done."""
        self._stage = stage
        return await asyncio.wrap_future(stage)

    def withdraw(self) -> None:
        """Wait no longer: whoever does gets Cancelled. A lease that was granted stays."""
        if not self.models.done():
            self._residency.end(self)


@dataclass
class _Tray(Generic[T]):
    model: T
    bytes: int
    leases: int = 0


class Residency(Generic[T]):
    """Keeps models within a budget of bytes. Safe to call from any thread, on any number of event loops."""

    def __init__(self, loader: Loader[T], budget: int) -> None:
        self.budget = budget
        self._loader = loader
        self._changed = threading.Condition()
        # Under the lock: the trays from the least to the most recently used, and who waits, in order.
        self._trays: OrderedDict[str, _Tray[T]] = OrderedDict()
        self._queue: deque[Lease[T]] = deque()
        self._granted: set[Lease[T]] = set()
        self._draining: set[str] = set()
        self._fraction: dict[str, float] = {}
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="loader", daemon=True)
        self._thread.start()

    def use(self, *names: str) -> Lease[T]:
        """``async with residency.use(name) as (model,):`` keeps a model in memory until the block ends.

        Of several models none is held while another is waited for. Where the budget does not hold them all,
        they are loaded past it, alone.
        """
        return Lease(self, names)

    def preload(self, name: str) -> Future[None]:
        """Begin to load a model that nobody uses yet; what comes back tells when, but does not hold it."""
        lease, done = self.use(name), Future[None]()
        done.set_running_or_notify_cancel()

        def loaded(models: Future[tuple[T, ...]]) -> None:
            self.end(lease)
            if error := models.exception():
                done.set_exception(error)
            else:
                done.set_result(None)

        lease.models.add_done_callback(loaded)
        self.ask(lease)
        return done

    def states(self) -> dict[str, Residence]:
        """The models that are in memory, being loaded or waited for."""
        with self._changed:
            waiting = dict.fromkeys((name for lease in self._queue for name in lease.names), 0.0)
            loading = {
                name: Residence("loading", fraction) for name, fraction in (waiting | self._fraction).items()
            }
            resident = {name: Residence("resident", None, tray.bytes) for name, tray in self._trays.items()}
            return loading | resident

    def ask(self, lease: Lease[T]) -> None:
        """Put a lease in the queue, and grant it now if nothing stands in its way."""
        with self._changed:
            if lease.models.done():
                return
            if self._closed:
                lease.models.set_exception(_stopping())
                return
            self._queue.append(lease)
            self._grant()
            self._changed.notify_all()

    def end(self, lease: Lease[T]) -> None:
        """Take a lease back, or out of the queue; once is enough."""
        with self._changed:
            if lease in self._granted:
                self._granted.remove(lease)
                for name in lease.names:
                    self._trays[name].leases -= 1
                    self._trays.move_to_end(name)
            elif not lease.models.done():
                if lease in self._queue:
                    self._queue.remove(lease)
                lease.models.set_exception(Cancelled("the job was cancelled"))
            self._changed.notify_all()

    def close(self) -> None:
        """End the thread after the load that runs; whoever waits for a model gets FamilyUnavailable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _grant(self) -> None:
        """Under the lock: give leases to all in the queue whose models are here and not draining."""
        for lease in list(self._queue):
            if all(name in self._trays and name not in self._draining for name in lease.names):
                self._queue.remove(lease)
                self._granted.add(lease)
                for name in lease.names:
                    self._trays[name].leases += 1
                    self._trays.move_to_end(name)
                lease.models.set_result(tuple(self._trays[name].model for name in lease.names))

    def _settle(self) -> None:
        """Nothing has to drain any more."""
        with self._changed:
            self._draining.clear()
            self._grant()

    def _run(self) -> None:
        while (lease := self._first()) is not None:
            self._serve(lease)
            self._settle()
        with self._changed:
            for lease in self._queue:
                lease.models.set_exception(_stopping())
            self._queue.clear()

    def _first(self) -> Lease[T] | None:
        """Whose turn it is; None when the residency is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._queue or self._closed)
            return None if self._closed else self._queue[0]

    def _serve(self, lease: Lease[T]) -> None:
        """Load what a lease lacks, after room was made for it, until it is granted, failed or withdrawn."""
        while missing := self._missing(lease):
            try:
                excess = self._loader.bytes + self._loader.needed(missing) - self.budget
            except Exception as error:  # noqa: BLE001 # whoever waits gets it
                self._fail([lease], error)
                return
            if excess <= 0 or self._is_alone(lease):
                self._settle()
                self._load(missing[0], lease)
            elif not self._evict_idle(lease.names):
                self._drain(lease, excess)

    def _missing(self, lease: Lease[T]) -> list[str]:
        with self._changed:
            waits = lease in self._queue and not self._closed
            return [name for name in lease.names if name not in self._trays] if waits else []

    def _is_alone(self, lease: Lease[T]) -> bool:
        with self._changed:
            return all(name in lease.names for name in self._trays)

    def _load(self, name: str, lease: Lease[T]) -> None:
        started = perf_counter()
        try:
            model = self._read(name, lease)
        except Exception as error:  # noqa: BLE001 # whoever waits gets it, and the next who asks has it tried again
            self._fail([waiting for waiting in self._waiting() if name in waiting.names], error)
            return
        finally:
            self._fraction.pop(name, None)
        with self._changed:
            self._trays[name] = _Tray(model, self._loader.bytes_of(name))
            self._grant()
        del model
        logger.info("loaded %s in %.1f s; %s", name, perf_counter() - started, self._filling())
        while self._loader.bytes > self.budget and self._evict_idle(lease.names):
            pass
        if self._loader.bytes > self.budget:
            logger.warning("%s is past the memory budget; %s", name, self._filling())

    def _read(self, name: str, lease: Lease[T]) -> T:
        """The model from disk; where the memory is less than the budget says, once more without idle ones."""
        progressed = partial(self._progressed, name)
        try:
            return self._loader.load(name, progressed)
        except OutOfMemory:
            if not self._evict_idle(lease.names):
                raise
        while self._evict_idle(lease.names):
            pass
        return self._loader.load(name, progressed)

    def _progressed(self, name: str, fraction: float) -> None:
        with self._changed:
            self._fraction[name] = fraction

    def _evict_idle(self, kept: tuple[str, ...]) -> bool:
        """Evict the least recently used model without leases that is not to be kept; False without one."""
        with self._changed:
            idle = [name for name in self._trays if not self._trays[name].leases and name not in kept]
            if not idle:
                return False
            name = idle[0]
            del self._trays[name]
        self._loader.unload(name)
        logger.info("evicted %s; %s", name, self._filling())
        return True

    def _drain(self, lease: Lease[T], excess: int) -> None:
        """Let the least recently used of the leased models run empty; return when one has."""
        with self._changed:
            others = [name for name in self._trays if name not in lease.names]
            freed = 0
            for name in others:
                if freed < excess:
                    self._draining.add(name)
                    freed += self._loader.freed_by(name)
            self._changed.wait_for(
                lambda: (
                    self._closed
                    or lease not in self._queue
                    or any(not self._trays[name].leases for name in others)
                )
            )

    def _waiting(self) -> list[Lease[T]]:
        with self._changed:
            return list(self._queue)

    def _fail(self, leases: Sequence[Lease[T]], error: Exception) -> None:
        """Tell those of these who still wait."""
        with self._changed:
            for lease in leases:
                if lease in self._queue:
                    self._queue.remove(lease)
                    lease.models.set_exception(error)

    def _filling(self) -> str:
        return f"{self._loader.bytes / 1e9:.2f} of {self.budget / 1e9:.2f} GB are taken"


def _stopping() -> FamilyUnavailable:
    return FamilyUnavailable("the service of this family is stopping; try again soon")
