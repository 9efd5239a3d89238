"""The shipped catalog and what is refused in a user's own."""

from __future__ import annotations

import inspect
from pathlib import Path

import diffusers
import pytest

from jubako.catalog import Catalog, CatalogError, Model, load_catalog, shipped_folder
from jubako.errors import UnknownModel
from jubako.planning import plan
from jubako.request import TextToImage

SHIPPED = load_catalog()

NAMES = {
    "tiny-sd",
    "sd1.4",
    "sd1.5",
    "sd1.5-inpainting",
    "sd2-base",
    "sd2",
    "sd2.1-base",
    "sd2.1",
    "sd-turbo",
}


def overlaid(folder: Path, text: str) -> Catalog:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return load_catalog(folder)


def test_the_models_of_the_first_families_are_there() -> None:
    assert set(SHIPPED.names) >= NAMES
    assert SHIPPED.default_model().name == "tiny-sd"


@pytest.mark.parametrize("model", list(SHIPPED), ids=lambda model: model.name)
def test_every_entry_names_a_pipeline_and_components_that_diffusers_has(model: Model) -> None:
    pipeline = getattr(diffusers, model.pipeline)
    assert set(model.weights.components_left_out) <= set(inspect.signature(pipeline.__init__).parameters)


@pytest.mark.parametrize("model", [m for m in SHIPPED if "txt2img" in m.tasks], ids=lambda model: model.name)
def test_every_model_s_defaults_are_within_its_own_limits(model: Model) -> None:
    job = plan(TextToImage(prompt="a red circle", model=model.name), SHIPPED)
    assert (job.width, job.height) == (model.defaults.width, model.defaults.height)
    assert job.num_inference_steps == model.defaults.num_inference_steps


@pytest.mark.parametrize("model", list(SHIPPED), ids=lambda model: model.name)
def test_every_licence_has_a_link_and_limited_ones_a_note(model: Model) -> None:
    assert model.licence.url.startswith("https://")
    assert model.licence.commercial == "yes" or model.licence.note


def test_an_embedded_model_s_folder_is_beside_the_catalog() -> None:
    folder = SHIPPED.model("tiny-sd").weights.folder
    assert folder == (shipped_folder() / "embedded" / "tiny-sd").resolve()


def test_a_user_s_file_changes_one_default_and_keeps_the_rest(tmp_path: Path) -> None:
    catalog = overlaid(
        tmp_path, "family: sd\nmodels: {sd1.5: {defaults: {num_inference_steps: 30}, gated: true}}"
    )
    mine, shipped = catalog.model("sd1.5"), SHIPPED.model("sd1.5")
    assert mine.defaults.num_inference_steps == 30
    assert mine.gated
    assert mine.limits == shipped.limits
    assert catalog.model("sd1.4") == SHIPPED.model("sd1.4")


def test_a_user_s_file_adds_a_model(tmp_path: Path) -> None:
    entry = SHIPPED.model("sd1.5").model_dump_json(exclude={"name", "family"})
    catalog = overlaid(tmp_path, f"family: sd\nmodels:\n  dreamy: {entry}")
    assert catalog.model("dreamy").weights.repo == "stable-diffusion-v1-5/stable-diffusion-v1-5"


def test_a_user_s_weight_folder_is_relative_to_the_user_s_file(tmp_path: Path) -> None:
    catalog = overlaid(tmp_path, "family: sd\nmodels: {tiny-sd: {weights: {folder: here}}}")
    assert catalog.model("tiny-sd").weights.folder == tmp_path / "here"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: {}", "mine.yaml: family: every file names its family"),
        ("family: sd\nmodels: 3", "mine.yaml: models: expected names"),
        ("family: sd\nmodels: {sd1.5: {stepps: 3}}", r"sd.yaml \+ mine.yaml: models.sd1.5.stepps: Extra"),
        (
            "family: sd\nmodels: {sd1.5: {limits: {max_side: big}}}",
            "models.sd1.5.limits.max_side: Input should be a valid integer",
        ),
        (
            "family: sd\nmodels: {sd1.5: {defaults: {scheduler: Eular}}}",
            "models.sd1.5.*defaults.scheduler.*unknown scheduler 'Eular'. Did you mean 'Euler'",
        ),
        (
            "family: sd\nmodels: {sd1.5: {weights: {folder: x}}}",
            "models.sd1.5.weights.*one of repo, folder and file",
        ),
        ("family: [", "mine.yaml: while parsing"),
        ("family: two\nmodels: {sd1.5: {}}", "mine.yaml: service: Field required"),
        ("family: sd\nmodels: {sd1.5: {default: true}}", "more than one model is marked as default"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        overlaid(tmp_path, text)


def test_an_unknown_model_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(UnknownModel, match=r"Did you mean 'sd1.5'\? Known: tiny-sd, sd1.4") as caught:
        SHIPPED.model("sd15")
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(CatalogError, match="unknown family 'sdx'; known: sd"):
        SHIPPED.only(("sdx",))
