"""Detection on invented machines: whose GPU is used, what is to be mended, which device a setting means."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from machines import BOTH, CPU_ONLY, MACHINES, RX_7900, TOO_OLD, amd, gpu, nvidia

from jubako.hardware import Distribution, Machine, Signals, machine, providers_for, require_device
from jubako.settings import SettingsError

H200 = gpu("NVIDIA H200", 139.8, capability=9.0)
NVIDIA_FILES = ("/dev/nvidiactl", "/dev/nvidia0")


def problem(signals: Signals) -> str:
    """The only thing to be mended."""
    (one,) = machine(signals).problems
    return one


def without_gpu(**changes: Any) -> Signals:
    return CPU_ONLY.model_copy(update=changes)


@pytest.mark.parametrize("name", ["no GPU", "H200", "T4", "MI300X", "RX 7900 XTX"])
def test_a_machine_that_is_set_up_has_nothing_to_be_mended(name: str) -> None:
    assert machine(MACHINES[name]).problems == ()


def test_importing_it_brings_neither_torch_nor_onnxruntime() -> None:
    code = (
        "import jubako.hardware, jubako.probe, jubako.weights.selection, jubako.cli.doctor, sys; "
        "print(*sorted({'torch', 'onnxruntime', 'onnx', 'diffusers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == ""


def test_signals_and_machines_survive_json() -> None:
    for signals in MACHINES.values():
        assert Signals.model_validate_json(signals.model_dump_json()) == signals
        found = machine(signals)
        assert Machine.model_validate_json(found.model_dump_json()) == found


def test_of_two_vendors_the_one_that_pytorch_sees_is_used() -> None:
    cuda = machine(MACHINES["RTX 4090 and RX 7900 XTX, PyTorch for CUDA"])
    rocm = machine(MACHINES["RTX 4090 and RX 7900 XTX, PyTorch for ROCm"])
    assert (cuda.vendor, rocm.vendor) == ("nvidia", "amd")
    assert cuda.present == rocm.present == ("nvidia", "amd")
    assert cuda.problems == rocm.problems == ()


def test_of_two_vendors_that_pytorch_can_not_see_none_is_chosen() -> None:
    found = machine(MACHINES["RTX 4090 and RX 7900 XTX, PyTorch for CPUs"])
    assert found.vendor is None
    (told,) = found.problems
    assert "GPUs of NVIDIA and AMD" in told
    assert "scripts/serve --hardware nvidia" in told
    assert "scripts/serve --hardware amd" in told
    with pytest.raises(SettingsError, match=r"--hardware nvidia.*--hardware amd"):
        require_device(found, "auto")


@pytest.mark.parametrize(
    ("signals", "words"),
    [
        (
            without_gpu(device_files=NVIDIA_FILES),
            ["GPU of NVIDIA", "built for CPUs", "scripts/serve --hardware nvidia", "'jubako[nvidia]'"],
        ),
        (
            without_gpu(device_files=("/dev/kfd",), kfd={"gfx942": 192 * 2**30}),
            ["GPU of AMD", "built for CPUs", "scripts/serve --hardware amd", "'jubako[amd]'", "pytorch.org"],
        ),
        (
            without_gpu(
                torch_build="cuda", torch_version="2.13.0", toolkit="13.0", device_files=("/dev/kfd",)
            ),
            ["GPU of AMD", "built for NVIDIA (CUDA)", "scripts/serve --hardware amd"],
        ),
        (
            nvidia(drivers={"nvidia": "535.183.01"}, torch_problem=TOO_OLD),
            ["driver 535.183.01 is too old for CUDA 13.0", "install driver 580 or newer"],
        ),
        (
            nvidia(drivers={"nvidia": "470.82.01"}, toolkit="12.8"),
            ["driver 470.82.01 is too old for CUDA 12.8", "install driver 525 or newer"],
        ),
        (
            nvidia(torch_problem="no permission"),
            ["does not see it (no permission)", "nvidia-smi", "CUDA 13.0"],
        ),
        (amd(device_files=("/dev/kfd",), kfd=None), ["does not see it", "rocminfo", "ROCm 7.1"]),
        (
            Signals(torch_problem="libtorch.so: cannot open", device_files=NVIDIA_FILES),
            ["PyTorch can't be imported (libtorch.so: cannot open)", "scripts/setup"],
        ),
    ],
    ids=[
        "cpu-build",
        "cpu-build-amd",
        "other-build",
        "driver-13",
        "driver-12",
        "unseen",
        "unseen-amd",
        "none",
    ],
)
def test_a_gpu_that_pytorch_can_not_use_is_to_be_mended(signals: Signals, words: list[str]) -> None:
    found = machine(signals)
    told = problem(signals)
    for word in words:
        assert word in told
    assert found.vendor is None
    with pytest.raises(SettingsError) as raised:
        require_device(found, "auto")
    assert str(raised.value) == f"JUBAKO_DEVICE: {told}; to run on the CPU, set JUBAKO_DEVICE=cpu"
    assert require_device(found, "cpu") == "cpu"


@pytest.mark.parametrize(("toolkit", "driver"), [("12.8", "550.54.14"), ("13.0", "580.65.06"), ("12.8", "")])
def test_a_driver_that_is_new_enough_or_unknown_is_not_blamed(toolkit: str, driver: str) -> None:
    drivers = {"nvidia": driver} if driver else {}
    assert "too old" not in problem(nvidia(toolkit=toolkit, drivers=drivers))


def test_a_driver_is_no_matter_while_pytorch_sees_the_gpu() -> None:
    assert machine(nvidia(H200, drivers={"nvidia": "535.183.01"})).problems == ()


def test_pytorch_for_cuda_on_a_machine_without_gpu_is_well() -> None:
    found = machine(without_gpu(torch_build="cuda", toolkit="13.0"))
    assert found.problems == ()
    assert require_device(found, "auto") == "cpu"


@pytest.mark.parametrize(
    ("kfd", "present"),
    [
        (None, ("amd",)),
        ({"gfx1036": 2**29}, ()),
        ({}, ()),
        ({"gfx1036": 2**29, "gfx1100": RX_7900.memory}, ("amd",)),
    ],
)
def test_the_graphics_part_of_a_processor_is_no_gpu(kfd: dict[str, int] | None, present: tuple[str]) -> None:
    assert machine(without_gpu(device_files=("/dev/kfd",), kfd=kfd)).present == present


@pytest.mark.parametrize("value", ["", "-1"])
def test_gpus_that_were_hidden_on_purpose_are_not_missed(value: str) -> None:
    found = machine(nvidia(visible={"CUDA_VISIBLE_DEVICES": value}))
    assert (found.present, found.problems) == ((), ())
    assert require_device(found, "auto") == "cpu"
    with pytest.raises(SettingsError, match="CUDA_VISIBLE_DEVICES hides all GPUs"):
        require_device(found, "cuda")
    hidden = machine(without_gpu(device_files=BOTH, visible={"HIP_VISIBLE_DEVICES": value}))
    assert hidden.present == ("nvidia",)
    assert machine(nvidia(visible={"CUDA_VISIBLE_DEVICES": "1"})).present == ("nvidia",)


def test_onnxruntime_that_is_missing_is_to_be_mended_beside_a_gpu_alone() -> None:
    none: dict[str, Any] = {"onnxruntimes": (), "providers": (), "loading": {}}
    told = problem(nvidia(H200, **none))
    assert "ONNX Runtime, which runs weights of NVIDIA, is not installed" in told
    assert "scripts/serve --hardware nvidia" in told
    assert machine(without_gpu(**none)).problems == ()


@pytest.mark.parametrize(
    ("signals", "needed"),
    [
        (MACHINES["H200, onnxruntime for CPUs"], "onnxruntime-gpu"),
        (
            amd(RX_7900, onnxruntimes=CPU_ONLY.onnxruntimes, providers=CPU_ONLY.providers),
            "onnxruntime-migraphx",
        ),
    ],
)
def test_onnxruntime_for_other_hardware_is_to_be_mended(signals: Signals, needed: str) -> None:
    told = problem(signals)
    assert told.startswith("onnxruntime is installed, but weights of ")
    assert f"need {needed}: run scripts/serve --hardware" in told
    assert "pip uninstall -y onnxruntime, then" in told


def test_another_distribution_with_the_right_providers_is_well() -> None:
    own_build = (Distribution(name="onnxruntime-training", version="1.31.1"),)
    assert machine(nvidia(H200, onnxruntimes=own_build)).problems == ()


@pytest.mark.parametrize(
    ("signals", "hardware"),
    [(nvidia(H200), "nvidia"), (CPU_ONLY, "cpu"), (without_gpu(device_files=NVIDIA_FILES), "nvidia")],
)
def test_several_distributions_of_onnxruntime_are_to_be_mended(signals: Signals, hardware: str) -> None:
    both = tuple(Distribution(name=name, version="1.31.1") for name in ("onnxruntime", "onnxruntime-gpu"))
    *_, told = machine(signals.model_copy(update={"onnxruntimes": both})).problems
    assert told.startswith("onnxruntime and onnxruntime-gpu are installed at once")
    assert f"scripts/serve --hardware {hardware}" in told
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in told


def test_onnxruntime_that_can_not_be_imported_is_to_be_mended() -> None:
    told = problem(without_gpu(onnxruntime_problem="No module named 'onnxruntime.capi'", providers=()))
    assert "ONNX Runtime can't be imported (No module named 'onnxruntime.capi')" in told


def test_a_provider_that_does_not_load_is_to_be_mended_with_the_reason() -> None:
    loading = {"MIGraphXExecutionProvider": "the library libmigraphx_c.so.3 is missing"}
    told = problem(amd(RX_7900, loading=loading))
    assert told == (
        "MIGraphXExecutionProvider, which runs weights of AMD, does not load: "
        "the library libmigraphx_c.so.3 is missing"
    )


@pytest.mark.parametrize(
    ("vendor", "setting", "providers"),
    [
        ("nvidia", "auto", ("TensorrtExecutionProvider", "CUDAExecutionProvider")),
        ("nvidia", "tensorrt", ("TensorrtExecutionProvider", "CUDAExecutionProvider")),
        ("nvidia", "cuda", ("CUDAExecutionProvider",)),
        ("nvidia", "cpu", ("CPUExecutionProvider",)),
        ("nvidia", "migraphx", ()),
        ("amd", "auto", ("MIGraphXExecutionProvider",)),
        ("amd", "migraphx", ("MIGraphXExecutionProvider",)),
        ("amd", "cpu", ("CPUExecutionProvider",)),
        ("amd", "tensorrt", ()),
        ("amd", "cuda", ()),
    ],
)
def test_the_cpu_runs_graphs_only_when_it_is_asked_for(
    vendor: Any, setting: str, providers: tuple[str, ...]
) -> None:
    assert providers_for(vendor, setting) == providers


def test_a_device_is_the_gpu_where_there_is_one() -> None:
    two = machine(nvidia(H200, gpu("Tesla T4", 14.6, capability=7.5)))
    assert require_device(two, "auto") == "cuda"
    assert require_device(two, "cuda:1") == "cuda:1"
    assert require_device(two, "cpu") == "cpu"
    assert [each.name for each in two.using("cuda:1").gpus] == ["Tesla T4"]
    with pytest.raises(SettingsError, match="there is no cuda:2; known: cuda:0, cuda:1"):
        require_device(two, "cuda:2")


def test_a_gpu_that_is_asked_for_and_not_there_is_refused() -> None:
    with pytest.raises(SettingsError, match="cuda can't be used: there is no GPU here"):
        require_device(machine(CPU_ONLY), "cuda")


def test_on_the_cpu_a_machine_has_no_gpu() -> None:
    used = machine(nvidia(H200)).using("cpu")
    assert (used.vendor, used.gpus, used.unused) == (None, (), "JUBAKO_DEVICE is cpu")
    assert machine(CPU_ONLY).using("cpu").unused == "there is no GPU here"
