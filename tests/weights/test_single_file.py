"""One checkpoint of all weights in the original layouts, with configs of another model, offline."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import original
from entries import entry, load, same
from pipelines import sd_pipeline, sdxl_pipeline
from safetensors.torch import load_file, save_file

from jubako.catalog import Model
from jubako.errors import ModelNotOnDisk, UnusableWeights
from jubako.weights.components import ComponentStore
from jubako.weights.recipe import estimated_bytes
from jubako.weights.store import find_weights, size_on_disk

PIPELINES: dict[str, Any] = {"sd1.5": sd_pipeline, "sdxl": sdxl_pipeline}
MODULES = {
    "sd1.5": ("unet", "vae", "text_encoder"),
    "sdxl": ("unet", "vae", "text_encoder", "text_encoder_2"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, with other weights than the checkpoints."""
    folder = tmp_path_factory.mktemp("home")
    for kind, pipeline in PIPELINES.items():
        pipeline(seed=1).save_pretrained(folder / kind)
        save_file(original(pipeline(seed=2)), folder / f"{kind}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def base(home: Path, kind: str, **changes: Any) -> Model:
    """The folder as a model of the catalog, with the true size of its denoiser."""
    size = sum(parameter.numel() for parameter in PIPELINES[kind]().unet.parameters())
    return entry(kind, kind, folder=home / kind).model_copy(update={"parameters": size, **changes})


def mine(home: Path, kind: str, **weights: Any) -> Model:
    return entry("mine", kind, **{"file": home / f"{kind}.safetensors", **weights})


@pytest.mark.parametrize("kind", ["sd1.5", "sdxl"])
def test_every_tensor_arrives(home: Path, kind: str) -> None:
    store = ComponentStore({kind: base(home, kind)})
    assembly = load(store, mine(home, kind, config=kind), home)
    wanted = PIPELINES[kind](seed=2)
    for name in MODULES[kind]:
        module = getattr(assembly.pipeline, name)
        assert same(module, getattr(wanted, name)), name
        assert not module.training
    assert estimated_bytes(mine(home, kind), home, torch.float32, {kind: base(home, kind)}) == pytest.approx(
        store.bytes, rel=0.02
    )


def test_the_picture_is_that_of_the_pipeline(home: Path) -> None:
    store = ComponentStore({"sdxl": base(home, "sdxl")})
    ours = load(store, mine(home, "sdxl"), home).pipeline
    stock = sdxl_pipeline(seed=2)
    assert torch.equal(*(_drawn(pipeline) for pipeline in (ours, stock)))


def test_two_entries_of_one_file_share_it_and_not_with_its_base(home: Path) -> None:
    store = ComponentStore({"sdxl": base(home, "sdxl")})
    one = load(store, mine(home, "sdxl"), home)
    other = load(store, mine(home, "sdxl", config="sdxl"), home)
    below = load(store, base(home, "sdxl"), home)
    assert store.bytes_freed_by(one) == store.bytes_freed_by(other) == 0
    for name in MODULES["sdxl"]:
        assert getattr(one.pipeline, name) is getattr(other.pipeline, name)
        assert getattr(one.pipeline, name) is not getattr(below.pipeline, name)


def test_float16_keeps_the_vae_in_float32(home: Path) -> None:
    store = ComponentStore({"sdxl": base(home, "sdxl")})
    pipeline = load(store, mine(home, "sdxl"), home, torch.float16).pipeline
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.unet.dtype == pipeline.text_encoder_2.dtype == torch.float16
    assert same(pipeline.vae, sdxl_pipeline(seed=2).vae)


def test_what_the_file_does_not_hold_comes_from_the_folder_if_it_is_there(home: Path, tmp_path: Path) -> None:
    state = load_file(home / "sdxl.safetensors")
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("conditioner.")}
    save_file(bare, tmp_path / "bare.safetensors")
    folder = base(home, "sdxl")
    store = ComponentStore({"sdxl": folder})
    below = load(store, folder, home)
    pipeline = load(store, mine(home, "sdxl", file=tmp_path / "bare.safetensors"), home).pipeline
    assert pipeline.text_encoder is below.pipeline.text_encoder
    assert pipeline.text_encoder_2 is below.pipeline.text_encoder_2
    assert same(pipeline.unet, sdxl_pipeline(seed=2).unet)


