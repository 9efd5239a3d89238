"""Overlays: a whole denoiser from one file, and LoRAs fused into it, against diffusers' own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from entries import entry, load, same
from pipelines import sd3_pipeline, sd_pipeline, sdxl_pipeline
from safetensors.torch import save_file

from jubako.catalog import Model
from jubako.errors import ModelNotOnDisk, UnusableWeights
from jubako.weights.components import ComponentStore
from jubako.weights.recipe import estimated_bytes

RANK = 4
PIPELINES: dict[str, Any] = {"sd1.5": sd_pipeline, "sdxl": sdxl_pipeline, "sd3-medium": sd3_pipeline}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind."""
    folder = tmp_path_factory.mktemp("home")
    for kind, pipeline in PIPELINES.items():
        pipeline(seed=1).save_pretrained(folder / kind)
    return folder


def overlaid(home: Path, like: str, file: Path, **overlay: Any) -> Model:
    return entry("overlaid", like, folder=home / like, overlay={"file": str(file), **overlay})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_whole_denoiser_replaces_that_of_the_folder(home: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    unet = sdxl_pipeline(seed=2).unet.half()
    file = tmp_path / "lightning.safetensors"
    save_file(unet.state_dict(), file)
    store = ComponentStore()
    base = load(store, entry("base", "sdxl", folder=home / "sdxl"), home, dtype)
    model = overlaid(home, "sdxl", file)
    lightning = load(store, model, home, dtype)
    assert same(lightning.pipeline.unet, unet.to(dtype))
    assert not any(
        parameter.is_meta or parameter.requires_grad for parameter in lightning.pipeline.unet.parameters()
    )
    ours, theirs = dict(lightning.pipeline.unet.config), dict(base.pipeline.unet.config)
    assert ours == {key: value for key, value in theirs.items() if key != "_name_or_path"}
    for name in ("text_encoder", "text_encoder_2", "vae"):
        assert getattr(lightning.pipeline, name) is getattr(base.pipeline, name)
    assert estimated_bytes(model, home, dtype) == pytest.approx(store.bytes_of(lightning), rel=0.02)


def test_the_folders_own_denoiser_is_not_read(home: Path, tmp_path: Path) -> None:
    sdxl_pipeline(seed=1).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    unet = sdxl_pipeline(seed=2).unet
    save_file(unet.state_dict(), tmp_path / "unet.safetensors")
    model = entry(
        "light", "sdxl", folder=tmp_path / "base", overlay={"file": str(tmp_path / "unet.safetensors")}
    )
    assert same(load(ComponentStore(), model, home).pipeline.unet, unet)


@pytest.mark.parametrize("kind", ["sd1.5", "sdxl", "sd3-medium"])
@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_is_fused_as_diffusers_does_and_the_base_stays(
    home: Path, tmp_path: Path, kind: str, form: str
) -> None:
    if (kind, form) == ("sd3-medium", "kohya"):
        pytest.skip("diffusers reads no kohya files for SD3")
    stock = PIPELINES[kind](seed=1)
    file = lora_of(stock, tmp_path, form=form)
    store = ComponentStore()
    base = load(store, entry("base", kind, folder=home / kind), home)
    fused = load(store, overlaid(home, kind, file, kind="lora"), home)

    stock.load_lora_weights(tmp_path, weight_name=file.name)
    stock.fuse_lora()
    stock.unload_lora_weights()
    name = denoiser(stock)
    ours, theirs, below = (getattr(each, name) for each in (fused.pipeline, stock, base.pipeline))
    assert same(ours, theirs)
    assert same(below, getattr(PIPELINES[kind](seed=1), name))
    assert not same(ours, below)
    assert fused.pipeline.vae is base.pipeline.vae
    assert fused.pipeline.text_encoder is base.pipeline.text_encoder
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    assert store.bytes_freed_by(fused) == store.bytes_freed_by(base)


@pytest.mark.parametrize("form", ["diffusers", "kohya"])
def test_a_lora_for_text_encoders_gets_its_own_of_those(home: Path, tmp_path: Path, form: str) -> None:
    stock = sdxl_pipeline(seed=1)
    file = lora_of(stock, tmp_path, form=form, encoders=("text_encoder_2",))
    store = ComponentStore()
    base = load(store, entry("base", "sdxl", folder=home / "sdxl"), home)
    fused = load(store, overlaid(home, "sdxl", file, kind="lora"), home)
    stock.load_lora_weights(tmp_path, weight_name=file.name)
    stock.fuse_lora()
    stock.unload_lora_weights()
    assert same(fused.pipeline.text_encoder_2, stock.text_encoder_2)
    assert not same(fused.pipeline.text_encoder_2, base.pipeline.text_encoder_2)
    assert fused.pipeline.text_encoder is base.pipeline.text_encoder
    assert same(fused.pipeline.unet, stock.unet)


def test_two_models_with_one_overlay_share_what_it_makes(home: Path, tmp_path: Path) -> None:
    file = lora_of(sdxl_pipeline(seed=1), tmp_path)
    store = ComponentStore()
    one = load(store, overlaid(home, "sdxl", file, kind="lora"), home)
    other = load(store, overlaid(home, "sdxl", file, kind="lora"), home)
    assert one.pipeline.unet is other.pipeline.unet
    assert store.bytes_freed_by(one) == 0


def test_a_wrong_file_is_named_with_its_model(home: Path, tmp_path: Path) -> None:
    unet, lora = tmp_path / "unet.safetensors", lora_of(sdxl_pipeline(seed=1), tmp_path)
    save_file(sd_pipeline(seed=1).unet.state_dict(), unet)
    other = lora_of(sd_pipeline(seed=1), tmp_path, width=48)
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(lora.read_bytes()[:100])
    store = ComponentStore()
    for file, kind, told in (
        (unet, "denoiser", "no whole unet for overlaid"),
        (lora, "denoiser", "no whole unet for overlaid"),
        (unet, "lora", "does not fit the unet of overlaid"),
        (other, "lora", "does not fit the unet of overlaid"),
        (torn, "lora", "no safetensors file, or a torn one"),
    ):
        with pytest.raises(UnusableWeights, match=told) as caught:
            load(store, overlaid(home, "sdxl", file, kind=kind), home)
        assert str(file) in caught.value.message
        assert len(caught.value.message) < 1500
    assert store.bytes == 0


def test_an_overlay_that_is_not_there_is_named(home: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotOnDisk, match=r"overlaid needs .*none.safetensors, which is not there"):
        load(ComponentStore(), overlaid(home, "sdxl", tmp_path / "none.safetensors"), home)


def lora_of(
    pipeline: Any,
    folder: Path,
    *,
    form: str = "diffusers",
    encoders: tuple[str, ...] = (),
    width: int | None = None,
) -> Path:
    """A random LoRA for the attention of the pipeline's denoiser and encoders, as trainers save it."""
    torch.manual_seed(9)
    state: dict[str, torch.Tensor] = {}
    for name in (denoiser(pipeline), *encoders):
        for path, layer in getattr(pipeline, name).named_modules():
            if path.endswith(("to_q", "to_out.0", "q_proj", "out_proj")):
                state |= _layer(name, path, layer, form, width)
    file = folder / f"{form}.{width}.safetensors"
    save_file(state, file)
    return file


def _layer(name: str, path: str, layer: Any, form: str, width: int | None) -> dict[str, torch.Tensor]:
    down = 0.3 * torch.randn(RANK, width or layer.in_features)
    up = 0.3 * torch.randn(layer.out_features, RANK)
    if form == "diffusers":
        return {f"{name}.{path}.lora_A.weight": down, f"{name}.{path}.lora_B.weight": up}
    prefix = {"unet": "lora_unet", "text_encoder_2": "lora_te2"}[name]
    path = path if name == "unet" or path.startswith("text_model") else f"text_model.{path}"
    key = f"{prefix}_{path.replace('.', '_')}"
    alpha = torch.tensor(RANK / 2)
    return {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, f"{key}.alpha": alpha}


def denoiser(pipeline: Any) -> str:
    return "unet" if hasattr(pipeline, "unet") else "transformer"
