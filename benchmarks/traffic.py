"""The load: which requests come, when they come, and what became of each. The same for every system."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import asdict, dataclass
from time import perf_counter

__all__ = ["Answer", "Mix", "Outcome", "Request", "System", "Traffic", "closed_loop", "open_loop"]

Answer = Callable[["Request"], Awaitable[bytes]]
"""A system under load: from a request to its picture file; raises when it fails."""

System = Callable[[str, int], AbstractAsyncContextManager[Answer]]
"""From a model's name and the number of torch threads to the system, running."""


@dataclass(frozen=True)
class Request:
    """One picture, with every field set that matters for its cost. Sides are in pixels."""

    prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int

    def fields(self) -> dict[str, object]:
        """The request as the server's JSON fields."""
        return asdict(self)


@dataclass(frozen=True)
class Mix:
    """What is mixed: every combination comes equally often."""

    steps: tuple[int, ...] = (4, 20, 50)
    guidance: tuple[float, ...] = (4.0, 1.0)
    sides: tuple[int, ...] = (64, 96)

    @property
    def combinations(self) -> list[tuple[int, float, int]]:
        """Steps, guidance and side of each kind of request."""
        return list(itertools.product(self.steps, self.guidance, self.sides))


@dataclass(frozen=True)
class Outcome:
    """What became of the requests of one run, in their order; a latency is None where there is no picture.

    Latencies count from when a request was due, not from when the client got round to sending it, so a system
    that stalls the client can't hide it. ``backlog`` is how many were unfinished when the last one arrived.
    """

    requests: Sequence[Request]
    latencies: Sequence[float | None]
    pictures: Sequence[bytes | None]
    seconds: float
    backlog: int
    errors: Sequence[str]

    @property
    def throughput(self) -> float:
        """Pictures a second, from the first arrival to the last picture."""
        return sum(latency is not None for latency in self.latencies) / self.seconds


class Traffic:
    """A seeded stream of requests in which no prompt comes twice, so that no cache of prompts helps."""

    def __init__(self, mix: Mix, seed: int) -> None:
        self._mix = mix
        self._random = random.Random(seed)  # noqa: S311 # for arrivals, not for secrets
        self._prompts = iter(_prompts(self._random))

    def take(self, count: int) -> list[Request]:
        """The next requests: all kinds equally often (where the count allows it), in random order."""
        kinds = self._mix.combinations
        chosen = [kinds[i % len(kinds)] for i in range(count)]
        self._random.shuffle(chosen)
        return [
            Request(next(self._prompts), side, side, steps, guidance, self._random.randrange(2**32))
            for steps, guidance, side in chosen
        ]

    def arrivals(self, count: int, rate: float) -> list[float]:
        """When each of ``count`` requests comes, in seconds: a Poisson process of ``rate`` a second."""
        gaps = [self._random.expovariate(rate) for _ in range(count)]
        # The last one is put where the mean says: a short run really has the rate that it is named by.
        stretch = count / rate / sum(gaps)
        return [stretch * moment for moment in itertools.accumulate(gaps)]


def _prompts(shuffler: random.Random) -> list[str]:
    sizes = ("small", "large")
    colours = ("red", "green", "blue", "yellow", "purple", "orange", "white", "black")
    shapes = ("circle", "square", "triangle", "star", "ring")
    places = ("on the left", "on the right", "on the top", "on the bottom", "in the center")
    prompts = [
        f"a {size} {colour} {shape} {place} of a {ground} background"
        for size, colour, shape, place, ground in itertools.product(sizes, colours, shapes, places, colours)
        if colour != ground
    ]
    shuffler.shuffle(prompts)
    return prompts


async def closed_loop(answer: Answer, requests: Sequence[Request], in_flight: int) -> Outcome:
    """Keep ``in_flight`` requests with the system until all are answered."""
    gate = asyncio.Semaphore(in_flight)
    watch = _Watch(requests)

    async def one(index: int) -> None:
        async with gate:
            await watch.ask(answer, index, perf_counter())

    await asyncio.gather(*(one(index) for index in range(len(requests))))
    return watch.outcome()


async def open_loop(answer: Answer, requests: Sequence[Request], arrivals: Sequence[float]) -> Outcome:
    """Send each request at its time, whether the system keeps up or not, and wait for all."""
    watch = _Watch(requests)
    tasks = []
    for index, arrival in enumerate(arrivals):
        due = watch.began + arrival
        await asyncio.sleep(max(0.0, due - perf_counter()))
        tasks.append(asyncio.create_task(watch.ask(answer, index, due)))
    backlog = sum(not task.done() for task in tasks)
    await asyncio.gather(*tasks)
    return watch.outcome(backlog, since=watch.began + arrivals[0])


class _Watch:
    """Notes the latencies, pictures and errors of one run."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.began = perf_counter()
        self._ended = self.began
        self._requests = requests
        self._latencies: list[float | None] = [None] * len(requests)
        self._pictures: list[bytes | None] = [None] * len(requests)
        self._errors: list[str] = []

    async def ask(self, answer: Answer, index: int, due: float) -> None:
        try:
            picture = await answer(self._requests[index])
        except Exception as error:  # noqa: BLE001 # a failed request is a figure of the run, not its end
            self._errors.append(f"{type(error).__name__}: {error}")
        else:
            self._ended = perf_counter()
            self._latencies[index] = self._ended - due
            self._pictures[index] = picture

    def outcome(self, backlog: int = 0, since: float | None = None) -> Outcome:
        seconds = self._ended - (self.began if since is None else since)
        return Outcome(
            self._requests, self._latencies, self._pictures, max(seconds, 1e-9), backlog, self._errors
        )
