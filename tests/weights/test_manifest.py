"""Weights that are cut, flipped or missing anywhere: refused by name, and not tried again as they are."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jubako.catalog import Catalog, Model, load_catalog, shipped_folder
from jubako.errors import JubakoError, ModelNotOnDisk, UnusableWeights
from jubako.export import ENTRY, _export
from jubako.hardware import machine
from jubako.loader import FamilyLoader
from jubako.planning import plan
from jubako.probe import own_signals
from jubako.request import TextToImage
from jubako.result import Result
from jubako.runner import Runner
from jubako.settings import load_settings
from jubako.weights import checkpoint
from jubako.weights.components import ComponentStore
from jubako.weights.graphs.export import Export
from jubako.weights.manifest import LIST, Manifest, check, damaged, listed, write_list
from jubako.weights.store import WeightRecord, write_record

Damage = Callable[[Path], object]

EMBEDDED = shipped_folder() / "embedded" / "tiny-sd"
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"


def cut(share: float) -> Damage:
    return lambda file: file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])


def flip(share: float) -> Damage:
    """One bit of one byte; in JSON that stays JSON, since a digit becomes another."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        at = int(share * (len(content) - 1))
        if file.suffix == ".json":
            at = next(i for i, byte in enumerate(content) if i >= at and chr(byte) in "02468")
        content[at] ^= 1
        file.write_bytes(content)

    return damage


