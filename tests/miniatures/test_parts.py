"""What the miniatures start from: each begins with what its origin has already learned."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from jubako.miniatures.captions import Latents, ask
from jubako.miniatures.dataset import draw
from jubako.miniatures.denoiser import TinySD
from jubako.miniatures.export import load
from jubako.miniatures.sd3 import LENGTH, TinySD3
from jubako.miniatures.sdxl import TinySDXL
from jubako.miniatures.text import WIDTH, tokens
from jubako.miniatures.tokenizer import new_t5_tokenizer, new_tokenizer

ORIGIN = Path(__file__).parents[2] / "models" / "embedded" / "tiny-sd"
CAPTIONS = ["a small red star on the left of a blue background", "a red circle above a blue ring", ""]


@pytest.fixture(scope="module")
def origin() -> StableDiffusionPipeline:
    return load(ORIGIN)


def some_latents(channels: int) -> Latents:
    values = torch.randn(64, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    return Latents.of(values.half(), draw(64, 1))


def test_one_caption_in_ten_is_empty() -> None:
    latents = some_latents(4)
    asked = [ask(latents, 48, np.random.default_rng(seed)) for seed in range(20)]
    empty = np.mean([caption == "" for one in asked for caption in one.captions])
    assert 0.05 < empty < 0.15
    assert all(one.captions[i] for one in asked for i in one.said)


def test_tiny_sd_starts_with_a_velocity_of_about_one() -> None:
    torch.manual_seed(0)
    _, parts = TinySD(new_tokenizer()).losses(some_latents(4), (1, 0))
    assert 0.7 < parts["velocity"] < 1.6


@torch.no_grad()
def test_tiny_sdxl_starts_by_predicting_what_tiny_sd_does(origin: StableDiffusionPipeline) -> None:
    torch.manual_seed(0)
    model = TinySDXL(origin).eval()
    states, pooled, ids = model.embed(CAPTIONS)
    noisy, time = torch.randn(3, 4, 16, 16), torch.tensor([900, 600, 300])
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[64.0, 64, 0, 0, 64, 64]]).repeat(3, 1)}
    mine = model.unet(noisy, time, states, added_cond_kwargs=added).sample
    theirs = origin.unet(noisy, time, origin.text_encoder(ids).last_hidden_state).sample
    assert (mine - theirs).square().mean() < 0.1 * theirs.square().mean()


@torch.no_grad()
def test_tiny_sd3_starts_with_tiny_sds_text_encoder(origin: StableDiffusionPipeline) -> None:
    torch.manual_seed(0)
    model = TinySD3(origin.text_encoder, new_tokenizer(LENGTH), new_t5_tokenizer(LENGTH)).eval()
    states, pooled, ids = model.embed(CAPTIONS, torch.tensor([1.0, 0.0, 1.0]))
    assert states.shape[:2] == (3, 2 * LENGTH)
    assert pooled.shape[1] == states.shape[2]
    whole = origin.text_encoder(tokens(origin.tokenizer, CAPTIONS), output_hidden_states=True)
    assert torch.equal(ids, tokens(origin.tokenizer, CAPTIONS)[:, :LENGTH])
    expected = whole.hidden_states[-1][:, :LENGTH]
    assert torch.allclose(states[:, :LENGTH, :WIDTH], expected, atol=1e-4)
    assert not states[1, LENGTH:].any()
    assert states[0, LENGTH:].any()


def test_tiny_sd3_starts_with_a_flow_of_nothing(origin: StableDiffusionPipeline) -> None:
    torch.manual_seed(0)
    model = TinySD3(origin.text_encoder, new_tokenizer(LENGTH), new_t5_tokenizer(LENGTH))
    loss, parts = model.losses(some_latents(16), (1, 0))
    assert parts["flow"] == pytest.approx(2.0, abs=0.1)  # noise and latents, one each
    loss.backward()
    assert model.transformer.proj_out.weight.grad is not None
