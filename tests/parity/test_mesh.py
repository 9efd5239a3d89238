"""Shap-E against its stock pipelines: the latents of samples in company, and the surface made of them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from diffusers import ShapEImg2ImgPipeline, ShapEPipeline
from entries import entry, load
from mesh_pipelines import fill_tables, shap_e_img2img_pipeline, shap_e_pipeline
from oracle import CATALOG, alone, batched, photograph
from PIL import Image
from scipy.spatial import cKDTree

from jubako.errors import GenerationFailed, InvalidRequest
from jubako.families.mesh import ShapE, wrap
from jubako.job import Job, Solid
from jubako.weights.components import ComponentStore

# Steps, guidance, and guidance of 1 and less, which takes one row.
SETTINGS = list(itertools.product((4, 7, 12), (15.0, 3.0, 1.0)))
HEAVY = ("prior", "text_encoder", "image_encoder", "shap_e_renderer")
PIPELINES: dict[str, Callable[[], Any]] = {
    "shap-e": shap_e_pipeline,
    "shap-e-img2img": shap_e_img2img_pipeline,
}

_numbers = itertools.count()


@pytest.fixture(scope="module")
def models() -> dict[str, ShapE]:
    return {name: wrap(pipeline(), CATALOG.model(name)) for name, pipeline in PIPELINES.items()}


def job(model: str, **fields: Any) -> Job:
    """A job of that model; what is not given has a small value."""
    number = next(_numbers)
    given: dict[str, Any] = {
        "id": f"{number}",
        "task": "txt2mesh",
        "family": "mesh",
        "model": model,
        "prompt": f"a red chair {number}",
        "negative_prompt": "",
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
        "scheduler": "HeunDiscreteScheduler",
        "seed": 2000 + number,
        "solid": Solid(grid_size=16, frame_size=32, turntable=False),
        "output_format": "glb",
        "output_compression": 90,
    }
    if model == "shap-e-img2img":
        given |= {"task": "img2mesh", "prompt": "", "image": photograph()}
    return Job.model_validate(given | fields)


def stock(pipeline: Any, job: Job) -> torch.Tensor:
    """The latents [n, d] of one call of the stock pipeline."""
    asked: Any = job.prompt if job.image is None else Image.open(io.BytesIO(job.image))
    latents: torch.Tensor = pipeline(
        asked,
        num_inference_steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        generator=torch.Generator("cpu").manual_seed(job.seed),
        output_type="latent",
    ).images[0]
    return latents


def apart(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("name", PIPELINES)
def test_samples_in_company_equal_the_stock_pipeline(models: dict[str, Any], name: str) -> None:
    jobs = [job(name, num_inference_steps=steps, guidance_scale=guidance) for steps, guidance in SETTINGS]
    expected = [stock(models[name].pipeline, one) for one in jobs]
    for ours, theirs in zip(batched(models, jobs), expected, strict=True):
        assert apart(ours.picture, theirs) < 1e-3


def test_models_of_prompts_and_of_pictures_share_one_batcher(models: dict[str, Any]) -> None:
    jobs = [job(name, num_inference_steps=steps) for steps in (3, 6) for name in PIPELINES]
    expected = [stock(models[one.model].pipeline, one) for one in jobs]
    for ours, theirs in zip(batched(models, jobs), expected, strict=True):
        assert apart(ours.picture, theirs) < 1e-3


@pytest.mark.parametrize("name", PIPELINES)
def test_a_sample_alone_equals_the_stock_pipeline_bit_for_bit(models: dict[str, Any], name: str) -> None:
    one = job(name, num_inference_steps=7)
    assert torch.equal(alone(models, one).picture, stock(models[name].pipeline, one))


def test_heun_takes_two_forwards_a_step_but_the_last(models: dict[str, Any]) -> None:
    sample = models["shap-e"].prepare(job("shap-e", num_inference_steps=64))
    assert len(sample.schedule) == 127
    assert models["shap-e"].preview(sample.latents) is None


def test_the_surface_is_that_of_the_stock_decoder(models: dict[str, Any]) -> None:
    model, grid = models["shap-e"], 24
    latents = stock(model.pipeline, job("shap-e"))
    ours = model.surface(latents, grid)
    renderer = shap_e_pipeline().shap_e_renderer  # of the same weights; decoding writes into it
    fill_tables(renderer.mesh_decoder)
    theirs = renderer.decode_to_mesh(latents[None], "cpu", grid_size=grid)
    # The stock decoder lays the grid with its border of one point over the box that the grid alone fills.
    vertices = theirs.verts.numpy() * (grid + 1) / (grid - 1)
    distances, _ = cKDTree(ours.vertices).query(vertices)
    assert distances.max() < 1e-4
    # Marching cubes as the stock decoder does it leaves a few ambiguous cells to chance.
    assert len(vertices) <= len(ours.vertices) < len(vertices) * 1.02
    volumes = [
        trimesh.Trimesh(*mesh, process=False).volume
        for mesh in ((ours.vertices, ours.faces), (vertices, theirs.faces.numpy()))
    ]
    assert volumes[0] > 0
    assert volumes[0] == pytest.approx(volumes[1], rel=0.005)


def test_colours_are_those_that_the_field_has_at_the_vertices(models: dict[str, Any]) -> None:
    model = models["shap-e"]
    latents = stock(model.pipeline, job("shap-e"))
    ours = model.surface(latents, 12)
    renderer = shap_e_pipeline().shap_e_renderer
    fill_tables(renderer.mesh_decoder)
    renderer.decode_to_mesh(latents[None], "cpu", grid_size=8)  # leaves the object's weights in its network
    answer = renderer.mlp(
        position=torch.from_numpy(ours.vertices)[None], direction=None, ts=None, rendering_mode="stf"
    )
    assert np.abs(answer.channels[0].detach().numpy() - ours.colours).max() < 1e-5


def test_decoding_changes_nothing_of_the_pipeline(models: dict[str, Any]) -> None:
    model = models["shap-e"]
    before = {name: tensor.clone() for name, tensor in model.pipeline.shap_e_renderer.state_dict().items()}
    one = job("shap-e")
    first = model.finish(stock(model.pipeline, one), one, {})
    other = job("shap-e")
    model.finish(stock(model.pipeline, other), other, {})
    after = model.pipeline.shap_e_renderer.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert model.finish(stock(model.pipeline, one), one, {}) == first


def test_jobs_finished_at_the_same_time_are_not_mixed_up(models: dict[str, Any]) -> None:
    model = models["shap-e"]
    jobs = [job("shap-e") for _ in range(6)]
    latents = [stock(model.pipeline, one) for one in jobs]
    expected = [model.finish(decoded, one, {}) for decoded, one in zip(latents, jobs, strict=True)]
    with ThreadPoolExecutor(3) as threads:
        assert (
            list(threads.map(lambda pair: model.finish(*pair, {}), zip(latents, jobs, strict=True)))
            == expected
        )


def test_a_finished_object_is_an_upright_mesh_in_the_models_box(models: dict[str, Any]) -> None:
    model, one = models["shap-e-img2img"], job("shap-e-img2img")
    latents = stock(model.pipeline, one)
    finished = model.finish(latents, one, {"commit": "abc"})
    assert finished.file.content_type == "model/gltf-binary"
    mesh = trimesh.load_mesh(io.BytesIO(finished.file.content), file_type="glb", process=False)
    flat = model.surface(latents, 16).vertices
    assert np.allclose(mesh.vertices, np.stack([flat[:, 0], flat[:, 2], -flat[:, 1]], axis=1), atol=1e-6)
    assert np.abs(mesh.vertices).max() <= 1 + 2 / 15


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Repositories as they lie on disk; both have the same renderer."""
    folder = tmp_path_factory.mktemp("mesh")
    text, picture = shap_e_pipeline(), shap_e_img2img_pipeline()
    picture.shap_e_renderer = text.shap_e_renderer
    text.save_pretrained(folder / "shap-e")
    picture.save_pretrained(folder / "shap-e-img2img")
    return folder


