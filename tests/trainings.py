"""Trainings as tests start them: a folder with a plan and pictures, and the trainer in its own process."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from plus import FIVE, draw
from server import ROOT

from jubako.catalog import load_catalog
from jubako.pictures import png
from jubako.training.folder import Event, TrainingFolder
from jubako.training.pictures import accept, keep
from jubako.training.plan import plan_training
from jubako.training.request import TrainingRequest

CATALOG = load_catalog()


def folder_for(path: Path, pictures: Sequence[Image.Image] | None = None, **fields: Any) -> TrainingFolder:
    """A folder as the trainer expects it, by default for tiny-sd with five pictures of a plus."""
    pictures = [draw(each) for each in FIVE] if pictures is None else pictures
    asked = {"model": "tiny-sd", "trigger": "zog", "class_noun": "shape", "seed": 1} | fields
    plan = plan_training(TrainingRequest.model_validate(asked), CATALOG, len(pictures))
    accepted, _ = accept([png(picture) for picture in pictures], plan.resolution)
    keep(accepted, path / "images")
    folder = TrainingFolder(path)
    folder.write_plan(plan, tuple(each.sha256 for each in accepted))
    return folder


def started(folder: TrainingFolder, threads: int = 1, parent: int | None = None) -> subprocess.Popen[bytes]:
    """The trainer at work in a folder, to end with its parent if it is told of one."""
    environment = os.environ | {"JUBAKO_DEVICE": "cpu", "OMP_NUM_THREADS": str(threads)}
    environment["JUBAKO_HOME"] = str(folder.path.parent)
    command = [sys.executable, "-m", "jubako.training", str(folder.path)]
    command += ["--parent", str(parent)] if parent else []
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def finished(folder: TrainingFolder, threads: int = 1, timeout: float = 280) -> int:
    """The trainer's exit status."""
    process = started(folder, threads)
    try:
        return process.wait(timeout)
    finally:
        process.kill()
        process.wait()


def events(folder: TrainingFolder, kind: str) -> list[Event]:
    return [event for _, event in folder.read_events() if event["type"] == kind]


def wait_for_step(folder: TrainingFolder, process: subprocess.Popen[bytes], step: int) -> None:
    """Until a checkpoint of this step is told of, or a later one."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline:
        if any(event["step"] >= step for event in events(folder, "checkpoint")):
            return
        assert process.poll() is None, f"the trainer ended with {process.returncode}"
        time.sleep(0.05)
    raise AssertionError(f"no checkpoint of step {step}")
