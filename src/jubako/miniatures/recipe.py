"""What the ways to all miniatures share: budgets, the autoencoder's gate, watching, export, judging."""

from __future__ import annotations

import copy
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from torch import nn

from jubako.miniatures import autoencoder
from jubako.miniatures.card import card
from jubako.miniatures.dataset import Drawn, draw
from jubako.miniatures.evaluation import (
    autoencoder_figures,
    contact_sheet,
    evaluate,
    figures,
    prompts,
)
from jubako.miniatures.export import export, load, size_bytes
from jubako.miniatures.training import Average, Budget

GATE = 0.98
GATE_SCENES = 600
EVALUATION_PROMPTS = 150  # of one object, and as many of two
_WATCHED_PROMPTS = 30
_LIBRARIES = ("torch", "diffusers", "transformers", "numpy", "pillow")
Model = TypeVar("Model", bound=nn.Module)
_NUMBERS = ((1, "one_object"), (2, "two_objects"))


@dataclass(frozen=True)
class Recipe:
    """Where to work, where the model goes, what it grows from, and how long each stage may take."""

    work: Path
    out: Path
    seed: int
    budgets: dict[str, Budget]

    def origin(self, name: str) -> Path:
        """The folder of another miniature, which must lie beside this one's."""
        folder = self.out.parent / name
        if not (folder / "model_index.json").is_file():
            raise FileNotFoundError(f"{self.out.name} grows out of {name}: there is no {folder}")
        return folder


@dataclass(frozen=True)
class Defaults:
    """How a miniature is asked unless a request says otherwise; `asked` goes to the pipeline as it is."""

    steps: int
    guidance: float
    asked: dict[str, Any] = field(default_factory=dict)


class GateNotPassed(RuntimeError):
    """The autoencoder blurs what the checker must see; a denoiser on top of it could not be judged."""


def begun(recipe: Recipe, settings: dict[str, Any]) -> dict[str, Any]:
    """The head of training.json."""
    return {
        "seed": recipe.seed,
        "settings": settings,
        "versions": {name: version(name) for name in _LIBRARIES} | {"python": platform.python_version()},
    }


def watching(
    recipe: Recipe, model: Model, assemble: Callable[[Model], DiffusionPipeline], defaults: Defaults
) -> Callable[[int, Average], None]:
    """What looks on while `model` trains: it judges and exports the averaged weights."""

    def watch(step: int, average: Average) -> None:
        shadow = copy.deepcopy(model)
        average.copy_to(shadow)
        pipeline = assemble(shadow.eval())
        sheets = recipe.work / f"step-{step:06d}"
        print(
            f"step {step}: {judged(pipeline, defaults, sheets, seed=1, count=_WATCHED_PROMPTS)}", flush=True
        )
        export(pipeline, recipe.out)

    return watch


def judged(
    pipeline: DiffusionPipeline, defaults: Defaults, sheets: Path, *, seed: int, count: int
) -> dict[str, Any]:
    """Figures for `count` prompts of one object and of two; pictures go to `sheets`-1.png and -2.png."""
    pipeline.set_progress_bar_config(disable=True)
    result: dict[str, Any] = {"prompts_each": count, "steps": defaults.steps, "guidance": defaults.guidance}
    result |= {"scheduler": type(pipeline.scheduler).__name__} | defaults.asked
    for objects, name in _NUMBERS:
        pictures = evaluate(
            pipeline,
            prompts(count, objects, seed),
            steps=defaults.steps,
            guidance=defaults.guidance,
            seed=seed,
            **defaults.asked,
        )
        result[name] = figures(pictures)
        contact_sheet(pictures).save(f"{sheets}-{objects}.png")
    return result


def judge_folder(recipe: Recipe, defaults: Defaults, **replaced: Any) -> dict[str, Any]:
    """Figures of the exported folder on fresh prompts; `replaced` parts are loaded in place of its own."""
    title = "-".join(["final", *(f"no-{name}" for name, part in replaced.items() if part is None)])
    pipeline = load(recipe.out, **replaced)
    return judged(pipeline, defaults, recipe.work / title, seed=recipe.seed + 2, count=EVALUATION_PROMPTS)


def finished(recipe: Recipe, report: dict[str, Any]) -> dict[str, Any]:
    """Write the report and the card beside the weights."""
    (recipe.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    (recipe.out / "README.md").write_text(card(recipe.out.name, report, size_bytes(recipe.out)))
    return report


def gated_autoencoder(
    recipe: Recipe, model: AutoencoderKL, scenes: int, noise: float = 0.0
) -> tuple[AutoencoderKL, dict[str, Any]]:
    """The autoencoder that has passed its gate, and its record; kept in the work folder once it has."""
    kept, passed = recipe.work / "vae", recipe.work / "vae" / "record.json"
    if passed.exists():
        known: dict[str, Any] = json.loads(passed.read_text())
        return AutoencoderKL.from_pretrained(kept).eval(), known
    data = draw(scenes, recipe.seed)
    checkpoint = recipe.work / "autoencoder.pt"
    done = autoencoder.train_autoencoder(
        model, data, recipe.budgets["autoencoder"], recipe.seed, checkpoint=checkpoint, noise=noise
    )
    autoencoder.standardize(model, Drawn(data.scenes[:4000], data.layouts[:4000], data.pixels[:4000]))
    gate = autoencoder_figures(model, GATE_SCENES, recipe.seed + 3)
    print(f"autoencoder gate: {gate}, scaling factor {model.config.scaling_factor}", flush=True)
    if gate["ok"] < GATE:
        raise GateNotPassed(f"{gate['ok']:.1%} of the reconstructions are read right, {GATE:.0%} are needed")
    record = done.as_dict() | {"gate": gate}
    model.save_pretrained(kept)
    passed.write_text(json.dumps(record))
    return model, record


def cached_latents(recipe: Recipe, vae: AutoencoderKL, data: Drawn, stage: str = "denoiser") -> torch.Tensor:
    """Latents of all scenes, shifted and scaled for the denoiser; encoded once and kept."""
    path = recipe.work / f"latents-{stage}.npy"
    if not path.exists():
        means = autoencoder.encode_all(vae, data).float()
        scaled = (means - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
        np.save(path, scaled.half().numpy())
    return torch.from_numpy(np.load(path))