def test_a_component_that_is_left_out_is_not_missed(home: Path, tmp_path: Path) -> None:
    state = load_file(home / "sd1.5.safetensors")
    bare = {name: tensor for name, tensor in state.items() if not name.startswith("cond_stage_model.")}
    save_file(bare, tmp_path / "bare.safetensors")
    out = ("safety_checker", "feature_extractor", "text_encoder", "tokenizer")
    model = mine(home, "sd1.5", file=tmp_path / "bare.safetensors", components_left_out=out)
    assembly = load(ComponentStore({"sd1.5": base(home, "sd1.5")}), model, home)
    assert assembly.pipeline.text_encoder is None
    assert set(assembly.parts) == {"unet", "vae"}


def test_the_config_is_found_by_the_size_of_the_denoiser(home: Path) -> None:
    fitting = base(home, "sdxl")
    models = {
        "refiner": fitting.model_copy(
            update={"name": "refiner", "pipeline": "StableDiffusionXLImg2ImgPipeline"}
        ),
        "larger": fitting.model_copy(update={"name": "larger", "parameters": 2 * fitting.parameters}),
        "absent": entry("absent", "sdxl", repo="somebody/sdxl").model_copy(
            update={"parameters": fitting.parameters}
        ),
        "sdxl": fitting.model_copy(update={"parameters": round(fitting.parameters * 1.004)}),
    }
    model = mine(home, "sdxl")
    assert find_weights(home, model, models) == model.weights.file
    assert size_on_disk(home, model, models) == (home / "sdxl.safetensors").stat().st_size
    pipeline = load(ComponentStore(models), model, home).pipeline
    assert Path(pipeline.config["_name_or_path"]) == home / "sdxl"


def test_without_a_config_on_disk_the_pull_is_named(home: Path) -> None:
    size = base(home, "sdxl").parameters
    absent = entry("sdxl", "sdxl", repo="somebody/sdxl").model_copy(update={"parameters": size})
    model = mine(home, "sdxl")
    assert find_weights(home, model, {"sdxl": absent}) is None
    told = r"those of sdxl fit\); fetch them with: jubako pull mine"
    with pytest.raises(ModelNotOnDisk, match=told):
        load(ComponentStore({"sdxl": absent}), model, home)
    other = absent.model_copy(update={"parameters": 3 * size})
    with pytest.raises(ModelNotOnDisk, match=r"fits no model .* name the one .* in weights.config"):
        load(ComponentStore({"sdxl": other}), model, home)


def test_a_file_that_does_not_fit_is_named(home: Path, tmp_path: Path) -> None:
    torn, lora = tmp_path / "torn.safetensors", tmp_path / "lora.safetensors"
    torn.write_bytes(b"\x00" * 64)
    save_file({"lora_unet_down.lora_up.weight": torch.zeros(1)}, lora)
    holey = tmp_path / "holey.safetensors"
    state = load_file(home / "sdxl.safetensors")
    del state["model.diffusion_model.middle_block.0.in_layers.0.weight"]
    save_file(state, holey)
    models = {"sdxl": base(home, "sdxl")}
    for file, config, told in (
        (torn, None, "no safetensors file"),
        (lora, None, "no checkpoint of a whole model"),
        (home / "sd1.5.safetensors", "sdxl", "weights.config may name a model that fits better"),
        (holey, "sdxl", "the unet of mine can't be read .* It lacks tensors"),
        (
            home / "sdxl.safetensors",
            "sdxl-turbo",
            "'sdxl-turbo' is no model of the family with configs; .* sdxl",
        ),
        (tmp_path / "none.safetensors", None, "mine needs .*none.safetensors, which is not there"),
    ):
        with pytest.raises((UnusableWeights, ModelNotOnDisk), match=told):
            load(ComponentStore(models), mine(home, "sdxl", file=file, config=config), home)


def test_a_bad_file_is_not_on_disk_for_a_list_of_models(home: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"\xff" * 64)
    assert find_weights(home, mine(home, "sdxl", file=torn), {"sdxl": base(home, "sdxl")}) is None


def _drawn(pipeline: Any) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "pt", "width": 64, "height": 64}
    picture: torch.Tensor = pipeline(
        "a red star", generator=torch.Generator().manual_seed(7), **options
    ).images
    return picture
