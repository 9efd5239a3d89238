"""What is refused of a graph before its weights are read, each with its reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from onnx import TensorProto, helper
from onnx_files import transformer, unet, with_data

from jubako.errors import UnusableWeights
from jubako.weights.graphs.admission import Admission, Provider, admit, lacking
from jubako.weights.graphs.graph import Port, read_graph

FLOAT, BFLOAT16, HALF = TensorProto.FLOAT, TensorProto.BFLOAT16, TensorProto.FLOAT16
SAMPLE = ["2B", 4, "H", "W"]


def admitted(file: Path, provider: Provider = "cpu") -> Admission:
    return admit(read_graph(file), "unet", "nvidia", provider)


def fused(name: str) -> dict[str, Any]:
    nodes = [
        helper.make_node(name, ["sample"], ["fused"], domain="com.microsoft"),
        helper.make_node("Identity", ["fused"], ["latent"]),
    ]
    return {"nodes": nodes, "domains": {"com.microsoft": 1}}


def test_a_graph_of_the_contract_has_its_ports_under_our_names(tmp_path: Path) -> None:
    admission = admitted(unet(tmp_path / "model.onnx"))
    assert admission.inputs["sample"] == Port("sample", "float32", ("2B", 4, "H", "W"))
    assert admission.outputs["prediction"].name == "latent"
    assert (admission.graph.opset, admission.remedy) == (18, None)
    assert admission.graph.operators == {("ai.onnx", "Add"), ("ai.onnx", "Unsqueeze")}


@pytest.mark.parametrize(
    ("changes", "provider", "reason"),
    [
        (
            {"inputs": {"adapter": (FLOAT, [1])}},
            "cpu",
            r"nothing is known to give to its input adapter: float32\[1\]",
        ),
        ({"inputs": {"encoder_hidden_states": None}}, "cpu", "it has no input for encoder_hidden_states"),
        (
            {"inputs": {"encoder_hidden_states": (TensorProto.INT8, ["2B", 77, 8])}},
            "cpu",
            r"encoder_hidden_states: int8\[2B, 77, 8\] should be bfloat16 or float16 or float32",
        ),
        (
            {"inputs": {"timestep": (FLOAT, ["2B", 1])}},
            "cpu",
            r"timestep: float32\[2B, 1\] should have 0 or 1 dims",
        ),
        ({"outputs": {"noise": (FLOAT, SAMPLE)}}, "cpu", r"of its outputs noise: .* none is latent"),
        (fused("GroupNorm"), "cpu", "ONNX Runtime has no GroupNorm for cpu"),
        (fused("NhwcConv"), "cpu", "ONNX Runtime has no NhwcConv for cpu"),
        (fused("BiasSplitGelu"), "migraphx", "ONNX Runtime has no BiasSplitGelu for migraphx"),
        ({"domains": {"acme": 3}}, "cpu", "it has operators of acme, which ONNX Runtime does not know"),
        ({"opset": 99}, "cpu", "its operator set is 99"),
    ],
)
def test_each_refusal_says_why(
    tmp_path: Path, changes: dict[str, Any], provider: Provider, reason: str
) -> None:
    with pytest.raises(UnusableWeights, match=reason):
        admitted(unet(tmp_path / "model.onnx", **changes), provider)


def test_fused_operators_that_a_provider_has_are_fine(tmp_path: Path) -> None:
    file = unet(tmp_path / "model.onnx", **fused("GroupNorm"))
    assert admitted(file, "migraphx").graph.operators >= {("com.microsoft", "GroupNorm")}


def test_all_reasons_are_told_at_once(tmp_path: Path) -> None:
    file = unet(tmp_path / "model.onnx", inputs={"adapter": (FLOAT, [1])}, domains={"acme": 3})
    with pytest.raises(
        UnusableWeights, match=r"operators of acme.*; nothing is known to give to its input adapter"
    ):
        admitted(file)


def test_bfloat16_asks_for_a_remedy(tmp_path: Path) -> None:
    kinds = {"sample": (BFLOAT16, SAMPLE), "timestep": (BFLOAT16, ["2B"])}
    nodes = [
        helper.make_node("Unsqueeze", ["timestep", "axes"], ["times"]),
        helper.make_node("Add", ["sample", "times"], ["moved"]),
        helper.make_node("Sin", ["moved"], ["latent"]),
    ]
    outputs = {"latent": (BFLOAT16, SAMPLE)}
    old = unet(tmp_path / "old.onnx", inputs=kinds, outputs=outputs, nodes=nodes)
    new = unet(tmp_path / "new.onnx", inputs=kinds, outputs=outputs, nodes=nodes, opset=22)
    assert read_graph(old).untyped == {"Sin"}
    assert read_graph(new).untyped == set()
    remedies = {
        (file.name, provider): admitted(file, provider).remedy
        for file in (old, new)
        for provider in ("cpu", "tensorrt")
    }
    assert remedies == {
        ("old.onnx", "cpu"): "float32",
        ("old.onnx", "tensorrt"): "opset22",
        ("new.onnx", "cpu"): "float32",
        ("new.onnx", "tensorrt"): None,
    }


def test_a_residual_must_tell_its_layers_and_width(tmp_path: Path) -> None:
    fine = read_graph(transformer(tmp_path / "fine.onnx", [19, "2B", "patches", 32]))
    assert admit(fine, "transformer", "nvidia", "cpu").inputs["block_controlnet_hidden_states"].dims[0] == 19
    vague = read_graph(transformer(tmp_path / "vague.onnx", ["layers", "2B", "patches", 32]))
    with pytest.raises(UnusableWeights, match="how many layers its input block_controlnet_hidden_states"):
        admit(vague, "transformer", "nvidia", "cpu")


@pytest.mark.parametrize(
    "location",
    ["../secret", "/etc/passwd", "deeper/../../secret", "..\\secret", "C:\\secret", "\\\\host\\secret"],
)
def test_weights_outside_of_the_graph_s_folder_are_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 8192)
    file = with_data(tmp_path / "unet" / "model.onnx", location)
    with pytest.raises(UnusableWeights, match="lies outside its folder"):
        admitted(file)


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"\0" * 8192)
    file = with_data(tmp_path / "unet" / "model.onnx", "weights")
    (file.parent / "weights").symlink_to(tmp_path / "secret")
    with pytest.raises(UnusableWeights, match="leads outside its folder"):
        admitted(file)


def test_links_to_blobs_of_the_hugging_face_cache_are_no_way_out(tmp_path: Path) -> None:
    repository = tmp_path / "models--stabilityai--sdxl-turbo-tensorrt"
    blob = repository / "blobs" / "0c5d"
    file = with_data(repository / "snapshots" / "abc" / "unetxl.opt" / "model.onnx", "weights", place=blob)
    (file.parent / "weights").symlink_to("../../../blobs/0c5d")
    assert admitted(file).graph.data_paths == (file.parent / "weights",)


def test_missing_and_torn_weights_are_found_before_a_session_is_made(tmp_path: Path) -> None:
    missing = with_data(tmp_path / "missing" / "model.onnx", "4f6e0c1a")
    with pytest.raises(UnusableWeights, match="4f6e0c1a is missing"):
        admitted(missing)
    torn = with_data(
        tmp_path / "torn" / "model.onnx", "weights", length=4097, place=tmp_path / "torn" / "weights"
    )
    with pytest.raises(
        UnusableWeights, match="weights was cut off: it has 4096 bytes, and the graph needs 4097"
    ):
        admitted(torn)


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"\x08\x0a\x3a\xff\xff"])
def test_a_file_that_is_no_graph_is_said_to_be_none(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(content)
    with pytest.raises(UnusableWeights, match="is no ONNX graph, or a torn one"):
        admitted(file)


def test_a_text_encoder_may_lack_what_a_pipeline_reads(tmp_path: Path) -> None:
    from onnx_files import save

    file = save(
        tmp_path / "model.onnx",
        [helper.make_node("Cast", ["input_ids"], ["last_hidden_state"], to=FLOAT)],
        {"input_ids": (TensorProto.INT32, ["B", 77])},
        {"last_hidden_state": (FLOAT, ["B", 77, 8])},
    )
    admission = admit(read_graph(file), "text_encoder", "amd", "cpu")
    assert lacking(admission, ("last_hidden_state",)) == ()
    assert lacking(admission, ("penultimate", "text_embeds")) == ("penultimate", "text_embeds")
