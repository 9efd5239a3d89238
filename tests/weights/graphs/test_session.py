"""ONNX Runtime opens a graph as it was asked to, or not at all."""

from __future__ import annotations

import shutil
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from exported_graphs import Exported
from onnx_files import unet

from jubako.errors import UnusableWeights
from jubako.weights.graphs.graph import read_graph
from jubako.weights.graphs.session import OrtGraph

CPU = torch.device("cpu")
ON_CPU = ("CPUExecutionProvider",)


def test_what_comes_out_is_what_the_graph_computes(tmp_path: Path) -> None:
    graph = OrtGraph(unet(tmp_path / "model.onnx"), ON_CPU, CPU)
    sample, timestep = torch.randn(2, 4, 8, 8), torch.tensor([3.0, 5.0])
    found = graph({"sample": sample, "timestep": timestep, "encoder_hidden_states": torch.zeros(2, 77, 8)})
    assert torch.equal(found["latent"], sample + timestep[:, None, None, None])
    # It is a tensor of its own, which the next call does not write to.
    kept = found["latent"].clone()
    graph({"sample": sample * 0, "timestep": timestep, "encoder_hidden_states": torch.zeros(2, 77, 8)})
    assert torch.equal(found["latent"], kept)
    assert set(graph.assigned()) == {"CPUExecutionProvider"}


@pytest.mark.parametrize("provider", ["TensorrtExecutionProvider", "MIGraphXExecutionProvider"])
def test_a_provider_that_is_not_there_is_no_silent_cpu(tmp_path: Path, provider: str) -> None:
    with pytest.raises(UnusableWeights, match=f"this onnxruntime has no {provider}"):
        OrtGraph(unet(tmp_path / "model.onnx"), (provider,), CPU)


def test_what_onnx_runtime_refuses_is_told_in_its_words(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"no graph")
    with pytest.raises(UnusableWeights, match=r"ONNX Runtime can't open .*model\.onnx: .*INVALID_PROTOBUF"):
        OrtGraph(file, ON_CPU, CPU)


def test_graphs_in_the_hugging_face_cache_are_opened_through_its_links(
    exported: Exported, tmp_path: Path
) -> None:
    graph = read_graph(exported("tiny-sd", "nvidia", "float32", one_timestep=True).file("vae_decoder"))
    blobs, folder = tmp_path / "blobs", tmp_path / "snapshots" / "abc" / "vae.opt"
    blobs.mkdir()
    folder.mkdir(parents=True)
    for file in (graph.file, *graph.data_paths):
        digest = sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / digest)
        (folder / file.name).symlink_to(f"../../../blobs/{digest}")
    linked = read_graph(folder / "model.onnx")
    assert linked.key == graph.key
    running = OrtGraph(linked.file, ON_CPU, CPU)
    assert running({"latent": torch.zeros(1, 4, 16, 16)})["images"].shape == (1, 3, 64, 64)
