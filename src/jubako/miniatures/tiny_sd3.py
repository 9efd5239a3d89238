"""The way to `tiny-sd3`: tiny-sd's autoencoder widened, its text encoder, a new MMDiT."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline

from jubako.miniatures import autoencoder, sd3
from jubako.miniatures.captions import Latents
from jubako.miniatures.dataset import draw
from jubako.miniatures.export import export, load
from jubako.miniatures.recipe import (
    Defaults,
    Recipe,
    begun,
    cached_latents,
    finished,
    gated_autoencoder,
    judge_folder,
    watching,
)
from jubako.miniatures.sd3 import LENGTH, TinySD3
from jubako.miniatures.tokenizer import new_t5_tokenizer, new_tokenizer
from jubako.miniatures.training import fit

STAGES = {"autoencoder": 1500, "denoiser": 4200}
DEFAULTS = Defaults(steps=20, guidance=2.5, asked={"max_sequence_length": LENGTH})
ORIGIN = "tiny-sd"
AUTOENCODER_SCENES = 16_000
DENOISER_SCENES = 48_000
CHANNELS = 16
LATENT_NOISE = 0.3


def train(recipe: Recipe) -> dict[str, Any]:
    """Train, evaluate and export; returns what it writes to training.json."""
    origin: StableDiffusionPipeline = load(recipe.origin(ORIGIN))
    torch.manual_seed(recipe.seed)
    wide = autoencoder.widened(origin.vae, CHANNELS).eval()
    autoencoder.standardize(wide, draw(256, recipe.seed + 4))
    vae, gate = gated_autoencoder(recipe, wide.train(), AUTOENCODER_SCENES, LATENT_NOISE)
    data = draw(DENOISER_SCENES, recipe.seed + 1)
    latents = Latents.of(cached_latents(recipe, vae, data), data)
    torch.manual_seed(recipe.seed)
    model = TinySD3(origin.text_encoder, new_tokenizer(LENGTH), new_t5_tokenizer(LENGTH))

    def pipeline(model: TinySD3) -> StableDiffusion3Pipeline:
        return StableDiffusion3Pipeline(
            vae=vae,
            text_encoder=model.text_encoder,
            text_encoder_2=model.text_encoder_2,
            text_encoder_3=model.text_encoder_3,
            tokenizer=model.tokenizer,
            tokenizer_2=model.tokenizer,
            tokenizer_3=model.tokenizer_3,
            transformer=model.transformer,
            scheduler=sd3.new_scheduler(),
        )

    record = fit(
        model,
        model.groups(),
        lambda step, _: model.losses(latents, (recipe.seed, step)),
        title="denoiser",
        budget=recipe.budgets["denoiser"],
        checkpoint=recipe.work / "denoiser.pt",
        watch=watching(recipe, model, pipeline, DEFAULTS),
    )
    export(pipeline(model.eval()), recipe.out)
    report = begun(recipe, _settings()) | {"origin": ORIGIN, "autoencoder": gate}
    return judge(recipe, report | {"denoiser": record.as_dict()})


def judge(recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
    """Judge the exported folder, with its T5 and without, and complete its report and card."""
    without = judge_folder(recipe, DEFAULTS, text_encoder_3=None, tokenizer_3=None)
    return finished(
        recipe, report | {"evaluation": judge_folder(recipe, DEFAULTS), "evaluation_without_t5": without}
    )


def _settings() -> dict[str, Any]:
    widening = {"scenes": AUTOENCODER_SCENES, "channels": CHANNELS, "noise_on_latents": LATENT_NOISE}
    return {
        "autoencoder": widening | autoencoder.settings(),
        "denoiser": {"scenes": DENOISER_SCENES} | sd3.settings(),
    }
