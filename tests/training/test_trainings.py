"""The trainings of a home: prepared whole or not at all, registered once, removed when they are over."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path

import pytest
import torch
from lora_files import lora_file
from plus import FIVE, draw
from trainings import CATALOG

from jubako.adapters.store import AdapterStore
from jubako.errors import GenerationFailed, InvalidRequest
from jubako.jobs.record import Training
from jubako.pictures import png
from jubako.settings import Settings
from jubako.training.folder import TrainingFolder
from jubako.training.pictures import accept, in_folder
from jubako.training.plan import TrainingPlan, plan_training
from jubako.training.request import TrainingRequest
from jubako.training.trainings import Trainings

PICTURES, _ = accept([png(draw(each)) for each in FIVE], 64)


def plan() -> TrainingPlan:
    request = TrainingRequest(model="tiny-sd", trigger="zog", class_noun="shape", seed=1)
    return plan_training(request, CATALOG, len(PICTURES))


def home(path: Path) -> Trainings:
    return Trainings(Settings(home=path), AdapterStore(path), busy=lambda: False)


def completed(path: Path, job: str) -> TrainingFolder:
    """A folder as a trainer leaves it."""
    home(path).prepare(job, plan(), PICTURES)
    folder = TrainingFolder(path / "trainings" / job)
    layer = {"x.lora_A.weight": torch.ones(4, 4), "x.lora_B.weight": torch.zeros(4, 4)}
    lora_file(folder.adapter, unet=layer)
    folder.sheet.write_bytes(PICTURES[0].png)
    card = {"base": "tiny-sd", "trigger": "zog", "settings": plan().model_dump(mode="json")}
    folder.card.write_text(json.dumps(card), encoding="utf-8")
    return folder


def run(path: Path, job: str, **fields: bool) -> bytes:
    training = Training(name="zog", plan=plan().model_dump(mode="json"), **fields)
    return asyncio.run(home(path).run(job, training, lambda _kind, _facts: None)).content


def test_what_is_prepared_is_there_whole_and_once(tmp_path: Path) -> None:
    trainings = home(tmp_path)
    for _ in range(2):
        trainings.prepare("a" * 32, plan(), PICTURES)
    (place,) = (tmp_path / "trainings").iterdir()
    folder = TrainingFolder(place)
    read, sha256 = folder.read_plan()
    assert (read, sha256) == (plan(), tuple(each.sha256 for each in PICTURES))
    assert [file.read_bytes() for file in in_folder(folder.images)] == [each.png for each in PICTURES]


def test_an_adapter_is_registered_once_also_when_its_job_is_begun_again(tmp_path: Path) -> None:
    folder = completed(tmp_path, "a" * 32)
    contents = {run(tmp_path, "a" * 32), run(tmp_path, "a" * 32)}
    assert contents == {folder.adapter.read_bytes()}
    (adapter,) = AdapterStore(tmp_path)
    assert (adapter.name, adapter.card["automatic"], adapter.card["job"]) == ("zog", True, "a" * 32)
    assert (adapter.file.parent / "sheet.png").is_file()
    assert not (adapter.file.parent / "images").exists()
    assert home(tmp_path).registered("a" * 32) == "zog"
    with pytest.raises(InvalidRequest, match="zog"):
        home(tmp_path).free_name("zog")


def test_a_name_that_was_taken_meanwhile_costs_no_training(tmp_path: Path) -> None:
    for job in ("a" * 32, "b" * 32):
        completed(tmp_path, job)
        run(tmp_path, job, keep_images=job[0] == "b")
    assert [adapter.name for adapter in AdapterStore(tmp_path)] == ["zog", "zog-bbbbbbbb"]
    assert len(in_folder(tmp_path / "adapters" / "zog-bbbbbbbb" / "images")) == 5


def test_folders_of_jobs_that_are_over_go(tmp_path: Path) -> None:
    trainings = home(tmp_path)
    for job in ("old", "young", "at-work"):
        trainings.prepare(job, plan(), PICTURES)
    (tmp_path / "trainings" / ".dead.partial").mkdir()
    for name in ("old", "at-work", ".dead.partial"):
        os.utime(tmp_path / "trainings" / name, (time.time() - 7200,) * 2)
    trainings.sweep(["at-work"])
    assert sorted(path.name for path in (tmp_path / "trainings").iterdir()) == ["at-work", "young"]
    trainings.remove("young")
    trainings.remove("unknown")
    assert [path.name for path in (tmp_path / "trainings").iterdir()] == ["at-work"]


def test_a_trainer_that_can_not_even_start_fails_the_job(tmp_path: Path) -> None:
    home(tmp_path).prepare("c" * 32, plan(), PICTURES)
    (tmp_path / "trainings" / ("c" * 32) / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(GenerationFailed, match=r"plan\.json"):
        run(tmp_path, "c" * 32)
