"""`jubako pull --weights`: a vendor's graphs, and what of the standard repository goes with them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from exported_graphs import Exported
from hub import Hub, Repository, hub
from pipelines import sd_pipeline
from program import COMMAND, jubako

from jubako.catalog import load_catalog
from jubako.weights.graphs.store import find_graphs, graph_manifests, is_on_disk, missing_graphs
from jubako.weights.manifest import damaged

BASE, GRAPHS = "somebody/base", "somebody/base-tensorrt"
CATALOG = f"""
family: sd
models:
  sd1.5:
    weights: {{repo: {BASE}, variant: null}}
    weight_sets:
      nvidia:
        - repo: {GRAPHS}
          subfolder: ONNX
          layout: nvidia
          precision: float16
          graphs:
            text_encoder: clip.opt/model.onnx
            unet: [unet.opt/model_optimized.onnx, unet.opt/model.onnx]
            vae_decoder: vae.opt/model.onnx
"""


@pytest.fixture
def the_hub(exported: Exported, tmp_path: Path) -> Iterator[Hub]:
    """A base repository and one of graphs, with all that real ones hold beside."""
    runtime = exported("tiny-sd", "nvidia", "float32", one_timestep=True)
    sd_pipeline().save_pretrained(tmp_path / "base")
    base = {
        path.relative_to(tmp_path / "base").as_posix(): path.read_bytes() for path in files(tmp_path / "base")
    }
    graphs = {
        f"ONNX/{path.relative_to(runtime.folder).as_posix()}": path.read_bytes()
        for path in files(runtime.folder)
    }
    graphs |= {"config.json": b"", "ONNX/unet.opt/MXR/gfx1100.mxr": b"compiled", "README.md": b"read me"}
    with hub() as server:
        server.repositories = {BASE: Repository(base), GRAPHS: Repository(graphs)}
        yield server


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def pulled(server: Hub, folder: Path, *arguments: str) -> tuple[int, str]:
    (folder / "catalog").mkdir(exist_ok=True)
    (folder / "catalog" / "sd.yaml").write_text(CATALOG, encoding="utf-8")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "JUBAKO_"))}
    environ = {
        **kept,
        "HF_ENDPOINT": server.url,
        "HF_HOME": str(folder / "hf"),
        "JUBAKO_HOME": str(folder / "home"),
        "JUBAKO_CATALOG": str(folder / "catalog"),
    }
    done = subprocess.run(
        [*COMMAND, "pull", *arguments], env=environ, capture_output=True, text=True, check=False, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_it_brings_the_graphs_and_only_what_they_leave_out(the_hub: Hub, tmp_path: Path) -> None:
    status, printed = pulled(the_hub, tmp_path, "sd1.5", "--weights", "nvidia")
    assert status == 0, printed
    assert f"{BASE} + {GRAPHS}" in printed
    fetched = set(the_hub.fetched())
    data = {name for name in fetched if name.startswith("ONNX/") and "." not in name.rpartition("/")[2]}
    assert len(data) == 3  # the weights, whose names tell nothing
    assert {"ONNX/clip.opt/model.onnx", "ONNX/unet.opt/model.onnx", "ONNX/vae.opt/model.onnx"} <= fetched
    # The UNet's own weights are not needed, its config is; the autoencoder has an encoder to give.
    assert "unet/config.json" in fetched
    assert not {name for name in fetched if name.startswith("unet/") and name.endswith(".safetensors")}
    assert {name for name in fetched if name.startswith("vae/") and name.endswith(".safetensors")}
    assert not {"ONNX/unet.opt/MXR/gfx1100.mxr", "config.json", "README.md"} & fetched
    catalog, home = load_catalog(tmp_path / "catalog"), tmp_path / "home"
    model = catalog.model("sd1.5")
    (graphs,) = model.graph_sets("nvidia")
    found = find_graphs(home, model, "nvidia", graphs)
    assert found is not None
    assert (found.folder / "ONNX" / "unet.opt" / "model.onnx").is_file()
    assert (found.base / "model_index.json").is_file()
    (manifest, own) = graph_manifests(home, model, "nvidia", graphs)
    assert {"unet/config.json", *own.digests} <= fetched
    assert data <= set(own.digests)
    assert damaged((manifest, own), home) == []
    # It counts as there, though nothing standard was pulled, until a file is torn.
    assert is_on_disk(home, model, catalog.families["sd"].models)
    (found.folder / "ONNX" / "unet.opt" / "model.onnx").resolve().write_bytes(b"torn")
    told = missing_graphs(home, model, "nvidia", graphs)
    assert told is not None
    assert "jubako pull sd1.5 --weights nvidia --precision float16" in told


def test_a_graph_that_is_not_there_is_named(the_hub: Hub, tmp_path: Path) -> None:
    del the_hub.repositories[GRAPHS].files["ONNX/unet.opt/model.onnx"]
    status, printed = pulled(the_hub, tmp_path, "sd1.5", "--weights", "nvidia")
    assert status == 1
    assert "holds no graph of the unet where one should be: ONNX/unet.opt/model_optimized.onnx or" in printed


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ("sd1.5", "--weights", "nvidia", "--precision", "float8"),
            "has no float8 weights of sd1.5, but float16",
        ),
        (("sd1.4", "--weights", "nvidia"), "NVIDIA publishes none of Stable Diffusion 1 and 2"),
    ],
)
def test_what_there_is_not_can_not_be_pulled(
    the_hub: Hub, tmp_path: Path, arguments: tuple[str, ...], reason: str
) -> None:
    status, printed = pulled(the_hub, tmp_path, *arguments)
    assert status == 1
    assert reason in printed


def test_the_matrix_of_weights_has_every_set_and_every_absence(tmp_path: Path) -> None:
    done = jubako("models", "--weights", "--json", tmp_path=tmp_path)
    table = json.loads(done.stdout)
    for model in load_catalog():
        rows = [row for row in table if row["model"] == model.name]
        assert rows[0]["weights"] == "standard"
        for vendor in ("nvidia", "amd"):
            own = [row for row in rows if row["weights"] == vendor]
            sets = model.graph_sets(vendor)
            precisions: list[str | None] = [each.precision for each in sets]
            assert [row.get("precision") for row in own] == (precisions or [None])
            assert all("none" in row or row["status"] for row in own)
    shown = jubako("models", "--weights", tmp_path=tmp_path, columns=160).stdout
    assert "stabilityai/stable-diffusion-3.5-large-tensorrt" in shown
    assert "NVIDIA publishes none of Large Turbo" in shown


def test_the_shipped_catalog_says_of_every_model_what_vendors_have(tmp_path: Path) -> None:
    catalog = load_catalog()
    assert all(set(model.weight_sets) == {"nvidia", "amd"} for model in catalog)
    published = {
        (model.name, vendor, graphs.precision)
        for model in catalog
        for vendor in ("nvidia", "amd")
        for graphs in model.graph_sets(vendor)
    }
    assert published >= {
        ("sdxl", "nvidia", "float16"),
        ("sdxl-turbo", "nvidia", "float16"),
        ("sd3.5-medium", "nvidia", "bfloat16"),
        ("sd3.5-large", "nvidia", "bfloat16"),
        ("sd3.5-large", "nvidia", "float8"),
        ("svd-xt-1.1", "nvidia", "float16"),
        ("sd1.5", "amd", "float16"),
        ("sdxl", "amd", "float16"),
        ("sdxl-turbo", "amd", "float16"),
        ("sd3.5-medium", "amd", "float16"),
        ("sd3.5-large", "amd", "mixed"),
        ("sd3.5-large-turbo", "amd", "float16"),
    }
    medium, large = (catalog.model(f"sd3.5-{size}").graph_sets("amd")[0] for size in ("medium", "large"))
    # The vendor spells the one with dots and the other with hyphens.
    assert medium.files("transformer")[0] == "stable-diffusion-3.5-medium_io16/transformer/model.onnx"
    assert large.files("transformer")[1] == "stable-diffusion-3-5-large_io16/unet/model.onnx"
