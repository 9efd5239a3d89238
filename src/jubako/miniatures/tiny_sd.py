"""The way to `tiny-sd`, from an empty folder; every stage resumes where it stopped."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import StableDiffusionPipeline

from jubako.miniatures import autoencoder, denoiser, text
from jubako.miniatures.captions import Latents
from jubako.miniatures.dataset import draw
from jubako.miniatures.denoiser import TinySD
from jubako.miniatures.export import assemble, export
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
from jubako.miniatures.tokenizer import new_tokenizer
from jubako.miniatures.training import fit, load_checkpoint, save_checkpoint

STAGES = {"autoencoder": 5000, "text": 500, "denoiser": 5000}
DEFAULTS = Defaults(steps=25, guidance=2.0)
AUTOENCODER_SCENES = 32_000
DENOISER_SCENES = 64_000


def train(recipe: Recipe) -> dict[str, Any]:
    """Train, evaluate and export; returns what it writes to training.json."""
    torch.manual_seed(recipe.seed)
    vae, gate = gated_autoencoder(recipe, autoencoder.new_autoencoder(), AUTOENCODER_SCENES)
    report = begun(recipe, _settings()) | {"autoencoder": gate}
    data = draw(DENOISER_SCENES, recipe.seed + 1)
    latents = Latents.of(cached_latents(recipe, vae, data), data)
    torch.manual_seed(recipe.seed)
    model = TinySD(new_tokenizer())
    report["text_encoder"] = _text_stage(recipe, model)

    def pipeline(model: TinySD) -> StableDiffusionPipeline:
        return assemble(vae, model.text_encoder, model.tokenizer, model.unet)

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
    return judge(recipe, report | {"denoiser": record.as_dict()})


def judge(recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
    """Judge the exported folder and complete its report and card."""
    return finished(recipe, report | {"evaluation": judge_folder(recipe, DEFAULTS)})


def _text_stage(recipe: Recipe, model: TinySD) -> dict[str, Any]:
    path = recipe.work / "text.pt"
    if state := load_checkpoint(path):
        model.load_state_dict(state["model"])
        record: dict[str, Any] = state["record"]
        return record
    done = text.pretrain(
        model.text_encoder, model.heads, model.tokenizer, recipe.budgets["text"], recipe.seed
    )
    save_checkpoint(path, {"model": model.state_dict(), "record": done.as_dict()})
    return done.as_dict()


def _settings() -> dict[str, Any]:
    return {
        "autoencoder": {"scenes": AUTOENCODER_SCENES} | autoencoder.settings(),
        "text_encoder": {"batch": text.PRETRAINING_BATCH, "learning_rate": text.PRETRAINING_LEARNING_RATE},
        "denoiser": {"scenes": DENOISER_SCENES} | denoiser.settings(),
    }
