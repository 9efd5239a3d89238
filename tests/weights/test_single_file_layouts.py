"""Checkpoints in the original layouts of SD 2, SD 3 and the SDXL refiner, with another model's configs."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import original
from entries import entry, load, same
from pipelines import refiner_pipeline, sd3_pipeline, sd_pipeline, sdxl_pipeline
from safetensors.torch import load_file, save_file

from jubako.catalog import Model
from jubako.errors import UnusableWeights
from jubako.weights.components import Assembly, ComponentStore
from jubako.weights.recipe import estimated_bytes

T5 = "text_encoders.t5xxl.transformer."
CLIP_L = "text_encoders.clip_l.transformer."
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


def sd2(seed: int) -> Any:
    """As SD 2: linear projections around the attentions, and a prediction of the velocity."""
    return sd_pipeline("sd2", seed, use_linear_projection=True)


def refiner(seed: int) -> Any:
    return refiner_pipeline(sdxl_pipeline(seed=seed), seed)


def sd3(seed: int) -> Any:
    """Text encoders of two widths, as they have; without a projection of its own, the first one's is 1."""
    pipeline = sd3_pipeline(seed, second=16)
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    return pipeline


def sd35_medium(seed: int) -> Any:
    pipeline = sd3_pipeline(seed, second=16, dual=(0, 1))
    torch.nn.init.eye_(pipeline.text_encoder.text_projection.weight)
    return pipeline


