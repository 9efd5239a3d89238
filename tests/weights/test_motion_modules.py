"""The denoiser of AnimateDiff from a folder and a file of motion modules, against diffusers' own way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, MotionAdapter, UNetMotionModel
from entries import entry, load, same
from pipelines import sd_pipeline
from safetensors.torch import load_file, save_file
from video_pipelines import motion_adapter

from jubako.catalog import Model, load_catalog
from jubako.engine.schedule import make_scheduler
from jubako.errors import UnusableWeights
from jubako.weights.components import ComponentStore
from jubako.weights.motion import adapter_config
from jubako.weights.recipe import estimated_bytes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion, and motion modules for it as a file alone."""
    folder = tmp_path_factory.mktemp("home")
    sd_pipeline(seed=1).save_pretrained(folder / "sd")
    save_file(motion_adapter().state_dict(), folder / "motion.safetensors")
    return folder


def moving(home: Path, file: Path) -> Model:
    overlay = {"file": str(file), "kind": "motion"}
    return entry("moving", "animatediff", folder=home / "sd", overlay=overlay)


def expected(adapter: MotionAdapter) -> Any:
    return UNetMotionModel.from_unet2d(sd_pipeline(seed=1).unet, adapter)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_motion_modules_are_put_in_as_diffusers_does_and_the_base_stays(
    home: Path, dtype: torch.dtype
) -> None:
    store = ComponentStore()
    base = load(store, entry("base", "sd1.5", folder=home / "sd"), home, dtype)
    model = moving(home, home / "motion.safetensors")
    assembly = load(store, model, home, dtype)
    unet, theirs = assembly.pipeline.unet, expected(motion_adapter()).to(dtype)
    assert type(assembly.pipeline).__name__ == "AnimateDiffPipeline"
    assert same(unet, theirs)
    assert json.loads(unet.to_json_string()) == json.loads(theirs.to_json_string())
    assert not any(each.is_meta or each.requires_grad or each.dtype != dtype for each in unet.parameters())
    assert not unet.training
    assert same(base.pipeline.unet, sd_pipeline(seed=1).unet.to(dtype))
    for name in ("text_encoder", "vae"):
        assert getattr(assembly.pipeline, name) is getattr(base.pipeline, name)
    assert estimated_bytes(model, home, dtype) == pytest.approx(store.bytes_of(assembly), rel=0.02)


@pytest.mark.parametrize(
    "config", [{}, {"use_motion_mid_block": True}, {"motion_transformer_layers_per_block": 2}]
)
def test_the_file_alone_tells_the_config(home: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    adapter = motion_adapter(**config)
    file = tmp_path / "motion.safetensors"
    save_file(adapter.state_dict(), file)
    told = MotionAdapter.from_config(adapter_config(file))
    assert {name: tensor.shape for name, tensor in told.state_dict().items()} == {
        name: tensor.shape for name, tensor in adapter.state_dict().items()
    }
    unet = load(ComponentStore(), moving(home, file), home).pipeline.unet
    assert same(unet, expected(adapter))


def test_a_config_beside_the_file_is_read(home: Path, tmp_path: Path) -> None:
    adapter = motion_adapter(motion_num_attention_heads=4)
    adapter.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    assert adapter_config(file)["motion_num_attention_heads"] == 4
    unet = load(ComponentStore(), moving(home, file), home).pipeline.unet
    assert unet.config.motion_num_attention_heads == 4
    assert same(unet, expected(adapter))


def test_places_in_the_clip_need_not_be_in_the_file(home: Path, tmp_path: Path) -> None:
    state = {
        name: tensor for name, tensor in motion_adapter().state_dict().items() if "pos_embed" not in name
    }
    save_file(state, tmp_path / "motion.safetensors")
    unet = load(ComponentStore(), moving(home, tmp_path / "motion.safetensors"), home).pipeline.unet
    places = [tensor for name, tensor in unet.state_dict().items() if name.endswith("pos_embed.pe")]
    assert places
    assert all(tensor.shape[1] == 32 and tensor.abs().sum() > 0 for tensor in places)


def test_the_scheduler_is_animatediff_s_and_not_that_of_the_base(home: Path) -> None:
    shipped = load_catalog().model("animatediff")
    overlay = {"file": str(home / "motion.safetensors"), "kind": "motion"}
    model = entry(
        "moving",
        "animatediff",
        scheduler_config=shipped.scheduler_config,
        folder=home / "sd",
        overlay=overlay,
    )
    config = load(ComponentStore(), model, home).pipeline.scheduler.config
    ours = make_scheduler(config, shipped.defaults.scheduler)
    theirs = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="linear",
        steps_offset=1,
        clip_sample=False,
        set_alpha_to_one=False,
        timestep_spacing="linspace",
    )
    for scheduler in (ours, theirs):
        scheduler.set_timesteps(25)
    assert torch.equal(ours.alphas_cumprod, theirs.alphas_cumprod)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    names = ("clip_sample", "steps_offset", "set_alpha_to_one", "prediction_type")
    assert [ours.config[name] for name in names] == [theirs.config[name] for name in names]


def test_a_wrong_file_is_named_with_its_model(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "wrong.safetensors"
    whole = load_file(home / "motion.safetensors")
    lacking = {name: tensor for name, tensor in whole.items() if not name.endswith("proj_out.weight")}
    for state, told in (
        (lacking, "do not fit the unet of moving"),
        (whole | {"more.weight": torch.ones(1)}, "do not fit the unet of moving"),
        (MotionAdapter(block_out_channels=(32,), motion_norm_num_groups=8).state_dict(), "do not fit"),
        ({"lora.weight": torch.ones(1)}, "holds no motion modules"),
    ):
        save_file(state, file)
        with pytest.raises(UnusableWeights, match=told) as caught:
            load(ComponentStore(), moving(home, file), home)
        assert str(file) in caught.value.message
