"""Loading through the store: what is shared, counted and freed, and in which precision components come."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from entries import CPU, entry, load, same
from pipelines import refiner_pipeline, sd3_pipeline, sd_pipeline, sdxl_pipeline
from safetensors.torch import load_file, save_file

from jubako.errors import ModelNotOnDisk, UnusableWeights
from jubako.weights.components import ComponentStore
from jubako.weights.recipe import estimated_bytes

SHARED = ("text_encoder", "text_encoder_2", "vae")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a Turbo that differs in its UNet and was saved by an older program, and the base's refiner."""
    folder = tmp_path_factory.mktemp("sdxl")
    base = sdxl_pipeline(seed=1)
    base.save_pretrained(folder / "base")
    refiner_pipeline(base).save_pretrained(folder / "refiner")
    turbo = sdxl_pipeline("sdxl-turbo", seed=1)
    turbo.unet = sdxl_pipeline(seed=2).unet
    turbo.save_pretrained(folder / "turbo")
    for name in ("vae", "text_encoder"):
        _age(folder / "turbo" / name / "config.json")
    return folder


def _age(file: Path) -> None:
    """Make a config look like one of another age: other names and versions, defaults left out."""
    config = json.loads(file.read_text())
    config |= {
        "_name_or_path": "../sdxl-vae/",
        "_diffusers_version": "0.20.0.dev0",
        "transformers_version": "4.29",
    }
    for default in ("act_fn", "attention_dropout", "mid_block_add_attention"):
        config.pop(default, None)
    file.write_text(json.dumps(config))


def _stored_at(module: torch.nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in module.parameters()}


def test_models_share_the_components_that_are_the_same(folders: Path) -> None:
    store = ComponentStore()
    base = load(store, entry("base", "sdxl", folder=folders / "base"), folders)
    turbo = load(store, entry("turbo", "sdxl-turbo", folder=folders / "turbo"), folders)
    refiner = load(store, entry("refiner", "sdxl-refiner", folder=folders / "refiner"), folders)
    for name in SHARED:
        ours, theirs = getattr(base.pipeline, name), getattr(turbo.pipeline, name)
        assert _stored_at(ours) == _stored_at(theirs), name
    assert refiner.pipeline.text_encoder is None
    assert refiner.pipeline.text_encoder_2 is base.pipeline.text_encoder_2
    assert refiner.pipeline.vae is base.pipeline.vae
    unets = [each.pipeline.unet for each in (base, turbo, refiner)]
    assert not _stored_at(unets[0]) & _stored_at(unets[1])
    counted = sum(_bytes(module) for module in (*unets, *(getattr(base.pipeline, name) for name in SHARED)))
    assert store.bytes == counted


def test_a_shared_component_lives_until_its_last_user_is_released(folders: Path) -> None:
    store = ComponentStore()
    base = load(store, entry("base", "sdxl", folder=folders / "base"), folders)
    turbo = load(store, entry("turbo", "sdxl-turbo", folder=folders / "turbo"), folders)
    vae, unet = weakref.ref(base.pipeline.vae), weakref.ref(base.pipeline.unet)
    own = _bytes(base.pipeline.unet)
    assert store.bytes_freed_by(base) == own
    assert store.bytes_of(base) == own + sum(_bytes(getattr(base.pipeline, name)) for name in SHARED)
    before = store.bytes

    store.release(base)
    store.release(base)
    assert store.bytes == before - own == store.bytes_of(turbo) == store.bytes_freed_by(turbo)
    assert store.bytes_freed_by(base) == 0
    del base
    gc.collect()
    assert unet() is None
    assert vae() is turbo.pipeline.vae

    store.release(turbo)
    assert store.bytes == 0
    del turbo
    gc.collect()
    assert vae() is None


def test_the_pipeline_draws_what_the_stock_one_draws(folders: Path) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(folders / "turbo")
    store = ComponentStore()
    load(store, entry("base", "sdxl", folder=folders / "base"), folders)
    ours = load(store, entry("turbo", "sdxl-turbo", folder=folders / "turbo"), folders).pipeline
    assert not any(
        module.training for module in ours.components.values() if isinstance(module, torch.nn.Module)
    )
    assert type(ours.scheduler) is type(stock.scheduler)
    assert torch.equal(_drawn(ours), _drawn(stock))


