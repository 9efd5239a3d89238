"""Stable Diffusion's safety checker, small and random, through the code that loads the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkers import EVERYTHING, NOTHING, as_published, one_of_two, plain, write_checker
from safetensors.torch import load_file, save_file

from jubako.catalog import CheckerEntry, load_catalog
from jubako.errors import ModelNotOnDisk, UnusableWeights
from jubako.weights.safety_checker import SafetyChecker, load_safety_checker
from jubako.weights.store import WeightRecord, write_record

CPU = torch.device("cpu")
SHIPPED = load_catalog().checkers["safety-checker"]
PICTURES = (plain(0), plain(130))


def loaded(folder: Path) -> SafetyChecker:
    entry = CheckerEntry(
        name="small", family="sd", title="A small one", folder=folder, licence=SHIPPED.licence
    )
    return load_safety_checker(entry, folder, CPU)


@pytest.mark.parametrize("published", [False, True])
def test_its_thresholds_decide_what_it_flags(tmp_path: Path, *, published: bool) -> None:
    folders = {
        (True, True): write_checker(tmp_path / "all", EVERYTHING),
        (False, False): write_checker(tmp_path / "none", NOTHING),
        (True, False): one_of_two(tmp_path / "first", *PICTURES),
        (False, True): one_of_two(tmp_path / "second", *reversed(PICTURES)),
    }
    for flags, folder in folders.items():
        if published:
            as_published(folder)
        assert tuple(loaded(folder).flags(PICTURES)) == flags
        assert [loaded(folder).flags([picture])[0] for picture in PICTURES] == list(flags)


def test_one_that_was_pulled_is_found_by_its_record(tmp_path: Path) -> None:
    with pytest.raises(ModelNotOnDisk, match="fetch it with: jubako pull safety-checker"):
        load_safety_checker(SHIPPED, tmp_path, CPU)
    folder = write_checker(tmp_path / "snapshot", EVERYTHING)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    known: dict[str, Any] = {"model": SHIPPED.name, "repo": SHIPPED.repo, "commit": "c", "folder": folder}
    write_record(tmp_path, WeightRecord(**known, files=files))
    assert load_safety_checker(SHIPPED, tmp_path, CPU).flags(PICTURES) == [True, True]
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ModelNotOnDisk, match="not on disk"):
        load_safety_checker(SHIPPED, tmp_path, CPU)


def test_a_weight_that_is_missing_is_an_error_and_not_left_random(tmp_path: Path) -> None:
    folder = write_checker(tmp_path / "checker", NOTHING)
    weights = load_file(folder / "model.safetensors")
    thresholds = weights.pop("concept_embeds_weights")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UnusableWeights, match="concept_embeds_weights"):
        loaded(folder)
    save_file({**weights, "concept_embeds_weights": thresholds[:3].clone()}, folder / "model.safetensors")
    with pytest.raises(UnusableWeights, match="can't be loaded"):
        loaded(folder)
    (folder / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(UnusableWeights, match="can't be loaded"):
        loaded(folder)


def test_a_pickle_is_not_looked_at(tmp_path: Path) -> None:
    folder = write_checker(tmp_path / "checker", NOTHING)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelNotOnDisk, match=r"has no model\.safetensors"):
        loaded(folder)
