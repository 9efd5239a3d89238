"""Requests over adapters and the base, timed: mixed in the step batcher, kept apart in it, or one by one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from importlib import import_module
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES, random_pipeline, served_pipeline
from benchmarks.random_adapters import random_adapter
from benchmarks.traffic import Mix, Traffic
from jubako.adapters.bank import AdapterBank
from jubako.adapters.store import AdapterStore
from jubako.catalog import load_catalog
from jubako.engine.batcher import StepBatcher
from jubako.engine.samples import Sample
from jubako.engine.schedule import make_scheduler
from jubako.engine.ticket import Ticket
from jubako.job import Job, LoraUse

__all__ = ["REFERENCE", "STOCK", "Load", "Mixtures", "Run"]

ADAPTERS = ("ash", "birch", "cedar", "dogwood")
REFERENCE, STOCK = "no adapters", "stock, no adapters"
BUDGET = 2**34


@dataclass(frozen=True)
class Load:
    """What is asked of a model: so many requests at once, each with guidance, so with two rows."""

    requests: int
    steps: int
    size: int
    rank: int
    layers: str
    seed: int


@dataclass(frozen=True)
class Run:
    """One timed way to the load's pictures, [3, H, W] each; where the batcher ran, its forwards and rows."""

    pictures: Sequence[torch.Tensor]
    seconds: float
    cpu_seconds: float
    forwards: int
    rows: int


@dataclass
class Apart(Sample):
    """A sample that shares forwards only with those that have the same adapters."""

    @property
    def bucket(self) -> Any:
        return super().bucket, self.adapters


class Mixtures:
    """A model with four adapters, as it is served, and the stock pipeline with the same by peft."""

    def __init__(self, name: str, load: Load, folder: Path) -> None:
        entry = load_catalog().model(name)
        if name in ARCHITECTURES:
            pipeline = random_pipeline(ARCHITECTURES[name], torch.device("cpu"), torch.float32, load.seed)
        else:
            pipeline = served_pipeline(entry)
        pipeline.scheduler = make_scheduler(pipeline.scheduler.config, "Euler", entry.flow)
        pipeline.set_progress_bar_config(disable=True)
        self._stock = _copied(pipeline)
        self._model = import_module(f"jubako.families.{entry.family}").wrap(pipeline, entry)
        store = AdapterStore(folder)
        for seed, adapter in enumerate(ADAPTERS):
            given: dict[str, Any] = {"layers": load.layers, "rank": load.rank, "seed": seed}
            file = random_adapter(folder / "files" / f"{adapter}.safetensors", pipeline.unet, **given)
            store.add(adapter, file)
            self._stock.load_lora_weights(file, adapter_name=adapter)
        self._model.bank = AdapterBank(pipeline, name, store, BUDGET)
        self.adapter_bytes = self._model.bank.take([LoraUse(name=ADAPTERS[0], weight=1.0)])[0][0].bytes
        mix = Mix((load.steps,), (5.0,), (load.size,))
        self._jobs = [
            Job(
                id=str(index),
                task="txt2img",
                family=entry.family,
                model=name,
                negative_prompt="",
                scheduler="Euler",
                output_format="png",
                output_compression=90,
                **request.fields(),
            )
            for index, request in enumerate(Traffic(mix, load.seed).take(load.requests))
        ]

    def ways(self) -> Mapping[str, Callable[[], Run]]:
        """What to time, by name; the requests are the same in all of them."""
        none, one = [""] * len(self._jobs), [ADAPTERS[0]] * len(self._jobs)
        mixed = [("", *ADAPTERS)[place % 5] for place in range(len(self._jobs))]
        return {
            REFERENCE: partial(self._by_step, none),
            "one adapter": partial(self._by_step, one),
            "mixed": partial(self._by_step, mixed),
            "a bucket for each": partial(self._by_step, mixed, Apart),
            STOCK: partial(self._one_by_one, none, self._switch),
            "stock, switched": partial(self._one_by_one, mixed, self._switch),
            "stock, fused": partial(self._one_by_one, mixed, self._fuse),
        }

    def _by_step(self, adapters: Sequence[str], kind: type[Sample] = Sample) -> Run:
        """All at once in the step batcher."""
        self._model.forget_prompts()
        batcher, tickets = StepBatcher(), [Ticket() for _ in self._jobs]
        began, cpu = perf_counter(), process_time()
        try:
            samples = [
                self._model.prepare(_with(job, adapter))
                for job, adapter in zip(self._jobs, adapters, strict=True)
            ]
            for sample, ticket in zip(samples, tickets, strict=True):
                own = {each.name: getattr(sample, each.name) for each in fields(Sample)}
                batcher.submit(kind(**own), ticket)
            pictures = [ticket.decoded.result() for ticket in tickets]
            return Run(pictures, perf_counter() - began, process_time() - cpu, batcher.forwards, batcher.rows)
        finally:
            batcher.close()

    def _one_by_one(self, adapters: Sequence[str], change: Callable[[str], Callable[[], None]]) -> Run:
        """The stock pipeline, its adapters changed before each request that has others."""
        pictures, restore, before = [], _nothing, ""
        self._stock.disable_lora()
        began, cpu = perf_counter(), process_time()
        for job, adapter in zip(self._jobs, adapters, strict=True):
            if adapter != before:
                restore()
                restore, before = change(adapter), adapter
            pictures.append(self._call(job))
        restore()
        rows = 2 * sum(job.num_inference_steps for job in self._jobs)
        return Run(pictures, perf_counter() - began, process_time() - cpu, rows // 2, rows)

    def _switch(self, adapter: str) -> Callable[[], None]:
        """Peft's way: the adapter's products beside every layer's own."""
        if not adapter:
            self._stock.disable_lora()
        else:
            self._stock.enable_lora()
            # The pipeline's own set_adapters fails on a UNet whose blocks differ in length: tiny-sd's.
            self._stock.unet.set_adapter(adapter)
        return _nothing

    def _fuse(self, adapter: str) -> Callable[[], None]:
        """Peft's other way: the adapter added to the weights, and taken from them afterwards."""
        self._switch(adapter)
        if not adapter:
            return _nothing
        self._stock.fuse_lora(components=["unet"], adapter_names=[adapter])
        return partial(self._stock.unfuse_lora, components=["unet"])

    def _call(self, job: Job) -> torch.Tensor:
        found: torch.Tensor = self._stock(
            job.prompt,
            negative_prompt="",
            width=job.width,
            height=job.height,
            num_inference_steps=job.num_inference_steps,
            guidance_scale=job.guidance_scale,
            generator=torch.Generator("cpu").manual_seed(job.seed),
            output_type="pt",
        ).images[0]
        return found


def _with(job: Job, adapter: str) -> Job:
    return job.model_copy(update={"loras": (LoraUse(name=adapter, weight=1.0),)}) if adapter else job


def _nothing() -> None:
    """What takes back a change that needs no taking back."""


def _copied(pipeline: Any) -> Any:
    """The same pipeline with a UNet of its own, for whoever puts adapters into it."""
    parts = pipeline.components | {"unet": copy.deepcopy(pipeline.unet)}
    options = {
        name: value
        for name, value in pipeline.config.items()
        if name not in parts and not name.startswith("_")
    }
    copied = type(pipeline)(**parts, **options)
    copied.set_progress_bar_config(disable=True)
    return copied
