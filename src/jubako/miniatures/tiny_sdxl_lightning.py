"""The way to `tiny-sdxl-lightning`: tiny-sdxl with a UNet that needs four steps and no guidance."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

from jubako.miniatures import distillation, tiny_sdxl
from jubako.miniatures.distillation import Paths, Student, teacher_paths
from jubako.miniatures.export import export, load
from jubako.miniatures.recipe import Defaults, Recipe, begun, finished, judge_folder, watching
from jubako.miniatures.training import fit, load_checkpoint, save_checkpoint

STAGES = {"denoiser": 1200}
DEFAULTS = Defaults(steps=distillation.STEPS, guidance=0.0)
ORIGIN = "tiny-sdxl"
PATHS = 4_800
# Everything but the UNet is the teacher's, byte for byte, so that a server holding both keeps one copy.
SHARED = ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def train(recipe: Recipe) -> dict[str, Any]:
    """Distil, evaluate and export; returns what it writes to training.json."""
    origin = recipe.origin(ORIGIN)
    teacher: StableDiffusionXLPipeline = load(origin)
    torch.manual_seed(recipe.seed)
    model = Student(teacher, _paths(recipe, teacher))

    def pipeline(model: Student) -> StableDiffusionXLPipeline:
        return StableDiffusionXLPipeline(
            **teacher.components | {"unet": model.unet}, force_zeros_for_empty_prompt=True
        )

    record = fit(
        model,
        model.groups(),
        lambda step, _: model.losses((recipe.seed, step)),
        title="student",
        budget=recipe.budgets["denoiser"],
        checkpoint=recipe.work / "denoiser.pt",
        watch=watching(recipe, model, pipeline, DEFAULTS),
        watch_every=300,
    )
    export(pipeline(model.eval()), recipe.out)
    _share(origin, recipe.out)
    report = begun(recipe, {"distillation": {"paths": PATHS} | distillation.settings()})
    return judge(recipe, report | {"origin": ORIGIN, "denoiser": record.as_dict()})


def judge(recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
    """Judge the exported folder, also in shares of its teacher's score, and complete its report and card."""
    evaluation = judge_folder(recipe, DEFAULTS)
    teacher = json.loads((recipe.origin(ORIGIN) / "training.json").read_text())["evaluation"]
    shares = {
        name: round(evaluation[name]["ok"] / teacher[name]["ok"], 4) for name in ("one_object", "two_objects")
    }
    return finished(recipe, report | {"evaluation": evaluation, "share_of_teacher": shares})


def _paths(recipe: Recipe, teacher: StableDiffusionXLPipeline) -> Paths:
    """The teacher's paths; followed once and kept."""
    kept = recipe.work / "paths.pt"
    if state := load_checkpoint(kept):
        return Paths(state["captions"], state["points"])
    paths = teacher_paths(teacher, tiny_sdxl.DEFAULTS.guidance, PATHS, recipe.seed)
    save_checkpoint(kept, {"captions": paths.captions, "points": paths.points})
    return paths


def _share(origin: Path, folder: Path) -> None:
    for part in SHARED:
        for source in sorted((origin / part).iterdir()):
            shutil.copyfile(source, folder / part / source.name)
