"""`scripts/benchmark shapes`: adapters for the UNets of SD 1.5 and SDXL in their true layouts.

All numbers are random. Each model has two LoRA files as trainers write them: one for the attentions, one
for all layers of the blocks. They are read as the server reads them and share forwards with a row of the
base, in turns with forwards without adapters. Then there is room for one only, and the other goes. It fails
unless the base's row is what it was without them, the others are not, and what has gone is gone.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch

from benchmarks.architectures import ARCHITECTURES, random_pipeline
from benchmarks.bench import DTYPES
from benchmarks.random_adapters import LAYERS, quiet, random_adapter
from benchmarks.report import Report, spread
from jubako.adapters.bank import AdapterBank
from jubako.adapters.deltas import AdapterSet
from jubako.adapters.store import AdapterStore
from jubako.job import LoraUse
from jubako.memory import give_back

__all__ = ["main"]

MODELS = ("sd1.5", "sdxl")


def main(arguments: Sequence[str]) -> None:
    """Run it with these command line arguments."""
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark shapes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", dest="models", action="append", choices=MODELS, help="default both")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--latents", type=int, default=16, help="their side; default 16, that is 128 pixels")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default float32: 10 GB of SDXL")
    parser.add_argument("--repeats", type=int, default=3, help="forwards of each kind; default 3")
    parser.add_argument("--threads", type=int, default=2, help="torch threads; default 2")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/DATE-shapes.json too")
    options = parser.parse_args(arguments)
    options.models = options.models or list(MODELS)
    torch.set_num_threads(options.threads)
    report = Report("shapes", vars(options))
    models = {}
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode(), quiet():
            models[name] = _measure(name, options, Path(folder))
        give_back()
        _say(report, name, models[name])
    report.add(models=models)
    report.finish(save=options.save)


def _measure(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    dtype = DTYPES[options.dtype]
    # The text encoders and the autoencoder would take gigabytes for nothing.
    architecture, device = ARCHITECTURES[name], torch.device("cpu")
    pipeline = random_pipeline(architecture, device, dtype, options.seed, parts=("unet",))
    store, files = AdapterStore(folder), {}
    for seed, layers in enumerate(LAYERS):
        path = folder / "files" / f"{layers}.safetensors"
        given: dict[str, Any] = {"layers": layers, "rank": options.rank, "seed": seed, "dtype": dtype}
        files[layers] = random_adapter(path, pipeline.unet, **given)
        store.add(layers, path)
    # Room for the larger one.
    bank = AdapterBank(pipeline, name, store, max(file.stat().st_size for file in files.values()))
    sets, read = {}, {}
    for layers, file in files.items():
        began, cpu = perf_counter(), process_time()
        sets[layers] = bank.take([LoraUse(name=layers, weight=1.0)])
        seconds = {"read_s": perf_counter() - began, "read_cpu_s": process_time() - cpu}
        lora = sets[layers][0][0]
        count = len(lora.components["unet"])
        read[layers] = {"layers": count, "file_bytes": file.stat().st_size, "bytes": lora.bytes, **seconds}
    forwards = _forwards(pipeline.unet, bank, list(sets.values()), options)
    gone = weakref.ref(sets.pop("attention")[0][0])
    if gone() is not None or bank.bytes != read["all"]["bytes"]:
        raise RuntimeError(f"{name}: an adapter that was to go is still there")
    count = sum(parameter.numel() for parameter in pipeline.unet.parameters())
    return {"parameters": count, "adapters": read, **forwards}


def _forwards(
    unet: Any, bank: AdapterBank, sets: Sequence[AdapterSet], options: argparse.Namespace
) -> dict[str, Any]:
    """Forwards of three rows: one with each of the adapters, the base between them; and without any."""
    rows: list[AdapterSet] = [sets[0], (), sets[1]]
    given = _inputs(unet, len(rows), options)
    without, mixed, ratios, cpu_ratios = [], [], [], []
    for repeat in range(options.repeats + 1):
        plain, seconds, cpu = _timed(unet, bank, [()] * len(rows), given)
        adapted, mixed_seconds, mixed_cpu = _timed(unet, bank, rows, given)
        if repeat:  # the first round warms up
            without.append(seconds)
            mixed.append(mixed_seconds)
            ratios.append(seconds / mixed_seconds)
            cpu_ratios.append(cpu / mixed_cpu)
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(adapted, plain, strict=True)]
    if not adapted.isfinite().all() or apart[1] > 1e-3 or min(apart[0], apart[2]) < 1e-2:
        raise RuntimeError(f"rows differ from the base's by {apart} of the largest; only the second is its")
    return {
        "without_s": spread(without),
        "mixed_s": spread(mixed),
        "ratio": spread(ratios),
        "cpu_ratio": spread(cpu_ratios),
        "difference_to_base": apart,
    }


def _timed(
    unet: Any, bank: AdapterBank, rows: Sequence[AdapterSet], given: dict[str, Any]
) -> tuple[torch.Tensor, float, float]:
    began, cpu = perf_counter(), process_time()
    with bank.rows("unet", rows):
        predicted = unet(**given, return_dict=False)[0]
    return predicted.float(), perf_counter() - began, process_time() - cpu


def _inputs(unet: Any, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    generator, config = torch.Generator().manual_seed(options.seed), unet.config

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator).to(unet.dtype)

    given: dict[str, Any] = {
        "sample": noise(config.in_channels, options.latents, options.latents),
        "timestep": torch.linspace(900, 100, rows),
        "encoder_hidden_states": noise(77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        sizes = 6
        pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
        times = torch.full((rows, sizes), 8.0 * options.latents)
        given["added_cond_kwargs"] = {"text_embeds": noise(pooled), "time_ids": times}
    return given


def _say(report: Report, name: str, found: dict[str, Any]) -> None:
    report.say(f"\n{name}: {found['parameters'] / 1e6:.1f} M parameters")
    for layers, one in found["adapters"].items():
        report.say(
            f"  {layers:9} {one['layers']:5} layers, {one['bytes'] / 1e6:6.1f} MB,"
            f" read in {one['read_s']:.2f} s, {one['read_cpu_s']:.2f} s of CPU time"
        )
    medians = [statistics.median(found[way]["runs"]) for way in ("without_s", "mixed_s")]
    report.say(
        f"  a forward of 3 rows: {medians[0]:.2f} s without, {medians[1]:.2f} s mixed; ratio"
        f" {found['ratio']['median']:.2f}, of CPU time {found['cpu_ratio']['median']:.2f}"
    )
