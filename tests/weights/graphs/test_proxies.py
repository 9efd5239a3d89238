"""What a pipeline sees of graphs: outputs where it looks for them, latents that were drawn already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from onnx import TensorProto, helper
from onnx_files import save

from jubako.weight_sets import Slot, Vendor
from jubako.weights.graphs.adapter import Adapter
from jubako.weights.graphs.admission import admit
from jubako.weights.graphs.graph import read_graph
from jubako.weights.graphs.proxies import GraphAutoencoder, GraphTextEncoder
from jubako.weights.graphs.session import OrtGraph

CPU = torch.device("cpu")
FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16


def adapted(file: Path, slot: Slot, layout: Vendor) -> Adapter:
    admission = admit(read_graph(file), slot, layout, "cpu")
    return Adapter(OrtGraph(file, ("CPUExecutionProvider",), CPU), admission)


def text_encoder(file: Path, names: dict[str, int]) -> Path:
    """An encoder whose every output is the ids times a number of its own; of pooled ones the last id."""
    nodes, outputs = [helper.make_node("Cast", ["input_ids"], ["ids"], to=FLOAT)], dict[str, Any]()
    weights = [
        helper.make_tensor("last", TensorProto.INT64, [], [2]),
        helper.make_tensor("width", TensorProto.INT64, [1], [2]),
    ]
    for name, number in names.items():
        pooled = name == "text_embeds" or (name == "text_embeddings" and "hidden_states" in names)
        weights.append(helper.make_tensor(f"{name}/by", FLOAT, [1], [float(number)]))
        nodes.append(helper.make_node("Mul", ["ids", f"{name}/by"], [f"{name}/ids"]))
        if pooled:
            nodes.append(helper.make_node("Gather", [f"{name}/ids", "last"], [f"{name}/one"], axis=1))
            nodes.append(helper.make_node("Unsqueeze", [f"{name}/one", "one"], [name]))
        else:
            nodes.append(helper.make_node("Unsqueeze", [f"{name}/ids", "width"], [name]))
        outputs[name] = (FLOAT, ["B", 1] if pooled else ["B", 3, 1])
    weights.append(helper.make_tensor("one", TensorProto.INT64, [1], [1]))
    return save(file, nodes, {"input_ids": (TensorProto.INT64, ["B", 3])}, outputs, weights)


@pytest.mark.parametrize(
    ("layout", "names", "first", "penultimate"),
    [
        ("nvidia", {"text_embeddings": 5}, 5, None),
        ("nvidia", {"text_embeddings": 5, "hidden_states": 3}, 5, 3),
        ("amd", {"last_hidden_state": 2}, 2, None),
        # By number, not by name: of eleven, the tenth is the last but one.
        ("amd", {"text_embeds": 9, **{f"hidden_states.{i}": 20 + i for i in range(11)}}, 9, 29),
    ],
)
def test_text_encoders_give_what_pipelines_look_for(
    tmp_path: Path, layout: Vendor, names: dict[str, int], first: int, penultimate: int | None
) -> None:
    graph = adapted(text_encoder(tmp_path / "model.onnx", names), "text_encoder_2", layout)
    encoder = GraphTextEncoder(graph, None, CPU, 0)
    found = encoder(torch.tensor([[1, 2, 4]]), output_hidden_states=True)
    assert found[0].flatten().tolist()[-1] == 4 * first
    if penultimate is None:
        assert found.hidden_states is None
    else:
        assert found[0].shape == (1, 1)  # pooled
        assert found.hidden_states[-2].flatten().tolist() == [penultimate, 2 * penultimate, 4 * penultimate]


def test_latents_that_a_graph_has_drawn_are_nobody_s_to_draw_again(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("AveragePool", ["sample"], ["small"], kernel_shape=[8, 8], strides=[8, 8]),
        helper.make_node("Cast", ["small"], ["latent_sample"], to=HALF),
    ]
    inputs: dict[str, Any] = {"sample": (FLOAT, ["B", 3, "H", "W"])}
    outputs: dict[str, Any] = {"latent_sample": (HALF, ["B", 3, "h", "w"])}
    file = save(tmp_path / "model.onnx", nodes, inputs, outputs)
    encoder = adapted(file, "vae_encoder", "amd")
    vae = GraphAutoencoder(None, encoder, None, config=None, device=CPU, graph_bytes=0)
    pictures = torch.ones(1, 3, 64, 64) * 0.5
    posterior = vae.encode(pictures).latent_dist
    drawn = posterior.sample(torch.Generator().manual_seed(1))
    assert torch.equal(drawn, torch.full((1, 3, 8, 8), 0.5))
    assert torch.equal(drawn, posterior.sample(torch.Generator().manual_seed(2)))
    assert torch.equal(drawn, posterior.mode())
    assert drawn.dtype == torch.float32
