"""The shipped catalog and what is refused in a user's own."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from PIL import Image

from jubako.catalog import AdapterEntry, Catalog, CatalogError, Model, Task, load_catalog, shipped_folder
from jubako.errors import UnknownModel
from jubako.pictures import png
from jubako.planning import REQUESTS, plan
from jubako.schedulers import resolve_scheduler
from jubako.weights.recipe import pipeline_class

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
    "tiny-svd",
    "svd",
    "svd-xt",
    "animatediff",
    "shap-e",
}
ADAPTER = SHIPPED.adapters["lcm-sd1.5"].model_dump_json(exclude={"name", "family"})
IN_WORKERS = [model for model in SHIPPED if model.weights.worker is not None]


def overlaid(folder: Path, text: str) -> Catalog:
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    return load_catalog(folder)


def test_the_models_that_everything_is_about_are_there() -> None:
    assert set(SHIPPED.names) >= NAMES
    assert SHIPPED.default_model().name == "tiny-sd"


def components(model: Model) -> set[str]:
    """What the pipelines are made of that load from the model's repository."""
    same = [each for each in SHIPPED if each.weights.repo == model.weights.repo] if model.weights.repo else []
    kinds = {pipeline_class(each) for each in (model, *same)}
    return {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}


@pytest.mark.parametrize(
    "model", [model for model in SHIPPED if model not in IN_WORKERS], ids=lambda model: model.name
)
def test_every_entry_names_a_pipeline_and_components_that_there_are(model: Model) -> None:
    assert set(model.weights.components_left_out) <= components(model)


@pytest.mark.parametrize("model", IN_WORKERS, ids=lambda model: model.name)
def test_a_model_of_a_worker_comes_without_an_address(model: Model) -> None:
    assert model.weights.worker is not None
    assert model.weights.worker.url is None


@pytest.mark.parametrize(
    ("model", "task"),
    [(model, task) for model in SHIPPED for task in model.tasks],
    ids=lambda value: value.name if isinstance(value, Model) else value,
)
def test_every_model_s_defaults_are_within_its_own_limits(model: Model, task: Task) -> None:
    own, kind = model.defaults, REQUESTS[task]
    picture, mask = Image.new("RGB", (own.width, own.height)), Image.new("L", (own.width, own.height))
    mask.paste(255, (0, 0, 8, 8))
    fields = {"prompt": "a red circle", "image": png(picture), "mask": png(mask)}
    request = kind(model=model.name, **{name: fields[name] for name in fields.keys() & kind.model_fields})
    job = plan(request, SHIPPED)
    assert (job.task, job.model) == (task, model.name)
    assert (job.width, job.height) == (own.width, own.height)
    assert (job.num_inference_steps, job.guidance_scale) == (own.num_inference_steps, own.guidance_scale)
    assert (job.clip, job.solid) == (own.clip, own.solid)


@pytest.mark.parametrize("model", list(SHIPPED), ids=lambda model: model.name)
def test_every_licence_has_a_link_and_limited_ones_a_note(model: Model) -> None:
    assert model.licence.url.startswith("https://")
    assert model.licence.commercial == "yes" or model.licence.note


@pytest.mark.parametrize("adapter", SHIPPED.adapters.values(), ids=lambda adapter: adapter.name)
def test_every_adapter_is_for_models_of_pictures_and_has_a_licence(adapter: AdapterEntry) -> None:
    assert all("txt2img" in SHIPPED.model(base).tasks for base in adapter.base)
    assert {SHIPPED.model(base).family for base in adapter.base} == {adapter.family}
    assert adapter.licence.url.startswith("https://")
    assert adapter.licence.commercial == "yes" or adapter.licence.note
    if named := re.search(r"the scheduler (\S+(?: SGM Uniform)?)", adapter.summary or ""):
        assert resolve_scheduler(named[1], SHIPPED.model(adapter.base[0]).flow)


def test_a_user_s_file_adds_an_adapter(tmp_path: Path) -> None:
    catalog = overlaid(tmp_path, f"family: sd\nadapters:\n  mine: {ADAPTER}")
    assert catalog.adapters["mine"].repo == "latent-consistency/lcm-lora-sdv1-5"
    assert catalog.adapters.keys() > SHIPPED.adapters.keys()


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
            "models.sd1.5.weights.*one of repo, folder, file and worker",
        ),
        ("family: [", "mine.yaml: while parsing"),
        ("family: two\nmodels: {sd1.5: {}}", "mine.yaml: service: Field required"),
        (
            "family: video\nmodels: {svd: {defaults: {clip: null}}}",
            "models.svd: Value error, defaults.clip goes with img2vid and txt2vid",
        ),
        (
            "family: mesh\nmodels: {sf3d: {weights: {worker: {health_path: well}}}}",
            "models.sf3d.weights.worker.health_path",
        ),
        (
            "family: video\nmodels: {sv3d-u: {weights: {overlay: {kind: adapter}}}}",
            "models.sv3d-u.weights.overlay.kind: Input should be 'denoiser', 'lora', 'motion' or 'original'",
        ),
        ("family: sd\nmodels: {sd1.5: {default: true}}", "more than one model is marked as default"),
        ("family: sd\nadapters: 3", r"sd.yaml \+ mine.yaml: adapters: Input should be a valid"),
        ("family: sd\nadapters: {lcm-sd1.5: {bases: []}}", "adapters.lcm-sd1.5.bases: Extra"),
        ("family: sd\nadapters: {lcm-sd1.5: {base: [sdxl]}}", "base: 'sdxl' is no model of this family"),
        ("family: sd\nadapters: {lcm-sd1.5: {file: a.bin}}", "a.bin is a pickle"),
        ("family: sd\nadapters: {lcm-sd1.5: {file: ../a.safetensors}}", "is no file of latent-consistency"),
        (f"family: sd\nadapters: {{a/b: {ADAPTER}}}", "adapters.a/b.name: String should match pattern"),
        (f"family: sd\nadapters: {{sdxl: {ADAPTER}}}", "'sdxl' stands in the catalog twice: in sd and sdxl"),
    ],
)
def test_a_bad_file_is_refused_by_file_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(CatalogError, match=message):
        overlaid(tmp_path, text)


def test_an_unknown_model_lists_the_known_ones_and_the_nearest() -> None:
    known = ", ".join(SHIPPED.names)
    with pytest.raises(UnknownModel) as caught:
        SHIPPED.model("sd15")
    assert caught.value.message == f"model: unknown model 'sd15'. Did you mean 'sd1.5'? Known: {known}"
    assert (caught.value.status, caught.value.param) == (404, "model")


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        CatalogError, match=re.escape("unknown family 'sdx'; known: sd, mesh, sd3, sdxl, video")
    ):
        SHIPPED.only(("sdx",))
