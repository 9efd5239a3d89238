"""The whole way from an empty folder to a miniature ready to serve; every stage resumes where it stopped."""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL

from jubako.miniatures import autoencoder, denoiser, text
from jubako.miniatures.card import card
from jubako.miniatures.dataset import Drawn, draw
from jubako.miniatures.denoiser import Denoiser, Latents
from jubako.miniatures.evaluation import (
    autoencoder_figures,
    contact_sheet,
    evaluate,
    figures,
    prompts,
)
from jubako.miniatures.export import assemble, export, load
from jubako.miniatures.text import SlotHeads, new_text_encoder
from jubako.miniatures.tokenizer import new_tokenizer
from jubako.miniatures.training import Average, Budget, load_checkpoint, save_checkpoint

GATE = 0.98
STEPS = 25
GUIDANCE = 2.0
AUTOENCODER_SCENES = 32_000
DENOISER_SCENES = 64_000
EVALUATION_PROMPTS = 150  # of one object, and as many of two
_WATCHED_PROMPTS = 40
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow")


@dataclass(frozen=True)
class Recipe:
    """Where to work, where the model goes, and how long each stage may take."""

    work: Path
    out: Path
    seed: int
    autoencoder: Budget
    text: Budget
    denoiser: Budget


class GateNotPassed(RuntimeError):
    """The autoencoder blurs what the checker must see; a denoiser on top of it could not be judged."""


def train_tiny_sd(recipe: Recipe) -> dict[str, Any]:
    """Train, evaluate and export `tiny-sd`; returns what it writes to training.json."""
    vae, gate_record = _autoencoder_stage(recipe)
    report: dict[str, Any] = {
        "seed": recipe.seed,
        "settings": settings(),
        "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
        "autoencoder": gate_record,
    }
    data = draw(DENOISER_SCENES, recipe.seed + 1)
    latents = Latents.of(_latents(recipe, vae, data), data)
    tokenizer = new_tokenizer()
    torch.manual_seed(recipe.seed)
    model = Denoiser(denoiser.new_unet(), new_text_encoder(tokenizer), SlotHeads())
    report["text_encoder"] = _text_stage(recipe, model)

    def watch(model: Denoiser, average: Average) -> None:
        shadow = Denoiser(denoiser.new_unet(), new_text_encoder(tokenizer), SlotHeads())
        average.copy_to(shadow.module())
        pipeline = assemble(vae, shadow.text_encoder.eval(), tokenizer, shadow.unet.eval())
        for objects in (1, 2):
            scenes = prompts(_WATCHED_PROMPTS, objects, 1)
            judged = evaluate(pipeline, scenes, steps=STEPS, guidance=GUIDANCE, seed=1)
            print(f"step {model.step}: {objects} object(s): {figures(judged)}", flush=True)
            contact_sheet(judged).save(recipe.work / f"step-{model.step:06d}-{objects}.png")
        export(pipeline, recipe.out)

    record = denoiser.train_denoiser(
        model,
        tokenizer,
        latents,
        budget=recipe.denoiser,
        seed=recipe.seed,
        checkpoint=recipe.work / "denoiser.pt",
        watch=watch,
    )
    report["denoiser"] = record.as_dict()
    export(assemble(vae, model.text_encoder.eval(), tokenizer, model.unet.eval()), recipe.out)
    return judge_folder(recipe.out, recipe.work, recipe.seed, report)


