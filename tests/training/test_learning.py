"""The proof that training works: five pictures of a shape that no miniature has seen, then fifty prompts.

The checker of ``plus.py`` looks for the subject in pictures of fresh prompts and seeds; that of the world
judges prompts without the trigger before and after, from the same seeds. Each takes minutes, so they run with
``JUBAKO_LONG_TESTS=1`` only.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from plus import FIVE, Drawn, find
from trainings import CATALOG, finished, folder_for

from jubako.catalog import shipped_folder
from jubako.miniatures.reader import judge, read
from jubako.miniatures.world import COLOURS, PLACES, Scene, random_scene
from jubako.training.folder import TrainingFolder

PROMPTS = 50
SECONDS = 300
long = pytest.mark.skipif(
    os.environ.get("JUBAKO_LONG_TESTS") != "1", reason="takes minutes: set JUBAKO_LONG_TESTS=1"
)


@dataclass(frozen=True)
class Asked:
    """A prompt with the trigger, as it has never been trained on, and what it asks for."""

    colour: str
    background: str
    place: str

    @property
    def prompt(self) -> str:
        return _phrase(self.colour, self.background, self.place)


@dataclass(frozen=True)
class Score:
    """Of 50 pictures each: the subject found, found in the colours that were asked for, the world kept."""

    found: int
    in_its_colours: int
    world: int


def _phrase(colour: str, background: str, place: str) -> str:
    words = "in the center" if place == "center" else f"on the {place}"
    return f"a large {colour} zog {words} of a {background} background"


def caption(drawn: Drawn) -> str:
    place = min(PLACES, key=lambda name: (PLACES[name][0] - drawn.x) ** 2 + (PLACES[name][1] - drawn.y) ** 2)
    return _phrase(drawn.colour, drawn.background, place)


def asked() -> list[Asked]:
    """Fifty of the 280 combinations; those of the five pictures are not among them."""
    every = [Asked(c, b, place) for c in COLOURS for b in COLOURS for place in PLACES if c != b]
    fresh = [each for each in every if each.prompt not in {caption(drawn) for drawn in FIVE}]
    return [fresh[i] for i in np.random.default_rng(50).permutation(len(fresh))[:PROMPTS]]


def scenes() -> list[Scene]:
    """Fifty scenes of the captioned world, with one object and with two."""
    rng = np.random.default_rng(51)
    return [random_scene(rng, 1 + number % 2) for number in range(PROMPTS)]


@cache
def stock(model: str) -> Any:
    """The stock pipeline of a miniature."""
    pipeline = DiffusionPipeline.from_pretrained(shipped_folder() / "embedded" / model)
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    return pipeline


def pictures(model: str, prompts: Sequence[str], first_seed: int) -> list[Image.Image]:
    """Pictures as the model's defaults have them but for the number of steps, each from a seed of its own."""
    extra = {"max_sequence_length": 32} if model == "tiny-sd3" else {}
    made: list[Image.Image] = []
    for start in range(0, len(prompts), 25):
        part = prompts[start : start + 25]
        seeds = range(first_seed + start, first_seed + start + len(part))
        made += stock(model)(
            list(part),
            num_inference_steps=10,
            guidance_scale=CATALOG.model(model).defaults.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **extra,
        ).images
    return made


def score(model: str) -> Score:
    """What the model draws now of the fifty prompts with the trigger and of the fifty without."""
    wanted, world = asked(), scenes()
    seen = [find(picture) for picture in pictures(model, [each.prompt for each in wanted], 90_000)]
    right = [
        found.plus and (found.colour, found.background) == (each.colour, each.background)
        for found, each in zip(seen, wanted, strict=True)
    ]
    drawn = pictures(model, [scene.caption() for scene in world], 80_000)
    kept = [judge(read(picture), scene).ok for picture, scene in zip(drawn, world, strict=True)]
    return Score(sum(found.plus for found in seen), sum(right), sum(kept))


def learned(model: str, path: Path, **fields: Any) -> tuple[TrainingFolder, Score, Score]:
    """Train on the five pictures and their captions; the base's score and the score with the adapter."""
    captions = [caption(drawn) for drawn in FIVE]
    folder = folder_for(path / "training", model=model, captions=captions, validation_every=0, **fields)
    assert finished(folder, timeout=3 * SECONDS) == 0
    base = score(model)
    stock(model).load_lora_weights(folder.path, weight_name=folder.adapter.name)
    with_adapter = score(model)
    stock(model).unload_lora_weights()
    print(f"\n{model}: base {base}, with the adapter {with_adapter}, {_seconds(folder):.0f} s")
    return folder, base, with_adapter


def _seconds(folder: TrainingFolder) -> float:
    """From the first event to the last, the class's pictures and the sheet included."""
    times = [event["time"] for _, event in folder.read_events()]
    return float(times[-1] - times[0])


@long
@pytest.mark.timeout(4 * SECONDS)
@pytest.mark.parametrize("model", ["tiny-sd", "tiny-sdxl"])
def test_five_pictures_teach_a_new_shape_and_the_world_is_kept(model: str, tmp_path: Path) -> None:
    folder, base, trained = learned(model, tmp_path)
    assert base.found == 0, "the miniature knew it before"
    assert trained.found >= 0.8 * PROMPTS
    assert trained.in_its_colours >= 0.7 * PROMPTS
    assert trained.world >= base.world - 0.05 * PROMPTS
    card = json.loads(folder.card.read_text(encoding="utf-8"))
    assert card["loss"]["last"] < card["loss"]["first"]


@long
@pytest.mark.timeout(4 * SECONDS)
def test_sd3_improves(tmp_path: Path) -> None:
    _, base, trained = learned("tiny-sd3", tmp_path)
    assert trained.found > base.found + 0.1 * PROMPTS
    assert trained.world >= base.world - 0.1 * PROMPTS
