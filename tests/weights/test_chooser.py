"""The choice of a weight set with real files: exported graphs in a catalog, loaded as a family does."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from machines import CPU_ONLY
from program import jubako

from jubako.catalog import Catalog, load_catalog
from jubako.errors import WeightsUnavailable
from jubako.hardware import machine
from jubako.loader import FamilyLoader
from jubako.settings import load_settings
from jubako.weights.graphs.proxies import GraphAutoencoder, GraphDenoiser, GraphTextEncoder

CPU = torch.device("cpu")
HERE = machine(CPU_ONLY)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `jubako export` writes: graphs and the catalog that serves them."""
    folder = tmp_path_factory.mktemp("export")
    command = (
        "export",
        "tiny-sd",
        "--layout",
        "amd",
        "--precision",
        "float16",
        "--out",
        str(folder / "graphs"),
    )
    done = jubako(*command, tmp_path=folder)
    assert done.returncode == 0, done.stderr
    assert f"JUBAKO_CATALOG={folder / 'graphs'} JUBAKO_WEIGHTS=tiny-sd=amd" in done.stdout
    return folder / "graphs"


@pytest.fixture
def catalog(folder: Path) -> Catalog:
    return load_catalog(folder)


@pytest.fixture
def loader(catalog: Catalog, tmp_path: Path) -> Callable[..., FamilyLoader]:
    def made(**settings: str) -> FamilyLoader:
        environ = {"JUBAKO_HOME": str(tmp_path), "JUBAKO_DEVICE": "cpu", **settings}
        return FamilyLoader(catalog.families["sd"], load_settings(environ), CPU, HERE)

    return made


def ignored(_: float) -> None:
    """Nobody listens."""


def test_an_exported_model_is_served_from_its_graphs(loader: Callable[..., FamilyLoader]) -> None:
    graphs = loader(JUBAKO_WEIGHTS="tiny-sd=amd", JUBAKO_EXECUTION_PROVIDER="cpu")
    model = graphs.load("tiny-sd", ignored)
    kinds = {name: type(part) for name, part in model.pipeline.components.items()}  # type: ignore[attr-defined] # of all families
    assert kinds["unet"] is GraphDenoiser
    assert kinds["text_encoder"] is GraphTextEncoder
    assert kinds["vae"] is GraphAutoencoder
    choice = graphs.choices["tiny-sd"]
    assert (choice.vendor, choice.precision, choice.rejected) == ("amd", "float16", ())
    # Graphs count as what their files take, beside the modules that are left to PyTorch.
    assert graphs.bytes_of("tiny-sd") > 10_000_000
    assert graphs.bytes_of("tiny-sd") == pytest.approx(graphs.freed_by("tiny-sd"))
    needed = loader(JUBAKO_WEIGHTS="tiny-sd=amd", JUBAKO_EXECUTION_PROVIDER="cpu").needed(["tiny-sd"])
    assert needed == pytest.approx(graphs.bytes, rel=0.05)


def test_auto_takes_standard_weights_and_tells_why(
    loader: Callable[..., FamilyLoader], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "jubako")
    auto = loader()
    auto.load("tiny-sd", ignored)
    assert auto.choices["tiny-sd"].vendor == "standard"
    assert "tiny-sd: served from standard weights in float32" in caplog.text
    assert "tiny-sd: not from amd: there is no GPU here" in caplog.text


def test_a_vendor_that_was_asked_for_and_can_not_be_had_is_an_error(
    loader: Callable[..., FamilyLoader],
) -> None:
    with pytest.raises(
        WeightsUnavailable, match="tiny-sd can't be served from amd weights here: amd: there is no GPU"
    ):
        loader(JUBAKO_WEIGHTS="amd").load("tiny-sd", ignored)
    with pytest.raises(WeightsUnavailable, match="nvidia: A miniature of this project"):
        loader(JUBAKO_WEIGHTS="nvidia", JUBAKO_EXECUTION_PROVIDER="cpu").load("tiny-sd", ignored)


def test_graphs_that_are_not_admitted_are_refused_with_the_reason(
    loader: Callable[..., FamilyLoader], folder: Path
) -> None:
    data = folder / "unet" / "model.onnx.data"
    content = data.read_bytes()
    try:
        data.write_bytes(content[:-1])
        with pytest.raises(WeightsUnavailable, match=r"amd float16: .*model\.onnx\.data was cut off"):
            loader(JUBAKO_WEIGHTS="amd", JUBAKO_EXECUTION_PROVIDER="cpu").load("tiny-sd", ignored)
    finally:
        data.write_bytes(content)
    graph = folder / "unet" / "model.onnx"
    kept = graph.rename(graph.with_suffix(".kept"))
    try:
        with pytest.raises(WeightsUnavailable, match="the graph of the unet is missing"):
            loader(JUBAKO_WEIGHTS="amd", JUBAKO_EXECUTION_PROVIDER="cpu").load("tiny-sd", ignored)
    finally:
        kept.rename(graph)


def test_a_folder_with_something_in_it_is_not_exported_to(folder: Path, tmp_path: Path) -> None:
    done = jubako("export", "tiny-sd", "--layout", "amd", "--out", str(folder), tmp_path=tmp_path)
    assert done.returncode == 1
    assert "is not empty; name a folder for these graphs alone" in done.stderr


def test_what_has_no_layout_is_not_exported(tmp_path: Path) -> None:
    done = jubako("export", "shap-e", "--layout", "amd", "--out", str(tmp_path / "out"), tmp_path=tmp_path)
    assert done.returncode == 1
    assert "shap-e is no model whose parts have graphs" in done.stderr
