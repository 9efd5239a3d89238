"""The ladder: what each invented machine serves, and the reason of each step that is not passed."""

from __future__ import annotations

import re
from typing import Any

import pytest
from machines import CPU_ONLY, MACHINES, gpu, nvidia
from server import ROOT

from jubako.catalog import Model, load_catalog
from jubako.errors import WeightsUnavailable
from jubako.hardware import Machine, machine, require_device
from jubako.settings import SettingsError
from jubako.weight_sets import Absence, GraphSet
from jubako.weights.selection import Choice, choose

CATALOG = load_catalog()
H200, T4, MI300X, NO_GPU = (machine(MACHINES[name]) for name in ("H200", "T4", "MI300X", "no GPU"))


def chosen(model: str | Model, machine: Machine, **changes: Any) -> Choice:
    """What is chosen with every file on disk and all graphs admitted, but for the changes."""
    asked: dict[str, Any] = {"weights": "auto", "precision": "auto", "provider": "auto"}
    asked |= {"missing": lambda _: None, "refused": lambda _: None}
    found = CATALOG.model(model) if isinstance(model, str) else model
    return choose(found, machine, **asked | changes)


def outcome(model: str, signals: Any) -> str:
    """A cell of the table."""
    found = machine(signals)
    try:
        used = found.using(require_device(found, "auto"))
    except SettingsError:
        return "does not start"
    choice = chosen(model, used)
    return f"{choice.vendor} {choice.precision}"


def reasons(choice: Choice) -> list[tuple[str, str | None, str]]:
    return [(rung.weights, rung.precision, rung.step) for rung in choice.rejected]


