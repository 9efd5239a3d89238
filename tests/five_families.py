"""A small model of each family, as the runner loads them: the miniatures, and a random Shap-E."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mesh_pipelines import shap_e_pipeline
from oracle import photograph

from jubako.catalog import Catalog, load_catalog
from jubako.job import Job
from jubako.planning import REQUESTS, plan
from jubako.runner import Runner
from jubako.settings import load_settings

__all__ = ["FAMILIES", "catalog_of_five", "order", "running"]

FAMILIES: Mapping[str, str] = {
    "sd": "tiny-sd",
    "sdxl": "tiny-sdxl",
    "sd3": "tiny-sd3",
    "video": "tiny-svd",
    "mesh": "shap-e",
}
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "video": {"image": photograph(), "width": 32, "height": 32, "num_frames": 2, "output_format": "zip"},
    "mesh": {"prompt": "a red chair", "grid_size": 16, "output_format": "obj"},
}


def catalog_of_five(folder: Path) -> Catalog:
    """The shipped catalog, with a Shap-E that is on disk in this folder."""
    shap_e_pipeline().save_pretrained(folder / "shap-e")
    (folder / "mesh.yaml").write_text(
        "family: mesh\nmodels:\n  shap-e: {weights: {repo: null, folder: shap-e}}\n", encoding="utf-8"
    )
    return load_catalog(folder)


def order(catalog: Catalog, family: str, **fields: Any) -> Job:
    """A job of the family's small model; what is not given has a small value."""
    model = catalog.model(FAMILIES[family])
    given = {"prompt": "a large red circle", "steps": 4, "seed": 7, "model": model.name}
    given |= {**_FIELDS.get(family, {}), **fields}
    if family == "video":
        del given["prompt"]  # it reads none
    request = REQUESTS[model.tasks[0]].model_validate(given)
    return plan(request, catalog)


@contextmanager
def running(catalog: Catalog, family: str, home: Path, **settings: str) -> Iterator[Runner]:
    """The family's runner on the CPU."""
    own = {"JUBAKO_HOME": str(home), "JUBAKO_DEVICE": "cpu", **settings}
    runner = Runner(catalog.families[family], load_settings(own))
    try:
        yield runner
    finally:
        runner.close()
