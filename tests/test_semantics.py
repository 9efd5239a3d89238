"""Whether pictures show what was asked: the pixel checker on the miniatures, through the engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracle import CATALOG, batched, wrapped
from PIL import Image, ImageChops, ImageDraw

from jubako.families.latent import LatentModel
from jubako.miniatures.reader import Seen, read, shows
from jubako.miniatures.world import PLACES, arrange, parse, render
from jubako.pictures import composited, png
from jubako.planning import plan
from jubako.request import ImageToImage, Inpaint, TextToImage
from jubako.weights.components import ComponentStore

MINIATURES = ("tiny-sd", "tiny-sdxl", "tiny-sd3")
every_miniature = pytest.mark.parametrize("model", MINIATURES)

# What is drawn, where it stands first, where it shall stand.
MOVES = (
    ("large red circle", "left", "right", "blue"),
    ("small yellow star", "top", "bottom", "black"),
    ("large white square", "right", "left", "red"),
    ("large orange triangle", "bottom", "top", "white"),
    ("small green ring", "left", "top", "yellow"),
    ("large purple star", "top", "right", "orange"),
)
NEIGHBOURS = (
    ("a large red circle", "left of a large green square on a blue background"),
    ("a large white star", "left of a small yellow ring on a black background"),
    ("a small green square", "left of a large purple triangle on an orange background"),
    ("a large blue ring", "left of a large red star on a white background"),
)
PAIRS = (
    "a small red ring above a large white square on a black background",
    "a large green star right of a small purple circle on a yellow background",
    "a small orange triangle below a large blue ring on a white background",
    "a large black square left of a large yellow star on a red background",
)


@cache
def loaded(model: str) -> LatentModel:
    entry = CATALOG.model(model)
    store = ComponentStore(CATALOG.families[entry.family].models)
    assembly = store.load(entry, Path("unused"), torch.device("cpu"), torch.float32)
    return wrapped(assembly.pipeline, model)


def pictures(requests: Sequence[TextToImage]) -> list[Image.Image]:
    """The pictures of requests to one model, in order, all in one batcher."""
    jobs = [plan(request, CATALOG) for request in requests]
    model = loaded(jobs[0].model)
    outcomes = batched({jobs[0].model: model}, jobs)
    return [
        composited(model.to_image(outcome.picture), job) for outcome, job in zip(outcomes, jobs, strict=True)
    ]


def drawn(caption: str) -> Image.Image:
    return render(arrange(parse(caption), np.random.default_rng(1)))


def place(seen: Seen) -> str:
    return min(PLACES, key=lambda name: (PLACES[name][0] - seen.x) ** 2 + (PLACES[name][1] - seen.y) ** 2)


def moved(model: str, strength: float, prompts: Sequence[str], **fields: Any) -> list[Image.Image]:
    """Each of the MOVES' first pictures, made anew with this strength under its prompt."""
    starts = [
        png(drawn(f"a {what} on the {start} of a {ground} background")) for what, start, _, ground in MOVES
    ]
    return pictures(
        [
            ImageToImage(model=model, prompt=prompt, image=start, strength=strength, seed=seed, **fields)
            for seed, (prompt, start) in enumerate(zip(prompts, starts, strict=True))
        ]
    )


def followed(model: str, strength: float, **fields: Any) -> int:
    """How many of the MOVES stand at their goal afterwards."""
    prompts = [f"a {what} on the {goal} of a {ground} background" for what, _, goal, ground in MOVES]
    finished = moved(model, strength, prompts, **fields)
    return sum(shows(picture, prompt).ok for picture, prompt in zip(finished, prompts, strict=True))


@every_miniature
def test_a_low_strength_keeps_the_layout_and_a_high_one_follows_the_prompt(model: str) -> None:
    # The prompt leaves the place open: only the picture tells it.
    weak = [
        read(picture)
        for picture in moved(
            model, 0.3, [f"a {what} on a {ground} background" for what, _, _, ground in MOVES]
        )
    ]
    kept = [
        len(reading.objects) == 1 and place(reading.objects[0]) == start
        for reading, (_, start, _, _) in zip(weak, MOVES, strict=True)
    ]
    assert sum(kept) >= 4, f"kept at 0.3: {kept}"
    assert followed(model, 0.9) >= 5


@every_miniature
def test_inpainting_adds_what_was_asked_and_leaves_the_rest_alone(model: str) -> None:
    mask = Image.new("L", (64, 64), 0)
    ImageDraw.Draw(mask).rectangle((34, 0, 63, 63), 255)
    starts = [
        drawn(f"{one} on the left of {second[second.index(' on ') + 4 :]}") for one, second in NEIGHBOURS
    ]
    wanted = [f"{one} {second}" for one, second in NEIGHBOURS]
    finished = pictures(
        [
            Inpaint(model=model, prompt=caption, image=png(start), mask=png(mask), strength=0.95, seed=number)
            for number, (caption, start) in enumerate(zip(wanted, starts, strict=True))
        ]
    )
    outside = np.asarray(mask) == 0
    for picture, start in zip(finished, starts, strict=True):
        changed = np.asarray(ImageChops.difference(picture, start))
        assert changed[outside].max() <= 2
        assert changed[~outside].max() > 50
    shown = [shows(picture, caption).ok for picture, caption in zip(finished, wanted, strict=True)]
    assert sum(shown) >= 3, shown


@every_miniature
def test_higher_guidance_raises_adherence(model: str) -> None:
    # From noise alone the miniatures need no guidance; against a picture that says otherwise they do.
    assert followed(model, 0.5, guidance_scale=4.0) > followed(model, 0.5, guidance_scale=1.0)


@every_miniature
def test_a_negative_prompt_lowers_the_rate_of_its_colour(model: str) -> None:
    def backgrounds(negative_prompt: str | None) -> Counter[str]:
        asked = [
            TextToImage(
                model=model,
                prompt="a large red circle on the left",
                negative_prompt=negative_prompt,
                guidance_scale=3,
                seed=seed,
                num_inference_steps=12,
            )
            for seed in range(12)
        ]
        return Counter(read(picture).background for picture in pictures(asked))

    free = backgrounds(None)
    colour, often = free.most_common(1)[0]
    assert often >= 3, f"no background comes three times: {free}"
    assert backgrounds(colour)[colour] <= often / 2


def test_lightning_s_four_steps_show_what_was_asked() -> None:
    captions = [
        *PAIRS,
        *(f"a {what} on the {goal} of a {ground} background" for what, _, goal, ground in MOVES),
    ]
    asked = [
        TextToImage(model="tiny-sdxl-lightning", prompt=caption, seed=seed)
        for seed, caption in enumerate(captions)
    ]
    shown = [shows(picture, caption).ok for picture, caption in zip(pictures(asked), captions, strict=True)]
    assert sum(shown) >= 8, shown
