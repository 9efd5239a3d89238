"""A trainer that is killed, asked to stop, or set to what can't be done: what is left, and how it goes on."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from trainings import CATALOG, events, finished, folder_for, started, wait_for_step

from jubako.catalog import shipped_folder
from jubako.training.folder import TrainingFolder

STEPS = 24
SHORT: dict[str, Any] = {
    "steps": STEPS,
    "class_pictures": 4,
    "sample_steps": 4,
    "checkpoint_every": 4,
    "validation_every": 0,
    "batch_size": 2,
    "targets": "attention",
}


def losses(folder: TrainingFolder) -> list[float]:
    """Each step's loss, by the last checkpoint."""
    state = json.loads((folder.checkpoints / f"{STEPS:08}" / "state.json").read_text(encoding="utf-8"))
    found: list[float] = state["losses"]
    return found


def shapes(file: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(file, "pt") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> TrainingFolder:
    """A training that nothing interrupted."""
    folder = folder_for(tmp_path_factory.mktemp("whole") / "training", **SHORT)
    assert finished(folder) == 0
    return folder


def test_a_training_tells_of_its_way_and_leaves_an_adapter(whole: TrainingFolder) -> None:
    kinds = [event["type"] for _, event in whole.read_events()]
    assert kinds[-1] == "completed"
    assert {"started", "progress", "checkpoint"} <= set(kinds)
    (last,) = [each for each in events(whole, "progress") if each.get("step") == STEPS]
    assert last["seconds_left"] == 0
    assert last["loss"] > 0
    names = sorted(each.name for each in whole.checkpoints.iterdir())
    assert names == [f"{STEPS - 4:08}", f"{STEPS:08}"], "the last two are kept"
    assert not whole.cache.exists()
    assert not list(whole.path.rglob("*.partial"))
    with Image.open(whole.sheet) as sheet:
        assert sheet.width > 200


def test_the_card_says_where_the_adapter_is_from(whole: TrainingFolder) -> None:
    card = json.loads(whole.card.read_text(encoding="utf-8"))
    plan, sha256 = whole.read_plan()
    assert card["pictures"] == {"count": 5, "sha256": list(sha256)}
    assert card["settings"] == plan.model_dump(mode="json")
    assert card["base"] == "tiny-sd"
    assert len(card["weights"]["denoiser_sha256"]) == 64
    assert card["licence"]["id"] == CATALOG.model("tiny-sd").licence.id
    assert card["adapter_bytes"] == whole.adapter.stat().st_size
    assert [step for step, _ in card["loss"]["curve"]] == list(range(1, STEPS + 1))


def test_the_stock_pipeline_loads_the_adapter_and_unloads_it(whole: TrainingFolder) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(shipped_folder() / "embedded" / "tiny-sd")
    pipeline.to(torch.float32).set_progress_bar_config(disable=True)
    inputs = (torch.ones(1, 4, 16, 16), torch.tensor([500]), torch.ones(1, 77, 128))
    with torch.no_grad():
        before = pipeline.unet(*inputs).sample
        pipeline.load_lora_weights(whole.path, weight_name=whole.adapter.name, adapter_name="zog")
        assert pipeline.get_active_adapters() == ["zog"]
        assert not torch.equal(pipeline.unet(*inputs).sample, before)
        pipeline.unload_lora_weights()
        assert torch.equal(pipeline.unet(*inputs).sample, before)


def test_a_trainer_killed_at_half_time_goes_on_as_if_nothing_had_been(
    whole: TrainingFolder, tmp_path: Path
) -> None:
    folder = folder_for(tmp_path / "training", **SHORT)
    process = started(folder)
    wait_for_step(folder, process, STEPS // 2)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not folder.completed
    assert finished(folder) == 0
    first, second = events(folder, "started")
    assert first["step"] == 0
    assert STEPS // 2 <= second["step"] < STEPS
    assert shapes(folder.adapter) == shapes(whole.adapter)
    assert folder.adapter.stat().st_size == whole.adapter.stat().st_size
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-2)
    ours, theirs = load_file(folder.adapter), load_file(whole.adapter)
    assert all(torch.allclose(ours[key], theirs[key], atol=1e-3) for key in theirs)


def test_a_checkpoint_that_was_being_written_is_not_taken_up(whole: TrainingFolder, tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "training", **SHORT)
    process = started(folder)
    wait_for_step(folder, process, 4)
    process.kill()
    process.wait()
    latest = folder.latest_checkpoint()
    assert latest is not None
    # As a kill between the first file of a checkpoint and its second leaves it.
    half = folder.checkpoints / "00000020.partial"
    half.mkdir()
    (half / "adapter.safetensors").write_bytes((latest / "adapter.safetensors").read_bytes()[:100])
    with folder.events.open("ab") as file:
        file.write(b'{"type": "checkpoint", "st')
    assert folder.latest_checkpoint() == latest
    assert finished(folder) == 0
    assert events(folder, "started")[-1]["step"] == int(latest.name)
    assert not half.exists()
    assert losses(folder) == pytest.approx(losses(whole), rel=1e-2)


def test_a_failed_write_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    folder = TrainingFolder(tmp_path)

    def write(place: Path) -> None:
        (place / "adapter.safetensors").write_bytes(b"whole")

    def fail(place: Path) -> None:
        (place / "adapter.safetensors").write_bytes(b"ha")
        raise OSError("no space left on device")

    first = folder.add_checkpoint(10, write)
    with pytest.raises(OSError, match="no space"):
        folder.add_checkpoint(20, fail)
    assert folder.latest_checkpoint() == first
    second = folder.add_checkpoint(20, write)
    third = folder.add_checkpoint(30, write)
    assert sorted(folder.checkpoints.iterdir()) == [second, third]


def test_a_trainer_that_is_asked_to_stop_writes_a_checkpoint_first(tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "training", **SHORT | {"steps": 2000, "checkpoint_every": 3})
    process = started(folder)
    wait_for_step(folder, process, 3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 3
    latest = folder.latest_checkpoint()
    assert latest is not None
    assert events(folder, "checkpoint")[-1]["step"] == int(latest.name)
    assert not events(folder, "failed")
    assert not folder.completed


def test_a_trainer_that_is_held_makes_way_but_goes_on(tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "training", **SHORT | {"steps": 2000, "checkpoint_every": 1})
    process = started(folder)
    try:
        wait_for_step(folder, process, 3)
        folder.hold(True)
        time.sleep(1)
        before = events(folder, "checkpoint")[-1]["step"]
        time.sleep(5)
        held = events(folder, "checkpoint")[-1]["step"] - before
        assert 1 <= held <= 4, "a step each two seconds"
        folder.hold(False)
        wait_for_step(folder, process, before + held + 5)
    finally:
        process.terminate()
        process.wait(60)


def test_a_trainer_ends_with_who_wanted_it(tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "training", **SHORT | {"steps": 2000})
    parent = subprocess.Popen(["sleep", "600"])
    process = started(folder, parent=parent.pid)
    wait_for_step(folder, process, 4)
    parent.kill()
    parent.wait()
    assert process.wait(60) == 3
    assert not events(folder, "failed")


def test_what_can_not_be_trained_fails_with_a_sentence(tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "training", **SHORT)
    document = json.loads((folder.path / "plan.json").read_text(encoding="utf-8"))
    document["plan"]["model"] = "sd1.5"
    (folder.path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    assert finished(folder) == 1
    (event,) = events(folder, "failed")
    assert "jubako pull sd1.5" in event["message"]


def test_a_loss_that_is_not_a_number_fails_with_advice(tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "training", **SHORT)
    document = json.loads((folder.path / "plan.json").read_text(encoding="utf-8"))
    document["plan"]["learning_rate"] = 1e30
    (folder.path / "plan.json").write_text(json.dumps(document), encoding="utf-8")
    assert finished(folder) == 1
    assert "lower learning_rate" in events(folder, "failed")[-1]["message"]


def test_two_processes_train_one_adapter(tmp_path: Path) -> None:
    folder = folder_for(tmp_path / "training", **SHORT | {"steps": 4})
    # What ``accelerate launch`` starts for several GPUs; on a CPU it would ask for MPI.
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, "-m", "jubako.training", str(folder.path)],
        env=os.environ | {"JUBAKO_DEVICE": "cpu", "OMP_NUM_THREADS": "1"},
        check=False,
        timeout=280,
    )
    assert done.returncode == 0
    assert [event["processes"] for event in events(folder, "started")] == [2]
    assert len(events(folder, "completed")) == 1
    assert all(math.isfinite(values.sum()) for values in load_file(folder.adapter).values())
