"""Every recipe from its first stage to its card, in two small steps a stage; the result draws nothing yet."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import pytest

from jubako.miniatures import autoencoder, denoiser, distillation, recipe, sd3, sdxl, svd, text
from jubako.miniatures.recipe import Defaults, Recipe
from jubako.miniatures.training import Budget

EMBEDDED = Path(__file__).parents[2] / "models" / "embedded"


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl", "tiny-sdxl-lightning", "tiny-sd3", "tiny-svd"])
def test_recipe_ends_with_a_folder_a_report_and_a_card(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniature = import_module(f"jubako.miniatures.{name.replace('-', '_')}")
    few_of_each = {
        "AUTOENCODER_SCENES": 48,
        "DENOISER_SCENES": 48,
        "SCENES": 48,
        "GATE_FRAMES": 48,
        "PATHS": 4,
    }
    for constant, few in few_of_each.items():
        if hasattr(miniature, constant):
            monkeypatch.setattr(miniature, constant, few)
    if hasattr(miniature, "EVALUATION_CLIPS"):
        monkeypatch.setattr(miniature, "EVALUATION_CLIPS", 2)
    for module in (autoencoder, denoiser, distillation, sd3, sdxl, svd):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(text, "PRETRAINING_BATCH", 4)
    quick = Defaults(2, miniature.DEFAULTS.guidance, miniature.DEFAULTS.asked)
    monkeypatch.setattr(miniature, "DEFAULTS", quick)
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
