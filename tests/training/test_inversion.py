"""Textual inversion: what it learns is a file that the stock pipelines read, and nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from trainings import events, finished, folder_for

from jubako.adapters.store import AdapterStore
from jubako.catalog import shipped_folder
from jubako.training.folder import TrainingFolder

SHORT: dict[str, Any] = {
    "method": "textual-inversion",
    "vectors": 2,
    "sample_steps": 4,
    "batch_size": 2,
    "checkpoint_every": 4,
    "validation_every": 0,
}


def pipeline(model: str) -> Any:
    loaded = DiffusionPipeline.from_pretrained(shipped_folder() / "embedded" / model)
    return loaded.to(torch.float32)


def trained(path: Path, model: str, steps: int) -> TrainingFolder:
    folder = folder_for(path / model, model=model, steps=steps, **SHORT)
    assert finished(folder) == 0
    return folder


def test_sd_learns_a_word_that_the_stock_pipeline_reads(tmp_path: Path) -> None:
    folder = trained(tmp_path, "tiny-sd", 8)
    tensors = load_file(folder.adapter)
    assert {name: tuple(values.shape) for name, values in tensors.items()} == {"zog": (2, 128)}
    assert not torch.allclose(tensors["zog"][0], tensors["zog"][1])
    assert events(folder, "started")[0]["parameters"] == 2 * 128
    assert AdapterStore(tmp_path).add("zog", folder.adapter).kind == "embedding"
    stock = pipeline("tiny-sd")
    table = stock.text_encoder.get_input_embeddings().weight.detach().clone()
    stock.load_textual_inversion(folder.path, weight_name=folder.adapter.name, token="zog")  # noqa: S106 # a word
    grown = stock.text_encoder.get_input_embeddings().weight
    assert torch.equal(grown[: len(table)], table)
    assert torch.allclose(grown[len(table) :], tensors["zog"])
    assert stock.maybe_convert_prompt("a zog", stock.tokenizer) == "a zog zog_1"


def test_sdxl_learns_a_word_in_each_of_its_encoders(tmp_path: Path) -> None:
    folder = trained(tmp_path, "tiny-sdxl", 4)
    tensors = load_file(folder.adapter)
    assert set(tensors) == {"clip_l", "clip_g"}
    assert AdapterStore(tmp_path).add("zog", folder.adapter).kind == "embedding"
    stock = pipeline("tiny-sdxl")
    for key, suffix in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(stock, f"text_encoder{suffix}"), getattr(stock, f"tokenizer{suffix}")
        stock.load_textual_inversion(
            {"zog": tensors[key]},
            token="zog",  # noqa: S106 # a word
            text_encoder=encoder,
            tokenizer=tokenizer,
        )
        assert torch.allclose(encoder.get_input_embeddings().weight[-2:], tensors[key])


def test_it_goes_on_where_it_ended(tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "training", steps=6, **SHORT)
    assert finished(folder) == 0
    vectors = load_file(folder.adapter)["zog"]
    assert vectors.isfinite().all()
    # As if it had been killed after its last checkpoint.
    folder.adapter.unlink()
    folder.card.unlink()
    assert finished(folder) == 0
    assert events(folder, "started")[-1]["step"] == 6
    assert torch.equal(load_file(folder.adapter)["zog"], vectors)
