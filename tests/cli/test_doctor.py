"""`jubako doctor`: this machine as it is, and invented machines through what the command makes of signals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from machines import CPU_ONLY, MACHINES, gpu, nvidia
from rich.console import Console

from jubako.catalog import load_catalog
from jubako.cli.doctor import _print, examined
from jubako.hardware import Distribution, Signals
from jubako.settings import load_settings

CATALOG = load_catalog()


def doctor(home: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """The command alone, in a process of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("JUBAKO_")}
    code = "import typer; from jubako.cli.doctor import doctor; typer.run(doctor)"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**kept, "JUBAKO_HOME": str(home), "COLUMNS": "100", "HF_HOME": str(home), **environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def report(signals: Signals, *names: str, **settings: str) -> dict[str, Any]:
    """What is told about a machine with every file on disk."""
    environ = {f"JUBAKO_{name.upper()}": value for name, value in settings.items()}
    models = [CATALOG.model(name) for name in names] if names else list(CATALOG)
    return examined(signals, models, load_settings(environ), lambda *_: None)


def printed(told: dict[str, Any], columns: int = 100) -> str:
    console = Console(width=columns, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        _print(console, told)
    return console.export_text()


def test_this_machine_is_told_as_json(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--json")
    told = json.loads(done.stdout)
    assert done.returncode == (1 if told["problems"] else 0), done.stderr
    assert [each["name"] for each in told["models"]] == list(CATALOG.names)
    assert told["signals"]["loading"]["CPUExecutionProvider"] == ""
    if told["machine"]["vendor"] is None:
        assert {each["choice"]["vendor"] for each in told["models"]} == {"standard"}


def test_this_machine_is_told_in_tables(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--model", "sdxl")
    for word in ("GPU", "PyTorch", "ONNX Runtime", "CPUExecutionProvider: runs", "Device", "sdxl"):
        assert word in done.stdout
    assert "sd3.5-large" not in done.stdout
    assert max(len(line) for line in done.stdout.splitlines()) <= 100


def test_graphs_that_were_not_pulled_are_told_with_the_command(tmp_path: Path) -> None:
    settings = load_settings({"JUBAKO_HOME": str(tmp_path)})
    told = examined(MACHINES["H200"], [CATALOG.model("sdxl")], settings)
    first = told["models"][0]["choice"]["rejected"][0]
    assert (first["step"], first["reason"]) == (
        "files",
        "its files are not on disk; fetch them with: jubako pull sdxl --weights nvidia --precision float16",
    )


def test_graphs_in_a_folder_are_found_there(tmp_path: Path) -> None:
    graphs = CATALOG.model("sdxl").graph_sets("nvidia")[0]
    here = graphs.model_copy(update={"repo": None, "folder": tmp_path / "graphs"})
    # A miniature's standard weights are on disk, so all that goes with the graphs is there.
    small = CATALOG.model("tiny-sdxl")
    sized = small.defaults.model_copy(update={"width": 1024, "height": 1024})
    model = small.model_copy(update={"weight_sets": {"nvidia": (here,)}, "defaults": sized})
    settings = load_settings({"JUBAKO_HOME": str(tmp_path)})
    told = examined(MACHINES["H200"], [model], settings)
    reason = told["models"][0]["choice"]["rejected"][0]["reason"]
    assert reason == f"there is no folder {tmp_path / 'graphs'}"
    (tmp_path / "graphs").mkdir()
    told = examined(MACHINES["H200"], [model], settings)
    assert told["models"][0]["choice"]["vendor"] == "nvidia"


def test_a_gpu_that_is_well_leaves_nothing_to_mend() -> None:
    told = report(MACHINES["H200"], "sd3.5-large", "sd1.5")
    assert (told["device"], told["problems"]) == ("cuda", [])
    text = printed(told)
    assert "NVIDIA H200, compute capability 9.0" in text
    assert "NVIDIA 580.95.05" in text
    assert "2.13.0 for CUDA 13.0" in text
    assert "TensorrtExecutionProvider: runs" in text
    assert "nvidia bfloat16" in text
    assert "To be mended" not in text
    assert "nvidia: NVIDIA publishes none of Stable Diffusion 1 and 2" in text


def test_a_rejected_rung_is_told_with_its_reason() -> None:
    told = report(MACHINES["T4"], "sd3.5-large")
    (model,) = told["models"]
    assert [rung["reason"] for rung in model["choice"]["rejected"]] == [
        "needs compute capability 8.0; Tesla T4 has 7.5",
        "needs compute capability 8.9; Tesla T4 has 7.5",
        "there is no GPU of AMD here",
    ]
    assert "nvidia float8: needs compute capability 8.9; Tesla T4" in printed(told)


def test_a_machine_on_which_no_server_starts_says_so() -> None:
    told = report(MACHINES["H200, driver 535 and PyTorch for CUDA 13"], "sdxl")
    assert told["device"] is None
    (problem,) = told["problems"]
    assert "install driver 580 or newer" in problem
    assert told["models"][0]["choice"] is None
    text = printed(told)
    assert "none that PyTorch sees, but /dev/nvidiactl, /dev/nvidia0" in text
    assert "no server starts on this machine as it is" in text


def test_what_is_in_brackets_is_printed_as_it_is() -> None:
    told = report(CPU_ONLY.model_copy(update={"device_files": ("/dev/nvidia0",)}), "sdxl")
    assert "'jubako[nvidia]'" in " ".join(printed(told).split())


def test_whoever_asks_for_the_cpu_has_nothing_to_mend_about_gpus() -> None:
    cpu = CPU_ONLY.model_copy(update={"device_files": ("/dev/nvidia0",)})
    told = report(cpu, "sdxl", device="cpu")
    assert (told["device"], told["problems"]) == ("cpu", [])
    both = tuple(Distribution(name=name, version="1.31.1") for name in ("onnxruntime", "onnxruntime-gpu"))
    assert report(cpu.model_copy(update={"onnxruntimes": both}), "sdxl", device="cpu")["problems"]
    used = report(MACHINES["H200"], "sdxl", device="cpu")["models"][0]["choice"]
    assert (used["vendor"], used["precision"]) == ("standard", "float32")
    assert used["rejected"][0]["reason"] == "JUBAKO_DEVICE is cpu"


def test_a_device_that_is_not_there_is_a_problem() -> None:
    told = report(MACHINES["H200"], "sdxl", device="cuda:3")
    assert told["problems"] == ["JUBAKO_DEVICE: there is no cuda:3; known: cuda:0"]
    assert told["device"] is None


def test_what_is_set_and_can_not_be_served_is_told() -> None:
    told = report(MACHINES["T4"], "sd3.5-large", "sdxl", weights="nvidia")
    large, sdxl = told["models"]
    assert large["choice"] is None
    assert "can't be served from nvidia weights here" in large["error"]
    assert sdxl["choice"]["vendor"] == "nvidia"


@pytest.mark.parametrize("name", list(MACHINES))
def test_every_machine_s_tables_fit_100_columns(name: str) -> None:
    text = printed(report(MACHINES[name]))
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 100
    assert "…" not in text
    assert all(model in text for model in CATALOG.names)


def test_a_long_reason_is_folded_not_cut() -> None:
    words = "a reason " * 60
    signals = nvidia(gpu("NVIDIA H200", 139.8, capability=9.0), loading={"TensorrtExecutionProvider": words})
    assert " ".join(printed(report(signals, "sdxl")).split()).count("a reason") == 180