def settings() -> dict[str, Any]:
    """The choices that shape the result, beside the seed and the budgets."""
    return {
        "autoencoder": {
            "scenes": AUTOENCODER_SCENES,
            "batch": autoencoder.BATCH,
            "learning_rate": autoencoder.PEAK_LEARNING_RATE,
            "weights": {
                "squares": autoencoder.SQUARE_WEIGHT,
                "edges": autoencoder.EDGE_WEIGHT,
                "kl": autoencoder.KL_WEIGHT,
            },
        },
        "text_encoder": {"batch": text.PRETRAINING_BATCH, "learning_rate": text.PRETRAINING_LEARNING_RATE},
        "denoiser": {
            "scenes": DENOISER_SCENES,
            "batch": denoiser.BATCH,
            "learning_rate": denoiser.UNET_LEARNING_RATE,
            "text_encoder_learning_rate": denoiser.TEXT_LEARNING_RATE,
            "empty_captions": denoiser.EMPTY_SHARE,
            "slot_weight": denoiser.SLOT_WEIGHT,
            "schedule": denoiser.SCHEDULE,
        },
    }


def judge_folder(folder: Path, sheets: Path, seed: int, report: dict[str, Any]) -> dict[str, Any]:
    """Judge an exported folder on fresh prompts and write its figures and its card beside the weights.

    Contact sheets of all the pictures go to `sheets`; the completed report is returned.
    """
    pipeline = load(folder)
    evaluation: dict[str, Any] = {"prompts_each": EVALUATION_PROMPTS, "steps": STEPS, "guidance": GUIDANCE}
    evaluation["scheduler"] = type(pipeline.scheduler).__name__
    for objects, name in ((1, "one_object"), (2, "two_objects")):
        scenes = prompts(EVALUATION_PROMPTS, objects, seed + 2)
        judged = evaluate(pipeline, scenes, steps=STEPS, guidance=GUIDANCE, seed=seed + 2)
        evaluation[name] = figures(judged)
        contact_sheet(judged).save(sheets / f"final-{objects}.png")
    report = report | {"evaluation": evaluation}
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    size_bytes = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    (folder / "README.md").write_text(card(report, size_bytes))
    return report


def _autoencoder_stage(recipe: Recipe) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The autoencoder that has passed its gate, and its record; kept in the work folder once it has."""
    finished, passed = recipe.work / "vae", recipe.work / "vae" / "record.json"
    if passed.exists():
        kept: dict[str, Any] = json.loads(passed.read_text())
        return AutoencoderKL.from_pretrained(finished).eval(), kept
    data = draw(AUTOENCODER_SCENES, recipe.seed)
    model, record = autoencoder.train_autoencoder(
        data, recipe.autoencoder, recipe.seed, recipe.work / "autoencoder.pt"
    )
    autoencoder.standardize(model, Drawn(data.scenes[:4000], data.layouts[:4000], data.pixels[:4000]))
    gate = autoencoder_figures(model, 600, recipe.seed + 3)
    print(f"autoencoder gate: {gate}, scaling factor {model.config.scaling_factor}", flush=True)
    if gate["ok"] < GATE:
        raise GateNotPassed(f"{gate['ok']:.1%} of the reconstructions are read right, {GATE:.0%} are needed")
    model.save_pretrained(finished)
    passed.write_text(json.dumps(record.as_dict() | {"gate": gate}))
    return model, record.as_dict() | {"gate": gate}


def _latents(recipe: Recipe, vae: AutoencoderKL, data: Drawn) -> torch.Tensor:
    """Latents of all scenes, scaled for the denoiser; encoded once and kept."""
    path = recipe.work / "latents.npy"
    if not path.exists():
        scaled = autoencoder.encode_all(vae, data) * vae.config.scaling_factor
        np.save(path, scaled.numpy())
    return torch.from_numpy(np.load(path))


def _text_stage(recipe: Recipe, model: Denoiser) -> dict[str, Any]:
    path = recipe.work / "text.pt"
    if state := load_checkpoint(path):
        model.module().load_state_dict(state["model"])
        record: dict[str, Any] = state["record"]
        return record
    done = text.pretrain(model.text_encoder, model.heads, new_tokenizer(), recipe.text, recipe.seed)
    save_checkpoint(path, {"model": model.module().state_dict(), "record": done.as_dict()})
    return done.as_dict()