def shorter(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


PLACES: list[tuple[str, str, Damage]] = [
    (f"{name}, {word}", name, damage)
    for name in (UNET, VAE)
    for word, damage in (
        ("cut in the header", cut(0.001)),
        ("cut in the middle", cut(0.5)),
        ("a byte short", shorter),
        ("flipped in the header", flip(0.001)),
        ("flipped in the middle", flip(0.5)),
        ("flipped at the end", flip(1)),
    )
] + [
    ("empty", TEXT, cut(0)),
    ("flipped", TEXT, flip(0.3)),
    ("missing", TEXT, Path.unlink),
    ("the index, cut", "model_index.json", cut(0.5)),
    ("the index, flipped", "model_index.json", flip(0)),
    ("a config, cut", "unet/config.json", cut(0.7)),
    ("a config, flipped", "vae/config.json", flip(0)),
    ("a tokenizer, cut", "tokenizer/tokenizer.json", cut(0.5)),
    ("a tokenizer, flipped", "tokenizer/vocab.json", flip(0.5)),
    ("a scheduler, flipped", "scheduler/scheduler_config.json", flip(0)),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the embedded model, to be damaged."""
    shutil.copytree(EMBEDDED, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def catalog(folder: Path) -> Catalog:
    """The copy beside the embedded model itself."""
    (folder.parent / "sd.yaml").write_text(
        "family: sd\nmodels:\n  sd1.5: {weights: {repo: null, folder: copy}, limits: {min_side: 64}}\n",
        encoding="utf-8",
    )
    return load_catalog(folder.parent)


def loader(catalog: Catalog, home: Path, **settings: str) -> FamilyLoader:
    own = load_settings({"JUBAKO_HOME": str(home), "JUBAKO_DEVICE": "cpu", **settings})
    return FamilyLoader(catalog.families["sd"], own, torch.device("cpu"), machine(own_signals()))


def loaded(loader: FamilyLoader, name: str) -> object:
    """What the residency does for a model."""
    loader.needed([name])
    return loader.load(name, lambda _: None)


def refused(loader: FamilyLoader, name: str = "sd1.5") -> JubakoError:
    with pytest.raises(JubakoError) as caught:
        loaded(loader, name)
    return caught.value


@pytest.mark.parametrize(("name", "damage"), [place[1:] for place in PLACES], ids=[p[0] for p in PLACES])
def test_what_is_cut_flipped_or_missing_is_refused_by_name(
    catalog: Catalog, folder: Path, tmp_path: Path, name: str, damage: Damage
) -> None:
    damage(folder / name)
    error = refused(loader(catalog, tmp_path))
    assert isinstance(error, UnusableWeights)
    assert str(folder / name) in error.message
    assert error.status == 503


def test_there_are_more_than_20_places() -> None:
    assert len(PLACES) >= 20


def test_graphs_and_their_data_are_checked_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUBAKO_HOME", str(tmp_path / "home"))
    folder = tmp_path / "graphs"
    _export("tiny-sd", folder, Export("nvidia", "float32"))
    assert (folder / ENTRY).is_file()
    asked = {"JUBAKO_WEIGHTS": "nvidia", "JUBAKO_EXECUTION_PROVIDER": "cpu"}
    graphs = [path for path in sorted(folder.glob("*/*")) if path.name != LIST]
    data = [path for path in graphs if path.suffix != ".onnx"]
    assert data, "no graph has its weights beside it"
    for path in (data[0], data[-1], next(path for path in graphs if path.suffix == ".onnx")):
        whole = path.read_bytes()
        flip(0.5)(path)
        error = refused(loader(load_catalog(folder), tmp_path / "home", **asked), "tiny-sd")
        assert str(path) in error.message, error.message
        path.write_bytes(whole)
    assert loaded(loader(load_catalog(folder), tmp_path / "home", **asked), "tiny-sd")


def pulled(model: Model, folder: Path, home: Path, *, digests: bool = True) -> None:
    """What a pull leaves: a record of the files in the folder; those of older versions had no digests."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and path.name != LIST
    }
    record = WeightRecord(
        model=model.name,
        repo=str(model.weights.repo),
        commit="0" * 40,
        folder=folder,
        files={name: path.stat().st_size for name, path in files.items()},
        digests={name: checkpoint.content_digest(path) for name, path in files.items() if digests},
        left_out=model.weights.left_out,
    )
    write_record(home, record)


def test_a_pulled_model_that_changed_names_the_file_and_the_command(folder: Path, tmp_path: Path) -> None:
    (folder / LIST).unlink()
    (tmp_path / "sd.yaml").write_text("family: sd\nmodels:\n  sd1.5: {weights: {variant: null}}\n")
    catalog = load_catalog(tmp_path)
    pulled(catalog.model("sd1.5"), folder, tmp_path)
    assert loaded(loader(catalog, tmp_path), "sd1.5")
    flip(0.5)(folder / UNET)
    error = refused(loader(catalog, tmp_path))
    assert isinstance(error, UnusableWeights)
    assert f"{folder / UNET} is damaged" in error.message
    assert "jubako pull sd1.5" in error.message
    (folder / UNET).unlink()
    assert f"{folder / UNET} is missing; fetch it again" in refused(loader(catalog, tmp_path)).message


def test_a_record_without_digests_still_tells_of_a_file_that_is_cut_off(folder: Path, tmp_path: Path) -> None:
    (folder / LIST).unlink()
    (tmp_path / "sd.yaml").write_text("family: sd\nmodels:\n  sd1.5: {weights: {variant: null}}\n")
    catalog = load_catalog(tmp_path)
    pulled(catalog.model("sd1.5"), folder, tmp_path, digests=False)
    cut(0.5)(folder / VAE)
    error = refused(loader(catalog, tmp_path))
    assert isinstance(error, ModelNotOnDisk)
    assert f"{folder / VAE} is missing or cut off" in error.message


@pytest.fixture
def runner(catalog: Catalog, tmp_path: Path) -> Iterator[Runner]:
    settings = load_settings({"JUBAKO_HOME": str(tmp_path / "home"), "JUBAKO_DEVICE": "cpu"})
    runner = Runner(catalog.families["sd"], settings)
    yield runner
    runner.close()


def test_a_broken_model_is_not_tried_again_until_its_files_change_and_others_go_on(
    runner: Runner, catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = (folder / UNET).read_bytes()
    flip(0.5)(folder / UNET)
    read: list[Path] = []
    digest = checkpoint._digest.__wrapped__

    def counted(path: Path, *state: int) -> Any:
        read.append(path)
        return digest(path, *state)

    monkeypatch.setattr(checkpoint, "_digest", counted)

    def drawn(model: str) -> Result:
        own = {"num_inference_steps": 2, "width": 64, "height": 64, "scheduler": "DDIM"}
        request = TextToImage.model_validate({"prompt": "a red circle", "model": model, **own})
        return asyncio.run(runner.generate(plan(request, catalog)))

    for attempt in range(3):
        error = drawn("sd1.5").error
        assert error is not None
        assert error["error"]["code"] == "unusable_weights"
        assert str(folder / UNET) in error["error"]["message"]
        assert read.count(folder / UNET) == 1, f"read again at attempt {attempt}"
    assert runner.states()["sd1.5"].state == "broken"
    assert str(folder / UNET) in str(runner.states()["sd1.5"].reason)
    assert drawn("tiny-sd").error is None
    (folder / UNET).write_bytes(whole)
    assert runner.states()["sd1.5"].state == "on_disk"
    assert runner.states()["sd1.5"].reason is None
    assert drawn("sd1.5").error is None
    assert runner.states()["sd1.5"].state == "resident"


def test_a_disk_that_can_not_be_read_for_once_does_not_break_a_model(
    catalog: Catalog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = loader(catalog, tmp_path)
    load = ComponentStore.load

    def unreadable(*_: Any, **__: Any) -> Any:
        raise UnusableWeights("x can't be read") from OSError(5, "Input/output error")

    monkeypatch.setattr(ComponentStore, "load", unreadable)
    assert "can't be read" in refused(one).message
    assert one.broken == {}
    monkeypatch.setattr(ComponentStore, "load", load)
    assert loaded(one, "sd1.5")


def test_a_file_is_read_once_and_again_when_it_changes_over_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, home, read = tmp_path / "weights", tmp_path / "home", list[Path]()
    file.write_bytes(b"weights")
    digest = checkpoint._digest.__wrapped__

    def counted(path: Path, *state: int) -> Any:
        read.append(path)
        return digest(path, *state)

    monkeypatch.setattr(checkpoint, "_digest", counted)
    manifest = Manifest(tmp_path, {"weights": checkpoint.content_digest(file)})
    read.clear()
    for _ in range(3):
        assert damaged([manifest], home) == []
    assert len(read) == 1
    file.write_bytes(b"weighty")
    assert damaged([manifest], home) == [file]
    assert len(read) == 2
    with pytest.raises(UnusableWeights, match=r"weights is damaged: .*; buy new ones"):
        check([manifest], home, "buy new ones")
    (home / "weights" / "digests.json").write_text("torn {")
    file.write_bytes(b"weights")
    assert damaged([manifest], home) == []


def test_the_list_is_that_of_sha256sum(folder: Path) -> None:
    write_list(folder)
    subprocess.run(["sha256sum", "--check", "--strict", LIST], cwd=folder, check=True, capture_output=True)
    manifest = listed(folder)
    assert manifest is not None
    assert {UNET, "model_index.json"} <= set(manifest.digests)
    assert "README.md" not in manifest.digests


@pytest.mark.parametrize(
    "line", ["abc  x", f"{'a' * 64}  ../x", f"{'a' * 64}  /etc/passwd", "garbage", "\udcff"]
)
def test_what_is_no_list_is_refused(folder: Path, line: str) -> None:
    (folder / LIST).write_bytes(f"{line}\n".encode(errors="surrogateescape"))
    with pytest.raises(UnusableWeights, match="is no list of SHA-256"):
        listed(folder)


@pytest.mark.parametrize("folder", sorted((shipped_folder() / "embedded").iterdir()), ids=lambda p: p.name)
def test_the_embedded_models_are_what_their_lists_say(folder: Path, tmp_path: Path) -> None:
    manifest = listed(folder)
    assert manifest is not None
    assert damaged([manifest], tmp_path) == []
    inside = {path.relative_to(folder).as_posix() for path in folder.glob("*/*") if path.is_file()}
    assert set(manifest.digests) == {*inside, "model_index.json"}
