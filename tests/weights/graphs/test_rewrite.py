"""Graphs in bfloat16: refused by ONNX Runtime as they are, and what is made of them."""

from __future__ import annotations

import multiprocessing
import shutil
from pathlib import Path

import onnx
import onnxruntime  # type: ignore[import-untyped] # publishes no types
import pytest
from exported_graphs import Exported
from onnx.reference import ReferenceEvaluator

from jubako.errors import UnusableWeights
from jubako.weights.graphs import rewrite
from jubako.weights.graphs.graph import read_graph
from jubako.weights.graphs.rewrite import rewritten


@pytest.fixture(scope="module")
def file(exported: Exported) -> Path:
    """A transformer in bfloat16 below operator set 22, its weights beside it."""
    return exported("tiny-sd3", "nvidia", "bfloat16").file("transformer")


def refusal(file: Path) -> str:
    with pytest.raises(Exception, match="ONNXRuntimeError") as error:
        onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return str(error.value)


def test_as_shipped_its_types_are_refused(file: Path) -> None:
    graph = read_graph(file)
    assert graph.untyped == {"Conv", "Einsum"}
    assert "Type Error: Type 'tensor(bfloat16)'" in refusal(file)


def test_for_a_gpu_it_becomes_a_newer_operator_set(file: Path, tmp_path: Path) -> None:
    before, after = read_graph(file), rewritten(read_graph(file), "opset22", tmp_path)
    assert (after.opset, after.untyped, after.has_bfloat16) == (22, frozenset(), True)
    assert (after.inputs, after.outputs) == (before.inputs, before.outputs)
    # The types are fine now; that the CPU has no kernels for them is another matter.
    assert "Could not find an implementation" in refusal(after.file)
    onnx.checker.check_model(str(after.file), full_check=True)
    assert after.data_paths[0].read_bytes() == before.data_paths[0].read_bytes()


def test_for_the_cpu_it_becomes_float32_of_the_same_values(file: Path, tmp_path: Path) -> None:
    before, after = read_graph(file), rewritten(read_graph(file), "float32", tmp_path)
    assert not after.has_bfloat16
    assert {port.dtype for port in (*after.inputs, *after.outputs)} == {"float32"}
    assert [port.dims for port in after.inputs] == [port.dims for port in before.inputs]
    onnxruntime.InferenceSession(str(after.file), providers=["CPUExecutionProvider"])
    old = {tensor.name: tensor for tensor in onnx.load(str(file)).graph.initializer}
    new = {tensor.name: tensor for tensor in onnx.load(str(after.file)).graph.initializer}
    assert old.keys() == new.keys()
    wide = [name for name, tensor in old.items() if tensor.data_type == onnx.TensorProto.BFLOAT16]
    assert len(wide) > 100
    for name in wide:
        values = onnx.numpy_helper.to_array(old[name]).astype("float32")
        assert (values == onnx.numpy_helper.to_array(new[name])).all()


def test_what_takes_no_bfloat16_at_all_runs_between_casts(tmp_path: Path) -> None:
    import numpy as np
    from onnx import TensorProto, helper

    kind = (TensorProto.BFLOAT16, [2, 3])
    graph = helper.make_graph(
        [helper.make_node("Einsum", ["x", "x"], ["y"], equation="ij,kj->ik")],
        "graph",
        [helper.make_tensor_value_info("x", *kind)],
        [helper.make_tensor_value_info("y", TensorProto.BFLOAT16, [2, 2])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=10)
    onnx.save(model, str(tmp_path / "model.onnx"))
    after = rewritten(read_graph(tmp_path / "model.onnx"), "opset22", tmp_path / "kept")
    assert [name for _, name in sorted(after.operators)] == ["Cast", "Einsum"]
    x = np.array([[1, 2, 3], [4, 5, 6]]).astype(onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16))
    (y,) = ReferenceEvaluator(str(after.file)).run(None, {"x": x})
    assert np.asarray(y).astype("float32").tolist() == [[14, 32], [32, 77]]


def rewrite_it(file: Path, folder: Path) -> None:
    rewritten(read_graph(file), "float32", folder)


def test_it_is_made_once_however_many_ask(file: Path, tmp_path: Path) -> None:
    processes = [
        multiprocessing.get_context("spawn").Process(target=rewrite_it, args=(file, tmp_path))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    (kept,) = (path for path in tmp_path.iterdir() if path.is_dir())
    written = (kept / "model.onnx").stat().st_mtime_ns
    rewrite_it(file, tmp_path)
    assert (kept / "model.onnx").stat().st_mtime_ns == written
    assert not list(tmp_path.glob("*.tmp"))


def test_other_weights_are_another_graph(file: Path, tmp_path: Path) -> None:
    first = rewritten(read_graph(file), "float32", tmp_path / "kept")
    shutil.copytree(file.parent, tmp_path / "other")
    (data,) = read_graph(tmp_path / "other" / "model.onnx").data_paths
    data.write_bytes(data.read_bytes()[:-2] + b"\1\2")
    second = rewritten(read_graph(tmp_path / "other" / "model.onnx"), "float32", tmp_path / "kept")
    assert second.file != first.file


def test_a_rewrite_that_changes_what_goes_in_is_thrown_away(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forget_an_input(graph: object, folder: Path) -> None:
        model = onnx.load(str(file))
        del model.graph.input[-1]
        onnx.save(model, str(folder / "model.onnx"))

    monkeypatch.setattr(rewrite, "_REMEDIES", {"float32": forget_an_input})
    with pytest.raises(UnusableWeights, match=r"rewriting \(float32\) changed its inputs"):
        rewritten(read_graph(file), "float32", tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
