"""Every recipe from its first stage to its card, in two steps a stage; the result can draw nothing yet."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from jubako.miniatures import recipe
from jubako.miniatures.recipe import Defaults, Recipe
from jubako.miniatures.training import Budget

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl", "tiny-sdxl-lightning", "tiny-sd3", "tiny-svd"])
def test_recipe_ends_with_a_folder_a_report_and_a_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniature = import_module(f"jubako.miniatures.{name.replace('-', '_')}")
    for constant in ("AUTOENCODER_SCENES", "DENOISER_SCENES", "SCENES", "PATHS", "GATE_FRAMES"):
        if hasattr(miniature, constant):
            monkeypatch.setattr(miniature, constant, 48)
    if hasattr(miniature, "EVALUATION_CLIPS"):
        monkeypatch.setattr(miniature, "EVALUATION_CLIPS", 2)
    few = Defaults(2, miniature.DEFAULTS.guidance, miniature.DEFAULTS.asked)
    monkeypatch.setattr(miniature, "DEFAULTS", few)
    monkeypatch.setattr(recipe, "GATE", 0.0)
    monkeypatch.setattr(recipe, "GATE_SCENES", 8)
    monkeypatch.setattr(recipe, "EVALUATION_PROMPTS", 2)
    (tmp_path / "work").mkdir()
    origin = getattr(miniature, "ORIGIN", None)
    if origin is not None:
        (tmp_path / origin).symlink_to(EMBEDDED / origin)
    way = Recipe(
        work=tmp_path / "work",
        out=tmp_path / name,
        seed=1,
        budgets={stage: Budget(steps=2) for stage in miniature.STAGES},
    )
    report = miniature.train(way)
    assert json.loads((way.out / "training.json").read_text()) == json.loads(json.dumps(report))
    assert report["denoiser"]["steps"] == 2
    assert f"# {name}" in (way.out / "README.md").read_text()
    shipped = {path.relative_to(EMBEDDED / name) for path in (EMBEDDED / name).rglob("*")}
    assert {path.relative_to(way.out) for path in way.out.rglob("*")} == shipped


def test_what_grows_out_of_another_needs_it(tmp_path: Path) -> None:
    way = Recipe(work=tmp_path, out=tmp_path / "tiny-sdxl", seed=1, budgets={})
    with pytest.raises(FileNotFoundError, match="grows out of tiny-sd"):
        way.origin("tiny-sd")