PIPELINES: dict[str, Any] = {
    "sd2.1": sd2,
    "sdxl-refiner": refiner,
    "sd3-medium": sd3,
    "sd3.5-medium": sd35_medium,
}
MODULES = {
    "sd2.1": ("unet", "vae", "text_encoder"),
    "sdxl-refiner": ("unet", "vae", "text_encoder_2"),
    "sd3-medium": ("transformer", "vae", *TEXT_ENCODERS),
    "sd3.5-medium": ("transformer", "vae", *TEXT_ENCODERS),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each kind, with other weights than the checkpoints."""
    folder = tmp_path_factory.mktemp("home")
    for kind, pipeline in PIPELINES.items():
        pipeline(1).save_pretrained(folder / kind)
        save_file(original(pipeline(2)), folder / f"{kind}.safetensors")
    return folder


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def read(home: Path, kind: str, state: dict[str, torch.Tensor] | None = None, **weights: Any) -> Assembly:
    """The kind's checkpoint, or this one, with the configs of the kind's folder."""
    if state is not None:
        save_file(state, home / "other.safetensors")
    return load(store_of(home, kind), mine(home, kind, "other" if state else kind, **weights), home)


def store_of(home: Path, kind: str) -> ComponentStore:
    return ComponentStore({kind: entry(kind, kind, folder=home / kind)})


def mine(home: Path, kind: str, file: str = "", **weights: Any) -> Model:
    return entry("mine", kind, file=home / f"{file or kind}.safetensors", config=kind, **weights)


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_tensor_arrives(home: Path, kind: str) -> None:
    wanted, got = PIPELINES[kind](2), read(home, kind)
    assert set(got.parts) == set(MODULES[kind])
    for name in MODULES[kind]:
        module = getattr(got.pipeline, name)
        assert same(module, getattr(wanted, name)), name
        assert not module.training


@pytest.mark.parametrize("kind", ["sd2.1", "sd3-medium", "sd3.5-medium"])
def test_the_picture_is_that_of_the_pipeline(home: Path, kind: str) -> None:
    options = {"num_inference_steps": 2, "output_type": "pt", "width": 64, "height": 64}
    pictures = [
        pipeline("a red star", generator=torch.Generator().manual_seed(7), **options).images
        for pipeline in (read(home, kind).pipeline, PIPELINES[kind](2))
    ]
    _assert_as_good_as_equal(pictures)


def test_the_picture_of_the_refiner_is_that_of_the_pipeline(home: Path) -> None:
    given = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    pictures = [
        pipeline(
            "a red star",
            image=given,
            num_inference_steps=4,
            strength=0.5,
            output_type="pt",
            generator=torch.Generator().manual_seed(7),
        ).images
        for pipeline in (read(home, "sdxl-refiner").pipeline, refiner(2))
    ]
    _assert_as_good_as_equal(pictures)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("kind", PIPELINES)
def test_the_estimate_is_what_it_takes(home: Path, kind: str, dtype: torch.dtype) -> None:
    store, model = store_of(home, kind), mine(home, kind)
    load(store, model, home, dtype)
    folder = {kind: entry(kind, kind, folder=home / kind)}
    assert estimated_bytes(model, home, dtype, folder) == pytest.approx(store.bytes, rel=0.02)


def test_without_text_encoders_those_of_the_folder_are_shared(home: Path) -> None:
    state = load_file(home / "sd3.5-medium.safetensors")
    bare = {name: each for name, each in state.items() if not name.startswith("text_encoders.")}
    save_file(bare, home / "bare.safetensors")
    store = store_of(home, "sd3.5-medium")
    below = load(store, entry("below", "sd3.5-medium", folder=home / "sd3.5-medium"), home)
    got = load(store, mine(home, "sd3.5-medium", "bare"), home)
    for name in TEXT_ENCODERS:
        assert getattr(got.pipeline, name) is getattr(below.pipeline, name)
    wanted = sd35_medium(2)
    assert same(got.pipeline.transformer, wanted.transformer)
    assert same(got.pipeline.vae, wanted.vae)


def test_without_text_encoders_a_folder_of_configs_is_not_enough(home: Path, tmp_path: Path) -> None:
    kind = "sd3.5-medium"
    shutil.copytree(home / kind, tmp_path / kind, ignore=shutil.ignore_patterns("*.safetensors"))
    state = load_file(home / f"{kind}.safetensors")
    save_file(state, tmp_path / f"{kind}.safetensors")
    assert same(read(tmp_path, kind).pipeline.text_encoder_3, sd35_medium(2).text_encoder_3)
    bare = {name: each for name, each in state.items() if not name.startswith("text_encoders.")}
    with pytest.raises(UnusableWeights, match=r"the weights of its text_encoder.* are neither in .* nor in"):
        read(tmp_path, kind, bare)


def test_without_t5_it_comes_from_the_folder(home: Path) -> None:
    state = load_file(home / "sd3-medium.safetensors")
    got = read(home, "sd3-medium", {name: each for name, each in state.items() if not name.startswith(T5)})
    assert same(got.pipeline.text_encoder_3, sd3(1).text_encoder_3)
    assert same(got.pipeline.text_encoder_2, sd3(2).text_encoder_2)


@pytest.mark.parametrize("held", [True, False])
def test_t5_is_left_out_on_wish(home: Path, held: bool) -> None:
    state = load_file(home / "sd3-medium.safetensors")
    kept = {name: each for name, each in state.items() if held or not name.startswith(T5)}
    got = read(home, "sd3-medium", kept, text_encoder_3=False)
    assert got.pipeline.text_encoder_3 is None
    assert got.pipeline.tokenizer_3 is None
    assert set(got.parts) == set(MODULES["sd3-medium"]) - {"text_encoder_3"}


def test_t5_s_table_of_words_may_be_there_twice_and_is_one_in_memory(home: Path) -> None:
    state = load_file(home / "sd3-medium.safetensors")
    again = {f"{T5}encoder.embed_tokens.weight": state[f"{T5}shared.weight"].clone()}
    for stored in (state, state | again):
        encoder = read(home, "sd3-medium", stored).pipeline.text_encoder_3
        assert same(encoder, sd3(2).text_encoder_3)
        assert encoder.shared.weight is encoder.encoder.embed_tokens.weight


def test_a_t5_in_eight_bits_is_widened(home: Path) -> None:
    state = load_file(home / "sd3-medium.safetensors")
    narrow = {name: each.to(torch.float8_e4m3fn) for name, each in state.items() if name.startswith(T5)}
    encoder = read(home, "sd3-medium", state | narrow).pipeline.text_encoder_3
    for name, tensor in narrow.items():
        assert torch.equal(encoder.state_dict()[name.removeprefix(T5)], tensor.float()), name


def test_the_first_text_encoder_s_projection_is_the_file_s_and_else_1(home: Path) -> None:
    name = f"{CLIP_L}text_projection.weight"
    state = load_file(home / "sd3-medium.safetensors")
    held = torch.rand(32, 32)
    bare = {other: each for other, each in state.items() if other != name}
    for stored, wanted in ((bare | {name: held}, held), (bare, torch.eye(32))):
        got = read(home, "sd3-medium", stored).pipeline.text_encoder.text_projection
        assert torch.equal(got.weight, wanted)


def test_names_or_numbers_that_are_not_understood_are_refused(home: Path) -> None:
    state = load_file(home / "sd3-medium.safetensors")
    bare = {name: each for name, each in state.items() if not name.startswith(T5)}
    scaled = state | {f"{T5}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for stored in (bare | {f"{T5}model.words": torch.zeros(1)}, scaled):
        told = "the text_encoder_3 of mine can't be read .* (multiplied by scales|unknown names)"
        with pytest.raises(UnusableWeights, match=told):
            read(home, "sd3-medium", stored)


def _assert_as_good_as_equal(pictures: list[torch.Tensor]) -> None:
    """Equal but for rounding: tensors of a mapped file begin anywhere, which can change the order of sums."""
    torch.testing.assert_close(*pictures, atol=1e-5, rtol=0)
