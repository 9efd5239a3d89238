"""Adapters that come and go leave no memory behind."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_files import lora_file, tensors_of
from pipelines import sd_pipeline

from jubako.adapters.bank import AdapterBank
from jubako.adapters.deltas import AdapterSet
from jubako.adapters.lora import Lora, LoraLayer
from jubako.adapters.store import AdapterStore
from jubako.job import LoraUse
from jubako.memory import give_back

NAMES = ("ash", "birch", "cedar")
RANK = 2048


@pytest.fixture
def pipeline() -> Any:
    """A pipeline with a UNet as small as one with attention can be: a blank one is made in each cycle."""
    pipeline = sd_pipeline()
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",),
    )
    pipeline.register_modules(unet=unet.eval())
    return pipeline


@pytest.fixture
def uses(pipeline: Any, tmp_path: Path) -> list[LoraUse]:
    store = AdapterStore(tmp_path)
    for seed, name in enumerate(NAMES):
        tensors = tensors_of(pipeline.unet, seed, rank=RANK, targets=("to_q",))
        store.add(name, lora_file(tmp_path / "files" / f"{name}.safetensors", unet=tensors))
    return [LoraUse(name=name, weight=0.8, sha256=store.find(name).sha256) for name in NAMES]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Peft warns of patterns that fit more layers than a file has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def resident_bytes() -> int:
    give_back()
    found: int = psutil.Process().memory_info().rss
    return found


@torch.inference_mode()
def test_two_hundred_adapters_that_come_and_go_leave_no_memory(
    pipeline: Any, uses: list[LoraUse], tmp_path: Path
) -> None:
    bank = AdapterBank(pipeline, "sd", AdapterStore(tmp_path), budget=1)
    generator = torch.Generator().manual_seed(0)
    latents, words = (torch.randn(2, *shape, generator=generator) for shape in ((4, 8, 8), (9, 32)))
    adapters: weakref.WeakSet[Lora] = weakref.WeakSet()
    layers: weakref.WeakSet[LoraLayer] = weakref.WeakSet()

    def taken(use: LoraUse) -> AdapterSet:
        adapted = bank.take([use])
        adapters.update(lora for lora, _ in adapted)
        layers.update(layer for lora, _ in adapted for layer in lora.components["unet"].values())
        return adapted

    def predicted(*sets: AdapterSet) -> torch.Tensor:
        with bank.rows("unet", sets):
            found: torch.Tensor = pipeline.unet(latents, torch.tensor([900, 100]), words).sample
        return found

    base = predicted()
    running = taken(uses[0])
    expected = predicted(running, ())
    each, size = len(layers), bank.bytes
    for turn, use in enumerate(islice(cycle(uses), 200), 1):
        predicted((), taken(use))
        assert bank.bytes == size
        if turn == 50:
            before = resident_bytes()
    grown = resident_bytes() - before
    # If every second of them stayed, it were 75.
    assert grown < 15 * size, f"{grown / 1e6:.1f} MB more after 150 adapters of {size / 1e6:.1f} MB each"
    # The last one, and the one that a job still has.
    assert (len(adapters), len(layers)) == (2, 2 * each)
    assert torch.equal(predicted(running, ()), expected)
    assert torch.equal(predicted(), base)
    del running
    assert (len(adapters), len(layers)) == (1, each)


def test_the_least_recently_used_goes_first(pipeline: Any, uses: list[LoraUse], tmp_path: Path) -> None:
    ash, birch, cedar = uses
    store = AdapterStore(tmp_path)
    one = AdapterBank(pipeline, "sd", store, budget=1)
    one.take([ash])
    bank = AdapterBank(pipeline, "sd", store, budget=2 * one.bytes)
    first, _ = bank.take([ash, birch])
    assert bank.take([ash]) == (first,)
    bank.take([cedar])
    assert bank.bytes == 2 * one.bytes
    assert bank.take([ash]) == (first,)
    assert [lora.name for lora in bank._resident.values()] == ["cedar", "ash"]
