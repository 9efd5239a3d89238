"""The way to `tiny-sdxl`: tiny-sd's weights in SDXL's layout, trained on with micro-conditioned pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline

from jubako.miniatures import framing, sdxl
from jubako.miniatures.captions import Latents
from jubako.miniatures.export import export, load
from jubako.miniatures.recipe import (
    Defaults,
    Recipe,
    begun,
    cached_latents,
    finished,
    judge_folder,
    watching,
)
from jubako.miniatures.sdxl import TinySDXL
from jubako.miniatures.training import Average, Record, fit

STAGES = {"denoiser": 1000, "framing": 900}
DEFAULTS = Defaults(steps=25, guidance=2.0)
ORIGIN = "tiny-sd"
SCENES = 28_000
# First the new layout with few such pictures, then the UNet alone with many: the numbers are learned slowly.
SHARES: dict[str, dict[str, float]] = {
    "denoiser": {"cropped_share": 0.15, "blown_up_share": 0.10},
    "framing": {"cropped_share": 0.40, "blown_up_share": 0.30},
}


def train(recipe: Recipe) -> dict[str, Any]:
    """Train, evaluate and export; returns what it writes to training.json."""
    origin: StableDiffusionPipeline = load(recipe.origin(ORIGIN))
    torch.manual_seed(recipe.seed)
    model = TinySDXL(origin)

    def pipeline(model: TinySDXL) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            vae=origin.vae,
            text_encoder=model.text_encoder,
            text_encoder_2=model.text_encoder_2,
            tokenizer=model.tokenizer,
            tokenizer_2=model.tokenizer,
            unet=model.unet,
            scheduler=sdxl.new_scheduler(),
            force_zeros_for_empty_prompt=True,
        )

    watch = watching(recipe, model, pipeline, DEFAULTS)
    first = _stage(recipe, origin, model, "denoiser", watch)
    second = _stage(recipe, origin, model, "framing", watch)
    export(pipeline(model.eval()), recipe.out)
    settings = {"scenes": SCENES, "shares": SHARES, "farthest_crop_px": framing.FARTHEST_CROP}
    report = begun(recipe, {"denoiser": settings | sdxl.settings()}) | {"origin": ORIGIN}
    return judge(recipe, report | {"denoiser": first.as_dict(), "framing": second.as_dict()})


def _stage(
    recipe: Recipe,
    origin: StableDiffusionPipeline,
    model: TinySDXL,
    title: str,
    watch: Callable[[int, Average], None],
) -> Record:
    """Train on pictures of the stage's own; a finished stage is only taken up."""
    seed = recipe.seed + list(STAGES).index(title)
    framed = framing.draw_framed(SCENES, seed + 1, **SHARES[title])
    latents = Latents.of(cached_latents(recipe, origin.vae.eval(), framed.data, title), framed.data)
    return fit(
        model,
        model.groups() if title == "denoiser" else model.framing_groups(),
        lambda step, _: model.losses(latents, framed.time_ids, (seed, step)),
        title=title,
        budget=recipe.budgets[title],
        checkpoint=recipe.work / f"{title}.pt",
        watch=watch,
        watch_every=500,
    )


def judge(recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
    """Judge the exported folder and complete its report and card."""
    return finished(recipe, report | {"evaluation": judge_folder(recipe, DEFAULTS)})
