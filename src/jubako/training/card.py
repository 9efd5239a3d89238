"""What an adapter comes with: a card of where it is from and how it was made, and a sheet of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from jubako.catalog import Model
from jubako.sheet import contact_sheet
from jubako.training.plan import TrainingPlan
from jubako.training.studio import Studio
from jubako.weights.layout import DENOISERS
from jubako.weights.parts import weights_of
from jubako.weights.store import read_record, require_weights

__all__ = ["base_of", "card", "curve", "sheet"]

SAMPLES = 4
CURVE_POINTS = 200
_PACKAGES = ("jubako", "torch", "diffusers", "transformers", "peft", "accelerate")


def card(
    plan: TrainingPlan,
    model: Model,
    *,
    base: Mapping[str, str],
    sha256: Sequence[str],
    losses: Sequence[float],
    seconds: float,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """The adapter's origin as JSON; ``sha256`` are the pictures' files, ``facts`` what the trainer adds."""
    return {
        "base": model.name,
        "weights": dict(base),
        "method": plan.method,
        "trigger": plan.trigger,
        "class_noun": plan.class_noun,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "licence": {
            **model.licence.model_dump(mode="json"),
            "of": "the base model; it binds the adapter too",
        },
        "pictures": {"count": len(sha256), "sha256": list(sha256)},
        "settings": plan.model_dump(mode="json"),
        "seconds": round(seconds, 1),
        "loss": {"first": _mean(losses[:20]), "last": _mean(losses[-20:]), "curve": curve(losses)},
        "versions": {name: _version(name) for name in _PACKAGES},
        **facts,
    }


def curve(losses: Sequence[float]) -> list[tuple[int, float]]:
    """At most 200 points of the loss: a step and the mean of the steps up to it since the point before."""
    width = max(1, -(-len(losses) // CURVE_POINTS))
    ends = range(width, len(losses) + width, width)
    return [(min(end, len(losses)), _mean(losses[end - width : end])) for end in ends if losses]


def base_of(home: Path, model: Model) -> dict[str, str]:
    """Which weights of the base were trained on: the repository's commit, or the digest of the denoiser."""
    record = read_record(home, model)
    if record is not None and record.commit:
        return {"repo": record.repo, "commit": record.commit}
    place = require_weights(home, model)
    digest = hashlib.sha256()
    for file in [place] if place.is_file() else _denoiser_files(place, model):
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return {"denoiser_sha256": digest.hexdigest()}


def sheet(plan: TrainingPlan, model: Model, studio: Studio) -> Image.Image:
    """Pictures with the trigger and without it, from seeds that the training has not used."""
    seeds = [plan.seed % 2**31 + number for number in range(SAMPLES)]
    prompts = [plan.validation_prompt, plan.class_prompts[0]]
    pictures = studio.draw(
        [prompt for prompt in prompts for _ in seeds], seeds * len(prompts), plan.sample_steps
    )
    rows = [pictures[start : start + SAMPLES] for start in range(0, len(pictures), SAMPLES)]
    return contact_sheet(
        rows,
        prompts,
        [f"seed {seed}" for seed in seeds],
        f"{plan.trigger} on {model.name}",
        f"{plan.method}, {plan.steps} steps",
    )


def _denoiser_files(folder: Path, model: Model) -> list[Path]:
    name = next(name for name in DENOISERS if (folder / name).is_dir())
    files, _ = weights_of(name, folder, model)
    return [folder / name / file for file in sorted(files)]


def _mean(losses: Sequence[float]) -> float:
    return round(sum(losses) / max(1, len(losses)), 5)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"