def documented() -> dict[str, dict[str, str]]:
    """The table of docs/selection.md: a row for each machine, a cell for each model."""
    text = (ROOT / "docs" / "selection.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    header = next(index for index, line in enumerate(lines) if line.startswith("| machine |"))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[header:]]
    names, rows = cells[0][1:], cells[2:]
    return {row[0]: dict(zip(names, row[1:], strict=True)) for row in rows}


TABLE = documented()


def test_the_documented_machines_are_the_invented_ones() -> None:
    assert list(TABLE) == list(MACHINES)


@pytest.mark.parametrize(("name", "model"), [(name, model) for name in TABLE for model in TABLE[name]])
def test_each_cell_of_the_documented_table_is_what_would_be_chosen(name: str, model: str) -> None:
    assert outcome(model, MACHINES[name]) == TABLE[name][model]


def test_nvidia_s_graphs_run_on_tensorrt_then_cuda() -> None:
    choice = chosen("sd3.5-large", H200)
    assert choice.providers == ("TensorrtExecutionProvider", "CUDAExecutionProvider")
    assert choice.graphs == CATALOG.model("sd3.5-large").graph_sets("nvidia")[0]
    assert choice.rejected == ()


def test_a_model_without_sets_has_the_catalog_s_reasons() -> None:
    choice = chosen("svd", H200)
    model = CATALOG.model("svd")
    assert choice.vendor == "standard"
    assert [rung.reason for rung in choice.rejected] == [model.absence("nvidia"), model.absence("amd")]
    assert {rung.step for rung in choice.rejected} == {"catalog"}
    assert isinstance(model.weight_sets["amd"], Absence)


def test_a_provider_that_does_not_run_is_the_reason() -> None:
    broken = nvidia(
        gpu("NVIDIA H200", 139.8, capability=9.0),
        loading={
            "TensorrtExecutionProvider": "the library libnvinfer.so.10 is missing",
            "CUDAExecutionProvider": "",
            "CPUExecutionProvider": "",
        },
    )
    choice = chosen("sdxl", machine(broken))
    assert (choice.vendor, choice.precision) == ("standard", "float16")
    first = choice.rejected[0]
    assert (first.weights, first.precision, first.step) == ("nvidia", None, "provider")
    assert first.reason == ("TensorrtExecutionProvider does not run: the library libnvinfer.so.10 is missing")
    assert chosen("sdxl", machine(broken), provider="cuda").providers == ("CUDAExecutionProvider",)


def test_the_missing_package_s_reason_has_the_install_line() -> None:
    (rung, _) = chosen("sdxl", machine(MACHINES["H200, onnxruntime for CPUs"])).rejected
    assert "scripts/serve --hardware nvidia" in rung.reason
    assert "pip install 'jubako[nvidia]'" in rung.reason


@pytest.mark.parametrize(
    ("model", "name", "reason"),
    [
        ("sd3.5-medium", "T4", "needs compute capability 8.0; Tesla T4 has 7.5"),
        ("svd-xt-1.1", "T4", "needs 16 GB of memory; Tesla T4 has 15.1 GB free"),
        ("sd3.5-large", "L4", "needs 29 GB of memory; NVIDIA L4 has 23.1 GB free"),
    ],
)
def test_a_gpu_that_is_not_up_to_a_set_is_the_reason(model: str, name: str, reason: str) -> None:
    first = chosen(model, machine(MACHINES[name])).rejected[0]
    assert (first.step, first.reason) == ("hardware", reason)


def test_an_architecture_that_a_set_does_not_name_is_the_reason() -> None:
    old = MI300X.model_copy(update={"gpus": (gpu("AMD Instinct MI100", 32, architecture="gfx908"),)})
    choice = chosen("sd1.5", old)
    assert choice.vendor == "standard"
    assert choice.rejected[1].step == "hardware"
    assert choice.rejected[1].reason.startswith("made for gfx90a, ")
    assert choice.rejected[1].reason.endswith("AMD Instinct MI100 is gfx908")


@pytest.mark.parametrize("precision", ["bfloat16", "float8"])
def test_a_set_that_states_no_hardware_still_needs_a_gpu_for_its_precision(precision: str) -> None:
    (first, *_) = CATALOG.model("sd3.5-large").graph_sets("nvidia")
    own = {key: value for key, value in first.model_dump().items() if key not in {"hardware", "precision"}}
    sets = (GraphSet.model_validate({**own, "precision": precision}),)
    model = CATALOG.model("sd3.5-large").model_copy(update={"weight_sets": {"nvidia": sets}})
    assert chosen(model, H200).graphs == sets[0]
    rejected = chosen(model, T4).rejected[0]
    assert (rejected.precision, rejected.step) == (precision, "hardware")


def test_a_default_size_that_the_engines_do_not_take_is_the_reason() -> None:
    sdxl = CATALOG.model("sdxl")
    wide = sdxl.model_copy(update={"defaults": sdxl.defaults.model_copy(update={"width": 1536})})
    choice = chosen(wide, H200)
    assert (choice.vendor, choice.rejected[0].step) == ("standard", "shapes")
    assert "1536x1024" in choice.rejected[0].reason


def test_files_are_asked_for_before_graphs_and_both_only_when_all_else_holds() -> None:
    asked: list[str] = []

    def missing(graphs: GraphSet) -> str | None:
        asked.append(f"files of {graphs.precision}")
        return "not pulled" if graphs.precision == "bfloat16" else None

    def refused(graphs: GraphSet) -> str | None:
        asked.append(f"graphs of {graphs.precision}")
        return "an operator that nobody knows"

    choice = chosen("sd3.5-large", H200, missing=missing, refused=refused)
    assert asked == ["files of bfloat16", "files of float8", "graphs of float8"]
    assert choice.vendor == "standard"
    assert [(rung.step, rung.reason) for rung in choice.rejected[:2]] == [
        ("files", "not pulled"),
        ("graphs", "an operator that nobody knows"),
    ]
    asked.clear()
    chosen("sd3.5-large", T4, missing=missing, refused=refused)
    assert asked == []


def test_a_precision_leaves_only_sets_of_it() -> None:
    choice = chosen("sd3.5-large", H200, precision="float8")
    assert (choice.vendor, choice.precision) == ("nvidia", "float8")
    assert reasons(choice) == [("nvidia", "bfloat16", "catalog")]
    assert choice.rejected[0].reason == "float8 is asked for"
    mixed = chosen("sd1.5", MI300X, precision="mixed")
    assert (mixed.vendor, mixed.precision) == ("amd", "mixed")


def test_a_precision_without_a_set_is_that_of_the_standard_weights() -> None:
    choice = chosen("sd3.5-large", H200, precision="float16")
    assert (choice.vendor, choice.precision) == ("standard", "float16")
    assert choice.rejected[0].reason == "they are bfloat16 and float8, not float16"


def test_an_explicit_vendor_that_can_not_be_served_raises_with_every_reason() -> None:
    with pytest.raises(WeightsUnavailable) as raised:
        chosen("sd3.5-large", T4, weights="nvidia")
    assert raised.value.status == 503
    assert raised.value.message == (
        "model: sd3.5-large can't be served from nvidia weights here: "
        "nvidia bfloat16: needs compute capability 8.0; Tesla T4 has 7.5; "
        "nvidia float8: needs compute capability 8.9; Tesla T4 has 7.5"
    )


@pytest.mark.parametrize(
    ("model", "weights", "found", "reason"),
    [
        ("sd1.5", "nvidia", H200, CATALOG.model("sd1.5").absence("nvidia")),
        ("sdxl", "amd", H200, "there is no GPU of AMD here"),
        ("sdxl", "nvidia", NO_GPU, "there is no GPU here"),
        ("sdxl", "nvidia", H200.using("cpu"), "JUBAKO_DEVICE is cpu"),
    ],
)
def test_an_explicit_vendor_never_becomes_another_one(
    model: str, weights: str, found: Machine, reason: str
) -> None:
    with pytest.raises(WeightsUnavailable, match=re.escape(reason)):
        chosen(model, found, weights=weights)


@pytest.mark.parametrize(("weights", "setting"), [("nvidia", "migraphx"), ("amd", "cuda")])
def test_a_provider_of_the_other_vendor_s_names_the_valid_ones(weights: str, setting: str) -> None:
    found = H200 if weights == "nvidia" else MI300X
    with pytest.raises(WeightsUnavailable, match=f"JUBAKO_EXECUTION_PROVIDER is {setting}; .*: auto, "):
        chosen("sdxl", found, weights=weights, provider=setting)


def test_an_explicit_vendor_on_the_cpu_needs_no_gpu() -> None:
    for weights in ("nvidia", "amd"):
        choice = chosen("sdxl", NO_GPU, weights=weights, provider="cpu")
        assert (choice.vendor, choice.providers) == (weights, ("CPUExecutionProvider",))
    with pytest.raises(WeightsUnavailable, match="not pulled"):
        chosen("sdxl", NO_GPU, weights="nvidia", provider="cpu", missing=lambda _: "not pulled")
    bare = machine(CPU_ONLY.model_copy(update={"onnxruntimes": (), "providers": (), "loading": {}}))
    with pytest.raises(WeightsUnavailable, match="ONNX Runtime is not installed"):
        chosen("sdxl", bare, weights="nvidia", provider="cpu")


def test_auto_takes_no_graphs_on_the_cpu() -> None:
    choice = chosen("sdxl", NO_GPU, provider="cpu")
    assert (choice.vendor, choice.precision, choice.providers) == ("standard", "float32", ())
    assert {rung.step for rung in choice.rejected} == {"provider"}
    assert "JUBAKO_WEIGHTS" in choice.rejected[0].reason


def test_explicit_standard_asks_nothing() -> None:
    def fail(graphs: GraphSet) -> str | None:
        raise AssertionError(graphs)

    choice = chosen("sdxl", H200, weights="standard", missing=fail, refused=fail)
    assert choice == Choice(vendor="standard", precision="float16")


@pytest.mark.parametrize("name", ["H200", "RTX 4090", "L4", "MI300X"])
def test_standard_weights_in_float8_run_where_float8_is_computed(name: str) -> None:
    choice = chosen("sd1.5", machine(MACHINES[name]), weights="standard", precision="float8")
    assert (choice.vendor, choice.precision) == ("standard", "float8")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("T4", "needs compute capability 8.9"),
        ("RX 7900 XTX", "float8 is for gfx942, gfx950"),
        ("no GPU", "float8 wants a GPU: there is no GPU here"),
    ],
)
@pytest.mark.parametrize("weights", ["standard", "auto"])
def test_standard_weights_in_float8_are_refused_elsewhere(name: str, reason: str, weights: str) -> None:
    with pytest.raises(WeightsUnavailable, match=reason):
        chosen("sd1.5", machine(MACHINES[name]), weights=weights, precision="float8")


def test_mixed_is_for_graphs() -> None:
    with pytest.raises(WeightsUnavailable, match="mixed is a precision of graphs"):
        chosen("sdxl", H200, weights="standard", precision="mixed")


def test_the_gpu_that_the_device_names_counts() -> None:
    small, large = MACHINES["T4"].torch_sees[0], MACHINES["H200"].torch_sees[0]
    both = machine(nvidia(small, large))
    assert chosen("sd3.5-large", both.using(require_device(both, "auto"))).vendor == "standard"
    assert chosen("sd3.5-large", both.using(require_device(both, "cuda:1"))).vendor == "nvidia"


@pytest.mark.parametrize("model", list(CATALOG), ids=lambda model: model.name)
@pytest.mark.parametrize("name", ["no GPU", "H200", "MI300X"])
def test_auto_serves_every_model_of_the_catalog(model: Model, name: str) -> None:
    choice = chosen(model, machine(MACHINES[name]))
    assert (choice.graphs is None) == (choice.vendor == "standard")
    assert all(rung.reason for rung in choice.rejected)
