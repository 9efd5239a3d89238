"""A disk that is full, wherever something is written: told by its setting, nothing half there, fine later."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from exported_graphs import Exported
from lora_files import lora_file
from plus import FIVE, draw
from safetensors.torch import save_file
from small_disk import SmallDisk, small_disk
from trainings import CATALOG

from jubako.adapters.store import AdapterStore
from jubako.catalog import shipped_folder
from jubako.disk import is_full
from jubako.errors import DiskFull
from jubako.export import _export
from jubako.jobs.store import FileStore
from jubako.pictures import png
from jubako.settings import Settings
from jubako.training.folder import TrainingFolder
from jubako.training.pictures import accept
from jubako.training.plan import plan_training
from jubako.training.request import TrainingRequest
from jubako.training.trainings import Trainings
from jubako.weights.engines import EngineKey, EngineStore
from jubako.weights.graphs.export import Export
from jubako.weights.graphs.graph import read_graph
from jubako.weights.graphs.rewrite import rewritten
from jubako.weights.manifest import check, listed
from jubako.weights.store import WeightRecord, write_record

CLIP, MESH = b"clip" * 100_000, b"mesh" * 50_000
PICTURES, _ = accept([png(draw(each)) for each in FIVE], 64)
KEY = EngineKey(
    graph="a" * 64,
    data=(),
    onnxruntime="1",
    provider="tensorrt",
    provider_version="1",
    gpu="none",
    architecture="none",
    driver="1",
    toolkit="1",
    shapes={},
    options={},
    system="Linux",
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallDisk]:
    with small_disk(tmp_path_factory.mktemp("small"), 24) as disk:
        yield disk


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What is to be written, on another disk."""
    layer = {"x.lora_A.weight": torch.ones(64, 640), "x.lora_B.weight": torch.zeros(640, 64)}
    lora_file(tmp_path / "zog.safetensors", unet=layer)
    return tmp_path / "zog.safetensors"


def contents(folder: Path) -> dict[str, int]:
    """Files and their sizes, but for locks and what the disk was filled with."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != "filling"
    }


def engine(home: Path) -> None:
    def make(folder: Path) -> object:
        if not (folder / "engine").exists():
            (folder / "engine").write_bytes(bytes(300_000))
        return object()

    EngineStore(home / "engines", 10**9).session(KEY, make, model="x", slot="denoiser").close()


def training(home: Path) -> None:
    plan = plan_training(TrainingRequest(model="tiny-sd", trigger="zog", class_noun="shape"), CATALOG, 5)
    Trainings(Settings(home=home), AdapterStore(home), busy=lambda: False).prepare("a" * 32, plan, PICTURES)


Write = Callable[[Path, Path], object]

# What is written, and how many bytes are free when it begins.
PLACES: dict[str, tuple[int, Write]] = {
    "the picture of a job": (0, lambda home, _: FileStore(home / "files").put(PICTURES[0].png)),
    "the clip of a job": (100_000, lambda home, _: FileStore(home / "files").put(CLIP)),
    "the object of a job": (100_000, lambda home, _: FileStore(home / "files").put(MESH)),
    "an adapter": (100_000, lambda home, source: AdapterStore(home).add("zog", source, {"base": "tiny-sd"})),
    "a training's pictures": (0, lambda home, _: training(home)),
    "the record of a pull": (0, lambda home, _: write_record(home, WeightRecord(model="x", folder=home))),
    "an engine": (100_000, lambda home, _: engine(home)),
}


@pytest.mark.parametrize(("spare", "write"), PLACES.values(), ids=PLACES)
def test_a_full_disk_is_told_and_leaves_nothing_behind(
    disk: SmallDisk, source: Path, tmp_path: Path, spare: int, write: Write
) -> None:
    (home := disk.here / tmp_path.name).mkdir()
    with disk.filled(spare):
        with pytest.raises(DiskFull, match="the disk of JUBAKO_HOME is full") as caught:
            write(home, source)
        assert caught.value.status == 507
        assert contents(home) == {}
    write(home, source)
    assert contents(home) != {}


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before(disk: SmallDisk, tmp_path: Path) -> None:
    (path := disk.here / tmp_path.name).mkdir()
    folder = TrainingFolder(path)
    state = {"moments": torch.zeros(100_000)}
    first = folder.add_checkpoint(1, lambda place: save_file(state, place / "optimizer.safetensors"))
    with disk.filled(100_000), pytest.raises(Exception, match="o space left") as caught:
        folder.add_checkpoint(2, lambda place: save_file(state, place / "optimizer.safetensors"))
    assert is_full(caught.value)
    assert folder.latest_checkpoint() == first
    folder.sweep()
    assert [each.name for each in folder.checkpoints.iterdir()] == [first.name]


def test_a_rewritten_graph_that_finds_no_room_is_rewritten_later(
    disk: SmallDisk, tmp_path: Path, exported: Exported
) -> None:
    graph = read_graph(exported("tiny-sd3", "nvidia", "bfloat16").file("transformer"))
    folder = disk.here / tmp_path.name
    with disk.filled(100_000):
        with pytest.raises(DiskFull, match="JUBAKO_HOME"):
            rewritten(graph, "opset22", folder)
        assert contents(folder) == {}
    assert rewritten(graph, "opset22", folder).file.is_file()


def test_an_export_that_finds_no_room_can_be_tried_again(disk: SmallDisk, tmp_path: Path) -> None:
    folder = disk.here / tmp_path.name
    with disk.filled(1_000_000), pytest.raises(DiskFull, match="the disk of --out is full"):
        _export("tiny-sd", folder, Export("nvidia", "float16"))
    assert not folder.exists()


def test_weights_are_checked_also_when_that_can_not_be_remembered(disk: SmallDisk, tmp_path: Path) -> None:
    manifest = listed(shipped_folder() / "embedded" / "tiny-sd")
    assert manifest is not None
    with disk.filled():
        check([manifest], disk.here / tmp_path.name, "")
        assert contents(disk.here / tmp_path.name) == {}
