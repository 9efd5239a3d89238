"""What is read of a machine: of this one as it is, of others from folders and stand-ins for libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jubako.errors import JubakoError
from jubako.hardware import Distribution, Gpu, Signals, machine
from jubako.probe import MODEL, read_signals, signals_apart

GIB = 2**30
OPEN_DRIVER = (
    "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.95.05  Release Build  (dvs-builder)\n"
)
OLD_DRIVER = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n"


def fail(words: str) -> Callable[[], Any]:
    def getter() -> Any:
        raise ImportError(words)

    return getter


def signals(root: Path, **changes: Any) -> Signals:
    """What is read below a folder, without any package but those given."""
    bare: dict[str, Any] = {"version": lambda _: None, "torch": fail("no torch"), "onnxruntime": fail("none")}
    return read_signals(root=root, environ={}, **bare | changes)


def write(file: Path, text: str = "") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")


class FakeTorch:
    """PyTorch as far as it is read: a build and the GPUs that it sees."""

    def __init__(
        self, *gpus: Any, hip: str | None = None, cuda: str | None = None, warning: str = ""
    ) -> None:
        self.__version__ = "2.13.0"
        self.version = SimpleNamespace(hip=hip, cuda=cuda)
        self.cuda = self
        self._gpus = gpus
        self._warning = warning

    def is_available(self) -> bool:
        if self._warning:
            warnings.warn(self._warning, stacklevel=1)
        return bool(self._gpus)

    def device_count(self) -> int:
        return len(self._gpus)

    def get_device_properties(self, number: int) -> Any:
        return self._gpus[number]

    def mem_get_info(self, number: int) -> tuple[int, int]:
        return 7 * GIB, 8 * GIB


def test_this_machine_s_packages_are_read_and_the_cpu_runs_the_graph() -> None:
    found = read_signals()
    torch = metadata.version("torch")
    assert found.torch_version == torch
    assert found.torch_build is not None
    assert found.torch_problem == ""
    assert Distribution(name="onnxruntime", version=metadata.version("onnxruntime")) in found.onnxruntimes
    assert found.loading["CPUExecutionProvider"] == ""
    assert set(found.loading) <= set(found.providers)
    assert machine(found).providers["CPUExecutionProvider"] == ""


def test_the_command_prints_the_signals_as_one_line_of_json() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "jubako.probe"], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout.count("\n") == 1
    printed, here = Signals.model_validate_json(done.stdout), read_signals()
    assert printed.loading == here.loading
    assert (printed.torch_version, printed.onnxruntimes) == (here.torch_version, here.onnxruntimes)


def test_unless_asked_no_provider_is_tried() -> None:
    found = read_signals(providers=False)
    assert found.loading == {}
    assert "CPUExecutionProvider" in found.providers


def test_the_graph_is_a_valid_one() -> None:
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(MODEL)
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Conv"]


def test_a_machine_without_anything_is_read_too(tmp_path: Path) -> None:
    assert signals(tmp_path) == Signals(torch_problem="no torch")


@pytest.mark.parametrize(("text", "version"), [(OPEN_DRIVER, "580.95.05"), (OLD_DRIVER, "535.183.01")])
def test_nvidia_s_device_files_and_driver_are_read(tmp_path: Path, text: str, version: str) -> None:
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm", "null"):
        write(tmp_path / "dev" / name)
    write(tmp_path / "proc/driver/nvidia/version", text)
    found = signals(tmp_path)
    assert found.device_files == ("/dev/nvidiactl", "/dev/nvidia0", "/dev/nvidia1")
    assert found.drivers == {"nvidia": version}


def test_amd_s_device_file_driver_and_gpus_are_read(tmp_path: Path) -> None:
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    write(tmp_path / "dev/kfd")
    write(tmp_path / "sys/module/amdgpu/version", "6.16.6\n")
    write(nodes / "0/properties", "cpu_cores_count 32\nsimd_count 0\ngfx_target_version 0\n")
    for node, version, size in ((1, 90402, 192 * GIB), (2, 90010, 64 * GIB), (3, 100306, GIB // 2)):
        write(nodes / f"{node}/properties", f"cpu_cores_count 0\ngfx_target_version {version}\n")
        write(nodes / f"{node}/mem_banks/0/properties", f"heap_type 1\nsize_in_bytes {size}\n")
        write(nodes / f"{node}/mem_banks/1/properties", "heap_type 0\nsize_in_bytes 9999999999\n")
    found = signals(tmp_path)
    assert found.device_files == ("/dev/kfd",)
    assert found.drivers == {"amd": "6.16.6"}
    assert found.kfd == {"gfx942": 192 * GIB, "gfx90a": 64 * GIB, "gfx1036": GIB // 2}


def test_variables_that_hide_gpus_are_read(tmp_path: Path) -> None:
    environ = {"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": "1", "PATH": "/bin"}
    found = read_signals(root=tmp_path, version=lambda _: None, torch=fail("-"), environ=environ)
    assert found.visible == {"CUDA_VISIBLE_DEVICES": "", "ROCR_VISIBLE_DEVICES": "1"}


def test_nvidia_s_gpus_are_read_from_pytorch(tmp_path: Path) -> None:
    torch = FakeTorch(SimpleNamespace(name="NVIDIA L4", major=8, minor=9), cuda="13.0")
    found = signals(tmp_path, torch=lambda: torch)
    assert (found.torch_build, found.toolkit) == ("cuda", "13.0")
    assert found.torch_sees == (
        Gpu(vendor="nvidia", name="NVIDIA L4", compute_capability=8.9, memory=8 * GIB, free=7 * GIB),
    )


def test_amd_s_gpus_are_read_from_pytorch(tmp_path: Path) -> None:
    mi300 = SimpleNamespace(
        name="AMD Instinct MI300X", gcnArchName="gfx942:sramecc+:xnack-", major=9, minor=4
    )
    found = signals(tmp_path, torch=lambda: FakeTorch(mi300, hip="7.1.25424"))
    assert (found.torch_build, found.toolkit) == ("rocm", "7.1.25424")
    (gpu,) = found.torch_sees
    assert (gpu.vendor, gpu.architecture, gpu.compute_capability) == ("amd", "gfx942", None)


def test_what_pytorch_warns_of_is_read(tmp_path: Path) -> None:
    words = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020)."
    found = signals(tmp_path, torch=lambda: FakeTorch(cuda="13.0", warning=words))
    assert (found.torch_build, found.torch_sees, found.torch_problem) == ("cuda", (), words)


def test_a_gpu_that_fails_is_told(tmp_path: Path) -> None:
    class Broken(FakeTorch):
        def mem_get_info(self, number: int) -> tuple[int, int]:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable\nCompile with …")

    found = signals(tmp_path, torch=lambda: Broken(SimpleNamespace(name="x", major=9, minor=0), cuda="13.0"))
    assert found.torch_sees == ()
    assert found.torch_problem.startswith(
        "CUDA error: all CUDA-capable devices are busy or unavailable Compile"
    )


def test_every_distribution_of_onnxruntime_is_found(tmp_path: Path) -> None:
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.1"}
    found = signals(tmp_path, version=versions.get, onnxruntime=fail("No module named 'onnxruntime.capi'"))
    assert [each.name for each in found.onnxruntimes] == list(versions)
    assert found.onnxruntime_problem == "No module named 'onnxruntime.capi'"


def test_a_provider_that_onnxruntime_would_replace_by_the_cpu_does_not_pass(tmp_path: Path) -> None:
    """The real ONNX Runtime, which here says that it has a provider that it does not have."""
    import onnxruntime  # type: ignore[import-untyped] # publishes no types

    class Boastful:
        def __getattr__(self, name: str) -> Any:
            return getattr(onnxruntime, name)

        def get_available_providers(self) -> list[str]:
            return ["CUDAExecutionProvider", "CPUExecutionProvider"]

    versions = {"onnxruntime-gpu": "1.31.1"}
    with pytest.warns(UserWarning, match="not in available provider names"):
        found = signals(tmp_path, version=versions.get, onnxruntime=Boastful)
    assert "fallback to CPU EP has been explicitly disabled" in found.loading["CUDAExecutionProvider"]
    assert found.loading["CPUExecutionProvider"] == ""


def test_a_library_that_a_provider_lacks_is_named(tmp_path: Path) -> None:
    """A provider whose shared library wants another one, as those of the wheels do on a host without CUDA."""
    capi = tmp_path / "onnxruntime/capi"
    capi.mkdir(parents=True)
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    (capi / "empty.c").touch()
    absent, provider = "libabsent.so.13", "libonnxruntime_providers_cuda.so"
    for line in (
        ["cc", "-shared", "empty.c", "-o", absent, f"-Wl,-soname,{absent}"],
        ["cc", "-shared", "empty.c", "-o", provider, "-Wl,--no-as-needed", f"./{absent}"],
    ):
        subprocess.run(line, cwd=capi, check=True)
    (capi / absent).unlink()

    class Broken:
        __file__ = str(tmp_path / "onnxruntime/__init__.py")

        class SessionOptions:
            def add_session_config_entry(self, *_: str) -> None: ...

        def InferenceSession(self, *_: Any, **__: Any) -> Any:  # noqa: N802 # the library's name
            raise RuntimeError("Please install all dependencies")

        def get_available_providers(self) -> list[str]:
            return ["CUDAExecutionProvider"]

    found = signals(tmp_path, version={"onnxruntime-gpu": "1.31.1"}.get, onnxruntime=Broken)
    assert found.loading == {"CUDAExecutionProvider": "the library libabsent.so.13 is missing"}


def test_a_provider_that_kills_the_process_does_not_hide_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An onnxruntime whose sessions abort, in front of the real one on the path of the other process."""
    write(
        tmp_path / "onnxruntime.py",
        "import os\n"
        "class SessionOptions:\n"
        "    def add_session_config_entry(self, *_): pass\n"
        "def get_available_providers(): return ['CUDAExecutionProvider']\n"
        "def InferenceSession(*_, **__): os.abort()\n",
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    found = signals_apart()
    assert found.torch_version == metadata.version("torch")
    assert list(found.loading) == ["CUDAExecutionProvider"]
    assert "exit status -6" in found.loading["CUDAExecutionProvider"]


def test_a_process_that_never_ends_well_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "torch.py", "import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, sys.path)]))
    with pytest.raises(JubakoError, match="looking at the hardware ended with exit status 3"):
        signals_apart()


def test_a_process_that_takes_too_long_is_an_error() -> None:
    with pytest.raises(JubakoError, match=r"took more than 0\.01 s"):
        signals_apart(seconds=0.01)
