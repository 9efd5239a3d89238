"""Requests with other adapters through a real server at the same time."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from lora_files import NAMES, add_four
from PIL import Image
from server import Server

from jubako.adapters.store import AdapterStore
from jubako.catalog import load_catalog
from jubako.weights.components import ComponentStore

CATALOG = load_catalog()
PROMPT = "a large red circle on the left of a blue background"
Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def adapted(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server with four adapters that it had not when it began."""
    folder, home = tmp_path_factory.mktemp("adapters"), server.log.parent / "jubako"
    components = ComponentStore(CATALOG.families["sd"].models)
    model = components.load(CATALOG.model("tiny-sd"), home, torch.device("cpu"), torch.float32)
    store = AdapterStore(home)
    add_four(store, model.pipeline, folder)
    yield server
    for name in NAMES:
        store.remove(name)


def fields(loras: Mapping[str, float], *, tags: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"prompt": PROMPT, "seed": 3, "steps": 8}
    if tags:
        return asked | {"prompt": PROMPT + "".join(f" <lora:{name}:{loras[name]}>" for name in loras)}
    return asked | {"loras": [{"name": name, "weight": weight} for name, weight in loras.items()]}


def picture(server: Server, asked: Mapping[str, Any]) -> tuple[Pixels, float, float]:
    """The picture, when it was asked for, and when it was there."""
    began = time.monotonic()
    reply = server.post("/txt2img", asked)
    assert reply.status_code == 200, reply.text
    return np.asarray(Image.open(io.BytesIO(reply.content))).astype(int), began, time.monotonic()


def test_eight_requests_over_four_adapters_and_the_base_are_what_they_are_alone(adapted: Server) -> None:
    ash, birch, cedar, dogwood = NAMES
    sets: list[dict[str, float]] = [
        {},
        {ash: 1.0},
        {birch: 0.7},
        {cedar: -0.5, ash: 0.4},
        {dogwood: 1.0},
        {},
        {birch: 0.7},
        {dogwood: 0.2, birch: 0.2, cedar: 0.2},
    ]
    before, *_ = picture(adapted, fields({}, tags=False))
    asked = [fields(loras, tags=place % 2 > 0) for place, loras in enumerate(sets)]
    with ThreadPoolExecutor(len(asked)) as threads:
        mixed = list(threads.map(lambda each: picture(adapted, each), asked))
    # All were there before the first was done.
    assert max(began for _, began, _ in mixed) < min(ended for _, _, ended in mixed)
    for each, loras, (found, _, _) in zip(asked, sets, mixed, strict=True):
        if loras:
            alone, *_ = picture(adapted, each)
            assert abs(found - alone).max() <= 2
        assert (abs(found - before).max() > 2) == bool(loras)
    assert np.array_equal(picture(adapted, fields({}, tags=False))[0], before)
