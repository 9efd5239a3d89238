"""Between a pipeline's tensors and a graph's: types, ranks, rows and timesteps, all read from the graph."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from onnx import TensorProto
from onnx_files import transformer, unet

from jubako.errors import InvalidRequest
from jubako.weight_sets import Profile
from jubako.weights.graphs.adapter import Adapter
from jubako.weights.graphs.admission import admit
from jubako.weights.graphs.graph import read_graph
from jubako.weights.graphs.session import OrtGraph

CPU = torch.device("cpu")
HALF, FLOAT = TensorProto.FLOAT16, TensorProto.FLOAT


class Counted:
    """A running graph that keeps the rows of each of its calls."""

    def __init__(self, file: Path) -> None:
        self.graph = OrtGraph(file, ("CPUExecutionProvider",), CPU)
        self.calls: list[int] = []

    def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        self.calls.append(len(next(iter(inputs.values()))))
        return self.graph(inputs)


def adapted(file: Path, profile: Profile | None = None) -> tuple[Adapter, Counted]:
    running = Counted(file)
    slot = "unet" if read_graph(file).inputs[0].name == "sample" else "transformer"
    admission = admit(read_graph(file), slot, "nvidia", "cpu")  # type: ignore[arg-type] # one of the slots
    return Adapter(running, admission, profile), running  # type: ignore[arg-type] # a mapping is given


def given(rows: int, timesteps: list[float]) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.arange(rows * 64.0).reshape(rows, 4, 4, 4),
        "timestep": torch.tensor(timesteps),
        "encoder_hidden_states": torch.zeros(rows, 77, 8),
    }


def expected(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return tensors["sample"] + tensors["timestep"].expand(len(tensors["sample"]))[:, None, None, None]


@pytest.mark.parametrize(
    ("dims", "timestep", "calls"),
    [
        (["2B", 4, "H", "W"], ["2B"], [5]),
        ([1, 4, "H", "W"], [1], [1, 1, 1, 1, 1]),
        ([2, 4, "H", "W"], [2], [2, 2, 2]),
        (["2B", 4, "H", "W"], [1], [2, 2, 1]),
        (["2B", 4, "H", "W"], [], [2, 2, 1]),
        ([2, 4, "H", "W"], [1], [2, 2, 2]),
    ],
    ids=["free", "one row", "two rows", "one timestep", "a scalar timestep", "two rows, one timestep"],
)
def test_rows_and_timesteps_are_given_as_the_graph_takes_them(
    tmp_path: Path, dims: list[int | str], timestep: list[int | str], calls: list[int]
) -> None:
    nodes = None
    if len(timestep) == 0 or timestep == [1]:
        from onnx import helper

        nodes = [helper.make_node("Add", ["sample", "timestep"], ["latent"])]
    file = unet(
        tmp_path / "model.onnx",
        nodes=nodes,
        inputs={
            "sample": (FLOAT, dims),
            "timestep": (FLOAT, timestep),
            "encoder_hidden_states": (FLOAT, [dims[0], 77, 8]),
        },
        outputs={"latent": (FLOAT, dims)},
    )
    adapter, running = adapted(file)
    tensors = given(5, [10, 20, 10, 20, 30])
    found = adapter(**tensors)["prediction"]
    assert torch.equal(found, expected(tensors))
    assert running.calls == calls


def test_types_are_those_that_the_graph_declares(tmp_path: Path) -> None:
    kinds = {
        "sample": (HALF, ["2B", 4, "H", "W"]),
        "timestep": (HALF, ["2B"]),
        "encoder_hidden_states": (FLOAT, ["2B", 77, 8]),
    }
    adapter, _ = adapted(unet(tmp_path / "model.onnx", inputs=kinds, outputs={"latent": kinds["sample"]}))
    assert adapter.dtype == torch.float16
    tensors = given(2, [1, 2]) | {"timestep": torch.tensor([1, 2])}
    found = adapter(**tensors)["prediction"]
    assert found.dtype == torch.float16
    assert torch.equal(found.float(), expected(tensors))


def test_rows_are_padded_to_what_engines_were_built_for(tmp_path: Path) -> None:
    adapter, running = adapted(unet(tmp_path / "model.onnx"), Profile(rows=(2, 4)))
    for rows, calls in ((1, [2]), (2, [2]), (3, [4]), (5, [4, 2]), (9, [4, 4, 2])):
        running.calls.clear()
        tensors = given(rows, [float(row) for row in range(rows)])
        assert torch.equal(adapter(**tensors)["prediction"], expected(tensors))
        assert running.calls == calls


def test_one_timestep_stands_for_all_rows(tmp_path: Path) -> None:
    adapter, _ = adapted(unet(tmp_path / "model.onnx"))
    tensors = given(3, [7.0]) | {"timestep": torch.tensor(7.0)}
    assert torch.equal(adapter(**tensors)["prediction"], tensors["sample"] + 7)


def test_without_a_controlnet_its_residual_is_zero(tmp_path: Path) -> None:
    adapter, _ = adapted(transformer(tmp_path / "model.onnx", [19, "2B", "patches", 32]))
    latents = torch.randn(2, 16, 8, 6)
    found = adapter(
        hidden_states=latents,
        encoder_hidden_states=torch.zeros(2, 5, 8),
        pooled_projections=torch.zeros(2, 8),
        timestep=torch.zeros(2),
    )
    assert torch.equal(found["prediction"], latents)


def test_sizes_that_it_does_not_take_are_refused_by_the_field(tmp_path: Path) -> None:
    fixed = {"sample": (FLOAT, ["2B", 4, 64, 64])}
    adapter, _ = adapted(unet(tmp_path / "model.onnx", inputs=fixed, outputs={"latent": fixed["sample"]}))
    adapter.check((512, 512), {"sample": (2, 4, 64, 64)})
    with pytest.raises(InvalidRequest, match="width: these weights were made for one size"):
        adapter.check((512, 768), {"sample": (2, 4, 96, 64)})
    with pytest.raises(InvalidRequest, match="max_sequence_length: "):
        adapter.check((512, 512), {"encoder_hidden_states": (2, 154, 8)})
    limited, _ = adapted(unet(tmp_path / "other.onnx"), Profile(min_side=256, max_side=768))
    with pytest.raises(InvalidRequest, match="sides from 256 to 768, not 1024x512"):
        limited.check((1024, 512), {})
    pinned, _ = adapted(unet(tmp_path / "pinned.onnx"), Profile(sizes=((512, 512),)))
    with pytest.raises(InvalidRequest, match="take 512x512, not 512x768"):
        pinned.check((512, 768), {})
