"""Licences to accept: which there are, what is refused without, and what a misspelt one is answered with."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from jubako.adapters.store import AdapterStore
from jubako.catalog import Catalog, load_catalog
from jubako.clip import TextToVideo
from jubako.errors import JubakoError, LicenceNotAccepted
from jubako.licences import require_known_licences
from jubako.planning import AnyRequest
from jubako.request import TextToImage
from jubako.services.admission import Admission
from jubako.services.families import Families
from jubako.services.replicas import Replicas
from jubako.settings import Settings, SettingsError, load_settings

OWN = """
family: sd
models:
  tiny-sd: {refiner: finisher}
  finisher:
    title: A refiner whose licence is to be accepted
    tasks: [img2img]
    pipeline: StableDiffusionPipeline
    prediction_type: epsilon
    parameters: 1
    memory_gb: 1
    max_rows: 2
    defaults: {width: 64, height: 64, num_inference_steps: 10, guidance_scale: 2, scheduler: Euler}
    limits: {max_side: 64, max_pixels: 4096}
    licence: {id: strict, url: "https://example.com/strict", commercial: "no", acceptance: true}
    weights: {folder: nowhere}
"""


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Catalog:
    folder = tmp_path_factory.mktemp("catalog")
    (folder / "sd.yaml").write_text(OWN, encoding="utf-8")
    return load_catalog(folder)


def accepting(*licences: str) -> Settings:
    return load_settings({"JUBAKO_ACCEPTED_LICENCES": ", ".join(licences)})


def admitted(request: AnyRequest, catalog: Catalog, settings: Settings, home: Path) -> JubakoError | None:
    """Why the gateway refuses a request, or None."""
    store, served = AdapterStore(home), frozenset(catalog.families)
    idle = Families({name: Replicas(name) for name in served}, catalog, settings)
    admission = Admission(catalog, settings, store, served, idle, known=catalog)
    try:
        asyncio.run(admission.job(request))
    except JubakoError as error:
        return error
    return None


def test_what_is_gated_or_non_commercial_is_to_be_accepted_and_the_miniatures_are_not() -> None:
    asking = {model.name for model in load_catalog() if model.licence.acceptance}
    shipped = list(load_catalog())
    assert asking >= {model.name for model in shipped if model.gated or model.licence.commercial == "no"}
    assert not {model.name for model in shipped if model.weights.folder} & asking
    assert not {"sd1.5", "sdxl", "shap-e", "animatediff"} & asking


@pytest.mark.parametrize(
    ("fields", "licence"),
    [
        ({"model": "sd3.5-medium"}, "stabilityai-community"),
        ({"model": "sdxl-turbo"}, "sai-nc-community"),
        ({"model": "tiny-sd", "refiner": True}, "strict"),
    ],
    ids=["gated", "non-commercial", "refiner"],
)
def test_it_is_refused_until_its_own_licence_is_accepted(
    catalog: Catalog, tmp_path: Path, fields: dict[str, Any], licence: str
) -> None:
    request = TextToImage.model_validate({"prompt": "a red circle", **fields})
    others = {"stabilityai-community", "sai-nc-community", "strict", "openrail++"} - {licence}
    refused = admitted(request, catalog, accepting(*others), tmp_path)
    assert isinstance(refused, LicenceNotAccepted)
    assert f"the licence {licence}" in refused.message
    for settings in (accepting(licence), accepting("all")):
        assert admitted(request, catalog, settings, tmp_path) is None


def test_a_clip_is_refused_for_the_model_that_draws_its_first_frame(catalog: Catalog, tmp_path: Path) -> None:
    request = TextToVideo(prompt="a red circle", model="tiny-svd", image_model="sd-turbo")
    refused = admitted(request, catalog, accepting(), tmp_path)
    assert isinstance(refused, LicenceNotAccepted)
    assert "sd-turbo is under" in refused.message
    assert admitted(request, catalog, accepting("sai-nc-community"), tmp_path) is None


def test_models_that_ask_for_nothing_need_no_setting(catalog: Catalog, tmp_path: Path) -> None:
    for model in ("tiny-sd", "sd1.5", "sdxl"):
        assert admitted(TextToImage(prompt="a dog", model=model), catalog, accepting(), tmp_path) is None


def test_a_misspelt_licence_is_no_setting_and_any_of_the_catalog_s_is(catalog: Catalog) -> None:
    with pytest.raises(SettingsError, match="Did you mean 'stabilityai-community'"):
        require_known_licences(accepting("stability-community"), catalog)
    require_known_licences(accepting("all", "openrail++", "strict"), catalog)
