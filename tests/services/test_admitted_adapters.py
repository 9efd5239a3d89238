"""Adapters at admission: not here, made for another family, replaced meanwhile; before anything is queued."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from lora_files import tiny_sd_lora

from jubako.adapters.store import AdapterStore
from jubako.catalog import load_catalog
from jubako.clip import TextToVideo
from jubako.compare import Comparison
from jubako.errors import InvalidRequest
from jubako.images import ImagesGenerate
from jubako.mesh import TextToMesh
from jubako.request import TextToImage
from jubako.services.admission import Admission
from jubako.services.families import Families
from jubako.services.replicas import Replicas
from jubako.settings import load_settings

KNOWN = load_catalog()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> AdapterStore:
    """A home with an adapter without a card and some whose cards name a base in each way."""
    home = tmp_path_factory.mktemp("home")
    file = tiny_sd_lora(home / "zog.safetensors", 1)
    store = AdapterStore(home)
    store.add("bare", file)
    store.add("own", file, {"base": "tiny-sd"})
    store.add("stranger", file, {"base": "sdxl"})
    store.add("trained", file, {"base": {"model": "tiny-sd3", "denoiser_sha256": "00"}})
    store.add("elsewhere", file, {"base": "a model that nobody here knows"})
    store.add("lcm-sdxl", file, {"base": "sd1.5"})
    return store


@pytest.fixture
def admission(store: AdapterStore, tmp_path: Path) -> Admission:
    """One that serves everything but SDXL."""
    served = tuple(name for name in KNOWN.families if name != "sdxl")
    settings = load_settings({"JUBAKO_HOME": str(tmp_path)})
    catalog = KNOWN.only(served)
    idle = Families({name: Replicas(name) for name in served}, catalog, settings)
    return Admission(catalog, settings, store, frozenset(served), idle, known=KNOWN)


def asked(*names: str, **fields: Any) -> dict[str, Any]:
    return {"prompt": "a red circle", "loras": [{"name": name} for name in names], **fields}


@pytest.mark.parametrize("name", ["bare", "own", "elsewhere", "lcm-sdxl"])
def test_one_of_the_family_or_of_none_is_bound_to_its_content(
    admission: Admission, store: AdapterStore, name: str
) -> None:
    """What is here counts by its own card, also when the catalog has another one of that name."""
    job = asyncio.run(admission.job(TextToImage.model_validate(asked(name))))
    assert [use.sha256 for use in job.loras] == [store.find(name).sha256]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("stranger", "loras: stranger was made for sdxl of the family sdxl; tiny-sd is of sd"),
        ("trained", "loras: trained was made for tiny-sd3 of the family sd3; tiny-sd is of sd"),
        ("pixel-art-xl", "loras: pixel-art-xl was made for sdxl of the family sdxl; tiny-sd is of sd"),
        ("lcm-sd1.5", "loras: lcm-sd1.5 is not on this machine; fetch it with: jubako pull lcm-sd1.5"),
        ("nobody", "loras: there is no adapter 'nobody'"),
    ],
)
def test_one_that_can_not_be_is_refused_by_every_way_in(admission: Admission, name: str, told: str) -> None:
    fields = asked("own", name)
    tagged = f"a red circle <lora:{name}:0.5>"
    ways = [
        admission.job(TextToImage.model_validate(fields)),
        admission.job(TextToImage(prompt=tagged)),
        admission.pictures(ImagesGenerate.model_validate(fields)),
        admission.comparison(Comparison.model_validate({**fields, "models": ["tiny-sd"]})),
        admission.job(TextToVideo(prompt=tagged, model="tiny-svd")),
        admission.job(TextToMesh(prompt=tagged, model="shap-e-img2img")),
    ]
    for way in ways:
        with pytest.raises(InvalidRequest) as caught:
            asyncio.run(way)
        assert caught.value.message.startswith(told)
        assert caught.value.param == "loras"


def test_the_adapters_of_a_picture_that_is_drawn_first_are_bound_too(
    admission: Admission, store: AdapterStore
) -> None:
    job = asyncio.run(admission.job(TextToVideo(prompt="a star <lora:own:1>", model="tiny-svd")))
    assert job.source is not None
    assert [use.sha256 for use in job.source.loras] == [store.find("own").sha256]


def test_every_cell_of_a_comparison_is_bound(admission: Admission, store: AdapterStore) -> None:
    request = Comparison.model_validate(
        asked("bare", models="tiny-sd,sd1.5", axis={"field": "steps", "values": [1, 2]})
    )
    rows = asyncio.run(admission.comparison(request))
    bound = {use.sha256 for row in rows for cell in row for use in cell.job.loras}
    assert bound == {store.find("bare").sha256}
