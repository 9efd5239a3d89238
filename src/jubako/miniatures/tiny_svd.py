"""The way to `tiny-svd`: tiny-sd's latents set in motion by a UNet that looks along time."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderKLTemporalDecoder, StableVideoDiffusionPipeline
from numpy.typing import NDArray
from PIL import Image

from jubako.miniatures import svd, temporal
from jubako.miniatures.clip_evaluation import clip_requests, clip_sheet, evaluate_clips, figures_of_clips
from jubako.miniatures.export import export, load
from jubako.miniatures.motion import FRAMES, Clips, draw_clips
from jubako.miniatures.reader import judge as judge_picture
from jubako.miniatures.reader import read
from jubako.miniatures.recipe import Defaults, Recipe, begun, finished
from jubako.miniatures.svd import Seen, TinySVD
from jubako.miniatures.training import Average, fit

STAGES = {"autoencoder": 900, "denoiser": 3500}
DEFAULTS = Defaults(
    steps=25,
    guidance=2.0,
    asked={
        "min_guidance_scale": 1.0,
        "height": 64,
        "width": 64,
        "num_frames": FRAMES,
        "fps": 7,
        "noise_aug_strength": svd.NOISE_AUGMENTATION,
    },
)
ORIGIN = "tiny-sd"
SCENES = 2_000
GATE_FRAMES = 200
EVALUATION_CLIPS = 100
_WATCHED_CLIPS = 9


def train(recipe: Recipe) -> dict[str, Any]:
    """Train, evaluate and export; returns what it writes to training.json."""
    origin = load(recipe.origin(ORIGIN))
    clips, latents = clips_and_latents(recipe, origin.vae)
    vae, distilled = _autoencoder_stage(recipe, origin.vae, clips, latents)
    torch.manual_seed(recipe.seed)
    model = TinySVD(origin.unet)
    seen = Seen.of(latents, vae.config.scaling_factor, clips)

    def watch(step: int, average: Average) -> None:
        shadow = copy.deepcopy(model)
        average.copy_to(shadow)
        pipeline = assemble(vae, shadow.eval())
        sheet = recipe.work / f"step-{step:06d}.png"
        print(f"step {step}: {judged(pipeline, sheet, seed=1, count=_WATCHED_CLIPS)}", flush=True)

    record = fit(
        model,
        model.groups(),
        lambda step, _: model.losses(seen, (recipe.seed, step)),
        title="denoiser",
        budget=recipe.budgets["denoiser"],
        checkpoint=recipe.work / "denoiser.pt",
        watch=watch,
        watch_every=250,
    )
    export(assemble(vae, model.eval()), recipe.out)
    _name_stock_extractor(recipe.out)
    settings = {"autoencoder": temporal.settings(), "denoiser": {"clips": SCENES} | svd.settings()}
    report = begun(recipe, settings) | {"origin": ORIGIN}
    return judge(recipe, report | {"autoencoder": distilled, "denoiser": record.as_dict()})


def judge(recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
    """Judge the exported folder and complete its report and card."""
    sheet = recipe.work / "final.png"
    evaluation = judged(load(recipe.out), sheet, seed=recipe.seed + 2, count=EVALUATION_CLIPS)
    return finished(recipe, report | {"evaluation": evaluation})


def judged(pipeline: StableVideoDiffusionPipeline, sheet: Path, *, seed: int, count: int) -> dict[str, Any]:
    """Figures for `count` clips, which go to the contact sheet."""
    pipeline.set_progress_bar_config(disable=True)
    asked = {"steps": DEFAULTS.steps, "guidance": DEFAULTS.guidance} | DEFAULTS.asked
    made = evaluate_clips(pipeline, clip_requests(count, seed), seed=seed, **asked)
    clip_sheet(made).save(sheet)
    scheduler = {"scheduler": type(pipeline.scheduler).__name__}
    return {"clips": count} | asked | scheduler | figures_of_clips(made)


def assemble(vae: AutoencoderKLTemporalDecoder, model: TinySVD) -> StableVideoDiffusionPipeline:
    return StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=model.image_encoder,
        unet=model.unet,
        scheduler=svd.new_scheduler(),
        feature_extractor=svd.new_feature_extractor(),
    )


def _name_stock_extractor(folder: Path) -> None:
    """Without torchvision, transformers puts another class in CLIPImageProcessor's place, by name too."""
    index = folder / "model_index.json"
    index.write_text(index.read_text().replace('"CLIPImageProcessorPil"', '"CLIPImageProcessor"'))


def clips_and_latents(recipe: Recipe, vae: AutoencoderKL) -> tuple[Clips, torch.Tensor]:
    """All clips and what tiny-sd's encoder makes of them, not scaled: N x frames x 4 x 16 x 16."""
    clips = draw_clips(SCENES, recipe.seed)
    path = recipe.work / "latents.npy"
    if not path.exists():
        with torch.no_grad():
            parts = [vae.encode(_pictures(frames)).latent_dist.mean.half().numpy() for frames in clips.pixels]
        np.save(path, np.stack(parts))
    return clips, torch.from_numpy(np.load(path))


def _autoencoder_stage(
    recipe: Recipe, vae: AutoencoderKL, clips: Clips, latents: torch.Tensor
) -> tuple[AutoencoderKLTemporalDecoder, dict[str, Any]]:
    """The autoencoder with a temporal decoder, and its record; kept in the work folder once it is done."""
    kept, passed = recipe.work / "vae", recipe.work / "vae" / "record.json"
    if passed.exists():
        known: dict[str, Any] = json.loads(passed.read_text())
        return AutoencoderKLTemporalDecoder.from_pretrained(kept).eval(), known
    torch.manual_seed(recipe.seed)
    model = temporal.new_autoencoder(vae)
    distilled = temporal.Distilled(model, clips.pixels.reshape(-1, 64, 64, 3), latents.flatten(0, 1))
    done = fit(
        distilled,
        distilled.groups(),
        lambda step, progress: distilled.losses((recipe.seed, step), progress),
        title="autoencoder",
        budget=recipe.budgets["autoencoder"],
        checkpoint=recipe.work / "autoencoder.pt",
    )
    record = done.as_dict() | {"gate": _gate(model.eval(), recipe.seed + 3)}
    model.save_pretrained(kept)
    passed.write_text(json.dumps(record))
    return model, record


@torch.no_grad()
def _gate(model: AutoencoderKLTemporalDecoder, seed: int) -> dict[str, float]:
    """Share of fresh last frames whose reconstructions are read right; where they stand is not asked."""
    clips = draw_clips(GATE_FRAMES, seed)
    right = []
    for scene, pixels in zip(clips.scenes, clips.pixels[:, -1], strict=True):
        latents = model.encode(_pictures(pixels[None])).latent_dist.mean
        decoded = model.decode(latents, num_frames=1).sample
        levels = ((decoded[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        verdict = judge_picture(read(Image.fromarray(levels)), replace(scene, place=None))
        right.append(verdict.ok)
    return {"frames": GATE_FRAMES, "ok": round(float(np.mean(right)), 4)}


def _pictures(pixels: NDArray[np.uint8]) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1