def test_another_precision_or_content_is_another_component(folders: Path, tmp_path: Path) -> None:
    store = ComponentStore()
    model = entry("base", "sdxl", folder=folders / "base")
    wide = load(store, model, folders).pipeline
    narrow = load(store, model, folders, torch.bfloat16).pipeline
    assert wide.vae.dtype == torch.float32
    assert narrow.vae.dtype == narrow.unet.dtype == narrow.text_encoder.dtype == torch.bfloat16
    copy = shutil.copytree(folders / "base", tmp_path / "copy")
    assert load(store, entry("copy", "sdxl", folder=copy), folders).pipeline.vae is wide.vae
    sdxl_pipeline(seed=5).vae.save_pretrained(copy / "vae")
    assert load(store, entry("copy", "sdxl", folder=copy), folders).pipeline.vae is not wide.vae


def test_a_vae_that_overflows_in_float16_is_loaded_in_float32(folders: Path, tmp_path: Path) -> None:
    store = ComponentStore()
    pipeline = load(store, entry("base", "sdxl", folder=folders / "base"), folders, torch.float16).pipeline
    assert pipeline.vae.dtype == torch.float32
    assert pipeline.unet.dtype == pipeline.text_encoder_2.dtype == torch.float16
    copy = shutil.copytree(folders / "base", tmp_path / "copy")
    config = json.loads((copy / "vae" / "config.json").read_text())
    (copy / "vae" / "config.json").write_text(json.dumps({**config, "force_upcast": False}))
    assert (
        load(store, entry("copy", "sdxl", folder=copy), folders, torch.float16).pipeline.vae.dtype
        == torch.float16
    )


def test_other_families_do_not_heed_force_upcast(tmp_path: Path) -> None:
    sd_pipeline().save_pretrained(tmp_path / "sd")
    config = json.loads((tmp_path / "sd" / "vae" / "config.json").read_text())
    assert config["force_upcast"] is True
    model = entry("plain", "sd1.5", folder=tmp_path / "sd")
    assert load(ComponentStore(), model, tmp_path, torch.float16).pipeline.vae.dtype == torch.float16


