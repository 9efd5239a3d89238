"""SV3D_u from the file that was published, over Stable Video Diffusion's folder; and SVD's own parts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints_sv3d import original_sv3d
from entries import entry, load, same
from safetensors.torch import save_file
from video_pipelines import frame_autoencoder, svd_pipeline, video_unet

from jubako.catalog import Model
from jubako.errors import UnusableWeights
from jubako.weights.components import ComponentStore
from jubako.weights.recipe import estimated_bytes


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Video Diffusion."""
    folder = tmp_path_factory.mktemp("home")
    svd_pipeline(seed=1).save_pretrained(folder / "svd")
    return folder


def orbiting(home: Path, file: Path) -> Model:
    return entry("orbiting", "sv3d-u", folder=home / "svd", overlay={"file": str(file), "kind": "original"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("post_quant_conv", [False, True])
def test_the_published_file_gives_the_denoiser_and_the_autoencoder(
    home: Path, tmp_path: Path, dtype: torch.dtype, post_quant_conv: bool
) -> None:
    torch.manual_seed(2)
    unet, vae = video_unet(numbers=1), frame_autoencoder(use_post_quant_conv=post_quant_conv)
    save_file(original_sv3d(unet, vae), tmp_path / "sv3d_u.safetensors")
    store = ComponentStore()
    below = load(store, entry("below", "svd", folder=home / "svd"), home, dtype)
    model = orbiting(home, tmp_path / "sv3d_u.safetensors")
    assembly = load(store, model, home, dtype)
    pipeline = assembly.pipeline
    assert type(pipeline).__name__ == "StableVideo3DPipeline"
    assert same(pipeline.unet, unet.to(dtype))
    assert pipeline.unet.add_embedding.linear_1.in_features == 8
    # In float16 it would overflow, as Stable Video Diffusion's does.
    assert same(pipeline.vae, vae)
    assert pipeline.vae.dtype == below.pipeline.vae.dtype == torch.float32
    assert pipeline.vae.config.scaling_factor == below.pipeline.vae.config.scaling_factor
    assert pipeline.image_encoder is below.pipeline.image_encoder
    for module in (pipeline.unet, pipeline.vae):
        assert not module.training
        assert not any(each.is_meta or each.requires_grad for each in module.parameters())
    assert estimated_bytes(model, home, dtype) == pytest.approx(store.bytes_of(assembly), rel=0.02)


def test_the_folders_own_denoiser_and_autoencoder_are_not_read(home: Path, tmp_path: Path) -> None:
    svd_pipeline(seed=1).save_pretrained(tmp_path / "svd")
    for name in ("unet", "vae"):
        (tmp_path / "svd" / name / "diffusion_pytorch_model.safetensors").unlink()
    unet = video_unet(numbers=1)
    save_file(original_sv3d(unet, frame_autoencoder()), tmp_path / "sv3d_u.safetensors")
    model = orbiting(tmp_path, tmp_path / "sv3d_u.safetensors")
    assert same(load(ComponentStore(), model, home).pipeline.unet, unet)


def test_another_file_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    whole = original_sv3d(video_unet(numbers=1), frame_autoencoder())
    lacking = {name: tensor for name, tensor in whole.items() if "middle_block.1.time_stack" not in name}
    without_decoder = {name: tensor for name, tensor in whole.items() if "first_stage" not in name}
    for state, part in ((lacking, "unet"), ({"a": torch.ones(1)}, "unet"), (without_decoder, "vae")):
        save_file(state, file)
        with pytest.raises(UnusableWeights, match=f"no SV3D_u with a {part} for orbiting") as caught:
            load(ComponentStore(), orbiting(home, file), home)
        assert str(file) in caught.value.message


def test_svd_s_autoencoder_runs_in_float32_where_its_config_asks_for_it(home: Path, tmp_path: Path) -> None:
    svd_pipeline(seed=1, force_upcast=False).save_pretrained(tmp_path / "svd")
    for folder, dtype in ((home / "svd", torch.float32), (tmp_path / "svd", torch.float16)):
        pipeline = load(ComponentStore(), entry("svd", "svd", folder=folder), home, torch.float16).pipeline
        assert pipeline.vae.dtype == dtype
        assert pipeline.unet.dtype == pipeline.image_encoder.dtype == torch.float16