def test_models_of_folders_share_a_renderer_and_equal_the_stock_pipelines(folders: Path) -> None:
    store, loaded = ComponentStore(), {}
    for name in PIPELINES:
        model = entry(name, name, folder=folders / name)
        assembly = load(store, model, folders)
        assert set(assembly.parts) == {name for name in assembly.pipeline.components if name in HEAVY}
        loaded[name] = wrap(assembly.pipeline, model)
    assert loaded["shap-e"].pipeline.shap_e_renderer is loaded["shap-e-img2img"].pipeline.shap_e_renderer
    for name, kind in (("shap-e", ShapEPipeline), ("shap-e-img2img", ShapEImg2ImgPipeline)):
        oracle = kind.from_pretrained(folders / name)
        oracle.set_progress_bar_config(disable=True)
        one = job(name)
        models: dict[str, Any] = loaded
        assert torch.equal(alone(models, one).picture, stock(oracle, one))


def test_half_precision_gives_an_object_as_well(folders: Path) -> None:
    model = entry("shap-e", "shap-e", folder=folders / "shap-e")
    loaded: dict[str, Any] = {
        "shap-e": wrap(load(ComponentStore(), model, folders, torch.float16).pipeline, model)
    }
    one = job("shap-e", num_inference_steps=8)
    latents = alone(loaded, one).picture
    assert latents.dtype == torch.float16
    assert loaded["shap-e"].finish(latents, one, {}).file.content[:4] == b"glTF"


def test_an_object_without_a_surface_is_an_error_that_says_so() -> None:
    pipeline = shap_e_pipeline()
    with torch.no_grad():
        pipeline.shap_e_renderer.mlp.mlp[-1].bias[0] -= 100
    model, one = wrap(pipeline, CATALOG.model("shap-e")), job("shap-e")
    with pytest.raises(GenerationFailed, match="empty object came out; try another seed or prompt"):
        model.finish(stock(pipeline, one), one, {})


def test_there_is_no_refiner(models: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="refiner"):
        models["shap-e"].prepare_refinement(job("shap-e"))
