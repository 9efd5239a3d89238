"""Previews: exact where latents are colours, like the picture where an autoencoder was trained."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from oracle import CATALOG, job, wrapped
from torch.nn import functional

from jubako.engine.batcher import StepBatcher
from jubako.engine.ticket import Ticket
from jubako.families.preview import fitted

FACTOR = 8


@pytest.mark.parametrize("channels", [4, 16])
def test_a_linear_autoencoder_is_found_out(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn((channels, 3), generator=generator)

    def encode(pictures: torch.Tensor) -> torch.Tensor:
        small = functional.avg_pool2d(pictures, FACTOR)
        return torch.einsum("kc,nchw->nkhw", mixing, small) + 0.3

    picture = torch.rand((1, 3, 64, 64), generator=generator)
    shown = fitted(encode, FACTOR)(encode(picture * 2 - 1)[0])
    assert shown.shape == (3, 8, 8)
    assert (shown - functional.avg_pool2d(picture, FACTOR)[0]).abs().max() < 0.02


def test_what_is_out_of_range_is_clipped() -> None:
    colours = fitted(lambda pictures: functional.avg_pool2d(pictures, FACTOR), FACTOR)
    shown = colours(torch.tensor([9.0, -9.0, 0.0]).view(3, 1, 1))
    assert shown.flatten().tolist() == pytest.approx([1, 0, 0.5], abs=0.01)


@pytest.mark.parametrize("model", ["tiny-sd", "tiny-sdxl", "tiny-sd3"])
def test_previews_of_trained_models_come_to_look_like_the_picture(model: str) -> None:
    entry = CATALOG.model(model)
    kind: Any = getattr(diffusers, entry.pipeline)
    pipeline = kind.from_pretrained(entry.weights.folder, use_safetensors=True, dtype=torch.float32)
    one = job(
        model,
        prompt="a large red circle on the left of a blue background",
        num_inference_steps=8,
        guidance_scale=entry.defaults.guidance_scale,
        max_sequence_length=entry.defaults.max_sequence_length,
        seed=3,
    )
    shown: list[torch.Tensor] = []
    batcher, ticket = StepBatcher(), Ticket(preview_every=1, on_preview=shown.append)
    batcher.submit(wrapped(pipeline, model).prepare(one), ticket)
    picture = ticket.decoded.result(60)
    batcher.close()
    assert len(shown) == 7
    small = functional.avg_pool2d(picture, picture.shape[-1] // shown[-1].shape[-1])
    likeness = [
        float(torch.corrcoef(torch.stack([small[0].flatten(), each[0].flatten()]))[0, 1]) for each in shown
    ]
    assert likeness[-1] > 0.7, likeness
