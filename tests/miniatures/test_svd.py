"""The parts of `tiny-svd` before training: what is learned is what the stock scheduler undoes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from jubako.miniatures import svd, temporal
from jubako.miniatures.motion import FRAMES, draw_clips
from jubako.miniatures.svd import Seen, TinySVD

ORIGIN = Path(__file__).parents[2] / "models" / "embedded" / "tiny-sd"


@pytest.fixture(scope="module")
def model() -> TinySVD:
    torch.manual_seed(0)
    return TinySVD(UNet2DConditionModel.from_pretrained(ORIGIN / "unet"))


def test_velocity_leads_the_stock_scheduler_to_the_clean_latents() -> None:
    scheduler = svd.new_scheduler()
    scheduler.set_timesteps(10)
    clean, noise = torch.randn(2, 1, FRAMES, 4, 16, 16)
    number = 5
    sigma = scheduler.sigmas[number]
    noisy = clean + sigma * noise
    scheduler.scale_model_input(noisy, scheduler.timesteps[number])
    velocity = (noise - sigma * clean) / (1 + sigma**2).sqrt()
    step = scheduler.step(velocity, scheduler.timesteps[number], noisy)
    torch.testing.assert_close(step.pred_original_sample, clean, atol=1e-3, rtol=1e-3)


def test_unet_is_told_a_quarter_of_the_logarithm_of_sigma() -> None:
    scheduler = svd.new_scheduler()
    scheduler.set_timesteps(10)
    torch.testing.assert_close(scheduler.timesteps, scheduler.sigmas[:-1].log() / 4, atol=1e-5, rtol=1e-5)


def test_losses_are_the_same_for_the_same_key_only(model: TinySVD) -> None:
    clips = draw_clips(6, seed=1)
    seen = Seen.of(torch.randn(6, FRAMES, 4, 16, 16), 1.0, clips)
    first, parts = model.losses(seen, (1, 0))
    again, _ = model.losses(seen, (1, 0))
    other, _ = model.losses(seen, (1, 1))
    assert first.item() == again.item() != other.item()
    assert set(parts) == {"velocity", "names"}


def test_image_encoder_is_shown_what_the_pipeline_shows_it(model: TinySVD) -> None:
    from jubako.miniatures.tiny_svd import assemble

    clips = draw_clips(2, seed=2)
    vae = temporal.new_autoencoder(AutoencoderKL.from_pretrained(ORIGIN / "vae"))
    pipeline = assemble(vae, model)
    pictures = [motion.frames()[0] for motion in clips.motions]
    with torch.no_grad():
        wanted = pipeline._encode_image(pictures, torch.device("cpu"), 1, False)[:, 0]
        torch.testing.assert_close(model.embed(clips.pixels[:, 0]), wanted, atol=1e-4, rtol=1e-4)


def test_new_autoencoder_looks_at_every_frame_alone() -> None:
    torch.manual_seed(0)
    vae = temporal.new_autoencoder(AutoencoderKL.from_pretrained(ORIGIN / "vae"))
    latents = torch.randn(FRAMES, 4, 16, 16)
    with torch.no_grad():
        together = vae.decode(latents, num_frames=FRAMES).sample
        with temporal.still(vae):
            alone = vae.decode(latents, num_frames=1).sample
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