def test_scheduler_config_is_laid_over_that_of_the_weights(folders: Path) -> None:
    store = ComponentStore()
    changes = {"timestep_spacing": "trailing", "prediction_type": "sample"}
    model = entry("one", "sdxl", folder=folders / "base", scheduler_config=changes)
    config = load(store, model, folders).pipeline.scheduler.config
    plain = load(store, entry("base", "sdxl", folder=folders / "base"), folders).pipeline.scheduler.config
    assert (config.timestep_spacing, config.prediction_type) == ("trailing", "sample")
    assert {key: value for key, value in config.items() if key not in changes} == {
        key: value for key, value in plain.items() if key not in changes
    }
    assert plain.timestep_spacing == "leading"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_estimate_is_what_it_takes(folders: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    sd3_pipeline().save_pretrained(tmp_path / "sd3")
    for model in (
        entry("base", "sdxl", folder=folders / "base"),
        entry("sd3", "sd3-medium", folder=tmp_path / "sd3"),
    ):
        store = ComponentStore()
        taken = store.bytes_of(load(store, model, folders, dtype))
        # Positions and the like are buffers that no file holds.
        assert estimated_bytes(model, folders, dtype) == pytest.approx(taken, rel=0.02)


def test_progress_rises_from_nothing_to_all(folders: Path) -> None:
    heard: list[float] = []
    ComponentStore().load(
        entry("base", "sdxl", folder=folders / "base"), folders, CPU, torch.float32, heard.append
    )
    assert heard[0] == 0
    assert heard[-1] == 1
    assert heard == sorted(heard)
    assert len(set(heard)) == 5


def test_t5_is_neither_read_nor_counted_when_left_out(tmp_path: Path) -> None:
    sd3_pipeline().save_pretrained(tmp_path / "sd3")
    (tmp_path / "sd3" / "text_encoder_3" / "model.safetensors").write_bytes(b"not read")
    shutil.rmtree(tmp_path / "sd3" / "tokenizer_3")
    model = entry("sd3", "sd3-medium", folder=tmp_path / "sd3", text_encoder_3=False)
    store = ComponentStore()
    loaded = load(store, model, tmp_path)
    assert loaded.pipeline.text_encoder_3 is loaded.pipeline.tokenizer_3 is None
    assert "text_encoder_3" not in loaded.parts
    assert estimated_bytes(model, tmp_path, torch.float32) == pytest.approx(store.bytes, rel=0.02)
    stock = sd3_pipeline(t5=False)
    assert torch.equal(_drawn(loaded.pipeline), _drawn(stock))


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_shards_and_variants_load(tmp_path: Path, variant: str | None) -> None:
    pipeline = sd3_pipeline(seed=3)
    decoy = sd3_pipeline(seed=4)
    decoy.save_pretrained(tmp_path / "sd3", variant="ema")
    pipeline.save_pretrained(tmp_path / "sd3", variant=variant, max_shard_size="40KB")
    names = {path.name for path in (tmp_path / "sd3" / "text_encoder_3").iterdir()}
    index = f"model.safetensors.index.{variant}.json" if variant else "model.safetensors.index.json"
    assert index in names
    loaded = load(
        ComponentStore(), entry("sd3", "sd3-medium", folder=tmp_path / "sd3", variant=variant), tmp_path
    )
    for name in ("text_encoder", "text_encoder_3", "transformer", "vae"):
        assert same(getattr(loaded.pipeline, name), getattr(pipeline, name)), name


def test_a_component_without_the_variant_comes_plain(tmp_path: Path) -> None:
    sd_pipeline(seed=1).save_pretrained(tmp_path / "sd")
    half = sd_pipeline(seed=2)
    half.unet.save_pretrained(tmp_path / "sd" / "unet", variant="fp16")
    loaded = load(ComponentStore(), entry("sd", "sd1.5", folder=tmp_path / "sd", variant="fp16"), tmp_path)
    assert same(loaded.pipeline.unet, half.unet)
    assert same(loaded.pipeline.vae, sd_pipeline(seed=1).vae)


def test_a_file_of_the_hubs_cache_is_known_by_its_name(folders: Path, tmp_path: Path) -> None:
    """As in the cache: the snapshot's files are links to blobs named by their SHA-256, so none is hashed."""
    blobs, links = tmp_path / "blobs", shutil.copytree(folders / "base", tmp_path / "snapshots" / "c")
    blobs.mkdir()
    for number, file in enumerate(sorted(links.rglob("*.safetensors"))):
        blob = blobs / f"{number:064x}"
        file.replace(blob)
        file.symlink_to(blob)
    loaded = load(ComponentStore(), entry("base", "sdxl", folder=links), tmp_path)
    assert f"{2:064x}" in str(loaded.parts["unet"])


def test_a_load_that_fails_leaves_nothing_behind(folders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folders / "base", tmp_path / "copy")
    torn = copy / "vae" / "diffusion_pytorch_model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-100])
    store = ComponentStore()
    with pytest.raises(UnusableWeights, match="/copy/vae: the vae can't be read"):
        load(store, entry("torn", "sdxl", folder=copy), tmp_path)
    assert store.bytes == 0
    whole = load(store, entry("base", "sdxl", folder=folders / "base"), tmp_path)
    assert store.bytes == store.bytes_freed_by(whole)


def test_a_folder_of_pickles_is_refused(folders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folders / "base", tmp_path / "copy")
    weights = copy / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(
        UnusableWeights, match=r"unet: pickled has no safetensors .* only diffusion_pytorch_model.bin"
    ):
        load(ComponentStore(), entry("pickled", "sdxl", folder=copy), tmp_path)


def test_a_folder_names_no_code_of_its_own(folders: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folders / "base", tmp_path / "copy")
    index: dict[str, Any] = json.loads((copy / "model_index.json").read_text())
    index["vae"] = ["subprocess", "Popen"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        UnusableWeights, match=r"subprocess.Popen, which is no class of diffusers or transformers"
    ):
        load(ComponentStore(), entry("evil", "sdxl", folder=copy), tmp_path)


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelNotOnDisk, match="jubako pull sdxl"):
        load(ComponentStore(), entry("sdxl", "sdxl", repo="somebody/sdxl"), tmp_path)


def test_tensors_that_a_file_lacks_are_not_made_up(folders: Path, tmp_path: Path) -> None:
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model"):
        copy = shutil.copytree(folders / "base", tmp_path / name)
        file = copy / f"{name}.safetensors"
        state = load_file(file)
        state.pop(min(state))
        save_file(state, file, {"format": "pt"})
        with pytest.raises(UnusableWeights, match="lacks 1 tensors, such as "):
            load(ComponentStore(), entry("holey", "sdxl", folder=copy), tmp_path)


def test_a_file_is_hashed_once(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = ComponentStore(), entry("base", "sdxl", folder=folders / "base")
    load(store, model, folders)
    monkeypatch.setattr("hashlib.file_digest", None)
    load(store, model, folders)


def _bytes(module: torch.nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


def _drawn(pipeline: Any) -> torch.Tensor:
    options = {"num_inference_steps": 2, "output_type": "pt", "width": 64, "height": 64}
    pipeline.set_progress_bar_config(disable=True)
    picture: torch.Tensor = pipeline(
        "a red star", generator=torch.Generator().manual_seed(7), **options
    ).images
    return picture
