"""Rows with adapters of their own in one forward, against stock pipelines that have one adapter at a time."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_files import ATTENTION, CONVOLUTIONS, lora_file, tensors_of
from pipelines import sd3_pipeline, sd_pipeline, sdxl_pipeline

from jubako.adapters.deltas import AdapterSet, stretches
from jubako.adapters.lora import Lora, read_lora
from jubako.adapters.mixing import Mixer
from jubako.errors import InvalidRequest
from jubako.families.acceleration import Acceleration, accelerate

PIPELINES: dict[str, Any] = {"sd": sd_pipeline, "sdxl": sdxl_pipeline, "sd3": sd3_pipeline}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Peft warns of patterns that fit more layers than a file has."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def denoiser(pipeline: Any) -> Any:
    return pipeline.components.get("unet") or pipeline.transformer


def adapters(kind: str, folder: Path) -> dict[str, Path]:
    """Three files: attention alone, convolutions too and of another rank, attention of a third rank."""
    pipeline = PIPELINES[kind]()
    module, name = denoiser(pipeline), "transformer" if kind == "sd3" else "unet"
    more = (*ATTENTION, "add_k_proj", "ff.net.2") if kind == "sd3" else (*ATTENTION, *CONVOLUTIONS)
    made = {
        "one": tensors_of(module, 1, rank=4),
        "two": tensors_of(module, 2, rank=6, targets=more),
        "three": tensors_of(module, 3, rank=2),
    }
    return {
        each: lora_file(folder / f"{each}.safetensors", **{name: tensors}) for each, tensors in made.items()
    }


def inputs(kind: str, rows: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator)

    times = torch.linspace(900, 100, rows)
    if kind == "sd3":
        config = denoiser(PIPELINES[kind]()).config
        return {
            "hidden_states": noise(config.in_channels, 8, 8),
            "timestep": times,
            "encoder_hidden_states": noise(9, config.joint_attention_dim),
            "pooled_projections": noise(config.pooled_projection_dim),
        }
    config = denoiser(PIPELINES[kind]()).config
    found: dict[str, Any] = {
        "sample": noise(config.in_channels, 8, 8),
        "timestep": times,
        "encoder_hidden_states": noise(9, config.cross_attention_dim),
    }
    if kind == "sdxl":
        width = PIPELINES[kind]().text_encoder_2.config.projection_dim
        found["added_cond_kwargs"] = {"text_embeds": noise(width), "time_ids": noise(6).abs() * 64}
    return found


def row(given: dict[str, Any], i: int) -> dict[str, Any]:
    return {
        name: row(value, i) if isinstance(value, dict) else value[i : i + 1] for name, value in given.items()
    }


@pytest.mark.parametrize(
    "acceleration",
    [Acceleration(), Acceleration(fused_qkv=True, channels_last=True)],
    ids=["plain", "as on a GPU"],
)
@pytest.mark.parametrize("kind", list(PIPELINES))
@torch.inference_mode()
def test_each_row_has_its_own_adapters(kind: str, acceleration: Acceleration, tmp_path: Path) -> None:
    files = adapters(kind, tmp_path)
    pipeline = PIPELINES[kind]()
    loras = {name: read_lora(name, file, pipeline, kind) for name, file in files.items()}
    name = "transformer" if kind == "sd3" else "unet"
    module = accelerate(denoiser(pipeline), name, acceleration)
    rows: list[list[tuple[str, float]]] = [
        [("one", 0.8)],
        [],
        [("two", 1.0)],
        [("one", 0.5), ("three", -0.7)],
        [("two", 1.0)],
        [],
    ]
    given = inputs(kind, len(rows))
    before = module(**given, return_dict=False)[0]
    sets: list[AdapterSet] = [tuple((loras[name], weight) for name, weight in each) for each in rows]
    mixer = Mixer(module, name)
    with mixer.rows(sets):
        mixed = module(**given, return_dict=False)[0]
    # Without adapters the base is what it was, bit for bit.
    assert torch.equal(module(**given, return_dict=False)[0], before)
    stock = PIPELINES[kind]()
    for name, file in files.items():
        stock.load_lora_weights(file, adapter_name=name)
    for i, each in enumerate(rows):
        if each:
            stock.enable_lora()
            stock.set_adapters([name for name, _ in each], [weight for _, weight in each])
        else:
            stock.disable_lora()
        alone = denoiser(stock)(**row(given, i), return_dict=False)[0]
        assert torch.allclose(mixed[i : i + 1], alone, atol=1e-4, rtol=1e-4), (i, each)
        changed = float((mixed[i] - before[i]).abs().max())
        assert changed > 1e-3 if each else changed < 1e-5


@torch.inference_mode()
def test_equal_neighbours_share_their_products(tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    files = adapters("sd", tmp_path)
    loras = [read_lora(name, files[name], pipeline, "sd") for name in ("one", "two")]
    one: AdapterSet = ((loras[0], 0.9),)
    both: AdapterSet = (*one, (loras[1], 0.4))
    found = stretches([one, one, (), both, both, one], "unet")
    assert [(stretch.rows, stretch.weight) for stretch in found] == [
        (slice(0, 2), 0.9),
        (slice(3, 5), 0.9),
        (slice(3, 5), 0.4),
        (slice(5, 6), 0.9),
    ]
    assert stretches([one, both], "text_encoder") == []


def test_what_nobody_has_any_more_leaves_nothing(tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    files, mixer = adapters("sd", tmp_path), Mixer(pipeline.unet, "unet")
    given = inputs("sd", 2)
    with torch.inference_mode():
        before = pipeline.unet(**given).sample
        for name in ("one", "two"):
            lora: Lora = read_lora(name, files[name], pipeline, "sd")
            assert lora.bytes > 0
            with mixer.rows([((lora, 1.0),), ()]):
                assert mixer.at_work
                assert not torch.equal(pipeline.unet(**given).sample, before)
            gone = weakref.ref(lora)
            del lora
            assert gone() is None
            assert not mixer.at_work
            assert torch.equal(pipeline.unet(**given).sample, before)
    assert any(module._forward_hooks for module in pipeline.unet.modules())
    del mixer
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    files = adapters("sdxl", tmp_path / "sdxl") | {"sd3": adapters("sd3", tmp_path / "sd3")["one"]}
    for name in ("one", "sd3"):
        with pytest.raises(InvalidRequest, match=rf"loras: {name} does not fit sd1\.5: ") as refusal:
            read_lora(name, files[name], sd_pipeline(), "sd1.5")
        assert refusal.value.param == "loras"


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    pipeline = sd_pipeline()
    tensors = dict(tensors_of(pipeline.unet, 1))
    name = next(iter(tensors))
    tensors[name] = tensors[name] * float("nan")
    file = lora_file(tmp_path / "nan.safetensors", unet=tensors)
    with pytest.raises(InvalidRequest, match="has numbers that are not finite"):
        read_lora("nan", file, pipeline, "sd1.5")
