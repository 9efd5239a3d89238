"""Trainers and what registers adapters are killed wherever they write: an adapter is whole or not there.

They kill themselves at one of their calls of fsync, which every file that is kept is written with: in the
midst of a checkpoint, before a file has its name, between the adapter and its card.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from lora_files import lora_file
from plus import FIVE, draw
from safetensors.torch import load_file
from server import ROOT
from small_disk import small_disk
from trainings import CATALOG

from jubako.adapters.store import AdapterStore
from jubako.jobs.record import Training
from jubako.pictures import png
from jubako.settings import Settings
from jubako.training.folder import TrainingFolder
from jubako.training.pictures import accept
from jubako.training.plan import TrainingPlan, plan_training
from jubako.training.process import COMPLETED, NO_ROOM
from jubako.training.request import TrainingRequest
from jubako.training.trainings import Trainings

STEPS = 20
PICTURES, _ = accept([png(draw(each)) for each in FIVE], 64)

# Which call each trainer in turn does not come back from. What was encoded takes 2 calls, a checkpoint 5
# (there is one every 5 steps), the adapter, the sheet and the card 2 each. Ten times that is in what is
# encoded, in and behind the first checkpoint, in the third and the last, and five times at what ends it.
ALL = (1, 3, 5, 7, 6, 9, 5, 1, 4, 5)
FEW = (1, 5, 16)

SUICIDE = """
import os, signal, sys

def doomed(last):
    synced = os.fsync

    def fsync(handle):
        nonlocal last
        last -= 1
        if not last:
            os.kill(os.getpid(), signal.SIGKILL)
        synced(handle)

    os.fsync = fsync
"""
# One process imports the libraries, and has a child for each trainer.
TRAINERS = (
    SUICIDE
    + """
import accelerate, jubako.families.sd, jubako.training.trainer
from jubako.training import __main__ as trainer

for line in sys.stdin:
    last, folder = line.split()
    child = os.fork()
    if not child:
        os.nice = lambda _: 0
        doomed(int(last))
        sys.argv = ["trainer", folder]
        os._exit(trainer.main())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
)
REGISTRAR = (
    SUICIDE
    + """
from pathlib import Path
from jubako.adapters.store import AdapterStore

doomed(int(sys.argv[1]))
AdapterStore(Path(sys.argv[2])).add("zog", Path(sys.argv[3]), {"job": "a" * 32})
"""
)

Trainer = Callable[[int, TrainingFolder], int]


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    """Trains in a folder, to be killed at its n-th call of fsync; the exit status."""
    own = {
        "JUBAKO_HOME": str(tmp_path_factory.mktemp("home")),
        "JUBAKO_DEVICE": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    environment = os.environ | own
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", TRAINERS], cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin
        assert process.stdout

        def train(last: int, folder: TrainingFolder) -> int:
            print(last, folder.path, file=process.stdin, flush=True)
            return int(process.stdout.readline())  # type: ignore[union-attr] # it is there

        yield train
        process.stdin.close()


def plan() -> TrainingPlan:
    asked = {"model": "tiny-sd", "trigger": "zog", "class_noun": "shape", "seed": 1, "steps": STEPS}
    short = {"sample_steps": 2, "checkpoint_every": 5, "validation_every": 0}
    light = {"batch_size": 1, "targets": "attention", "prior_preservation": False}
    return plan_training(TrainingRequest.model_validate(asked | short | light), CATALOG, len(PICTURES))


@pytest.mark.parametrize(
    "places",
    [
        pytest.param(FEW, id="3 kills"),
        pytest.param(
            ALL,
            id="10 kills",
            marks=pytest.mark.skipif(
                os.environ.get("JUBAKO_LONG_TESTS") != "1", reason="takes a minute: set JUBAKO_LONG_TESTS=1"
            ),
        ),
    ],
)
def test_a_killed_training_leaves_no_torn_adapter_and_goes_on(
    tmp_path: Path, trainer: Trainer, places: tuple[int, ...]
) -> None:
    adapters = AdapterStore(tmp_path)
    trainings = Trainings(Settings(home=tmp_path), adapters, busy=lambda: False)
    folder, other = (TrainingFolder(tmp_path / "trainings" / (name * 32)) for name in "ab")
    trainings.prepare(folder.path.name, plan(), PICTURES)
    for last in places:
        assert trainer(last, folder) == -signal.SIGKILL
        assert not folder.completed
        assert not folder.adapter.exists() or load_file(folder.adapter)
        assert list(adapters) == []
    # What is left of it is in the way of no other, and it goes on itself.
    trainings.prepare(other.path.name, plan(), PICTURES)
    for each in (other, folder):
        assert trainer(0, each) == COMPLETED
        assert not list(each.path.rglob("*.partial"))
        (done,) = [event for _, event in each.read_events() if event["type"] == "completed"]
        assert done["step"] == STEPS
        name = made(trainings, each.path.name)
        tensors = load_file(adapters.find(name).file)
        assert tensors
        assert all(values.isfinite().all() for values in tensors.values())


def made(trainings: Trainings, job: str) -> str:
    """The adapter of a training that is completed."""
    training = Training(name="zog", plan=plan().model_dump(mode="json"))
    asyncio.run(trainings.run(job, training, lambda _kind, _facts: None))
    return str(trainings.registered(job))


def test_a_trainer_that_finds_no_room_on_its_disk_goes_on_when_there_is(
    tmp_path: Path, trainer: Trainer
) -> None:
    with small_disk(tmp_path, 8) as disk:
        trainings = Trainings(Settings(home=disk.here), AdapterStore(disk.here), busy=lambda: False)
        trainings.prepare("a" * 32, plan(), PICTURES)
        folder = TrainingFolder(disk.here / "trainings" / ("a" * 32))
        for spare in (0, 300_000):
            with disk.filled(spare):
                assert trainer(0, folder) == NO_ROOM
            assert folder.latest_checkpoint() is None
        assert trainer(0, folder) == COMPLETED
        assert load_file(folder.adapter)


def test_a_killed_registration_leaves_no_torn_adapter_and_can_be_made_again(tmp_path: Path) -> None:
    layer = {"x.lora_A.weight": torch.ones(4, 4), "x.lora_B.weight": torch.zeros(4, 4)}
    lora_file(tmp_path / "zog", unet=layer)
    home, adapters = tmp_path / "home", AdapterStore(tmp_path / "home")
    for last in ("1", "2"):
        command = [sys.executable, "-c", REGISTRAR, last, str(home), str(tmp_path / "zog")]
        assert subprocess.run(command, cwd=ROOT, check=False).returncode == -signal.SIGKILL
        assert list(adapters) == []
    assert adapters.add("zog", tmp_path / "zog").kind == "lora"
    assert len(list((home / "adapters").iterdir())) == 3
    adapters.sweep(grace=0)
    assert [path.name for path in (home / "adapters").iterdir()] == ["zog"]
