"""Reads what detection must know of this machine; ``python -m jubako.probe`` prints it as a line of JSON.

PyTorch and ONNX Runtime are imported inside functions and may be missing or broken. A GPU library that
crashes takes its process along, so whoever has something to lose asks through :func:`signals_apart`.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import functools
import importlib
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jubako.errors import JubakoError
from jubako.hardware import CPU_PROVIDER, CUDA, EVERY_PROVIDER, MIGRAPHX, TENSORRT, Distribution, Gpu, Signals
from jubako.weight_sets import Vendor

__all__ = ["MODEL", "drivers", "main", "own_signals", "preload", "read_signals", "signals_apart"]

# All of them are imported as onnxruntime, so one is to be there.
ONNXRUNTIMES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-migraphx",
    "onnxruntime-rocm",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-training",
)
VISIBLE = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
DEVICE_FILES = ("nvidiactl", "nvidia[0-9]*", "kfd")
LIBRARIES = {TENSORRT: "tensorrt", CUDA: "cuda", MIGRAPHX: "migraphx"}

# One convolution of a picture x of (1, 1, 4, 4), float32, with a kernel of ones: opset 17, no external data.
MODEL = base64.b64decode(
    "CAgSADqaAQoiCgF4CgF3EgF5IgRDb252KhEKBHBhZHNAAUABQAFAAaABBxIFcHJvYmUqMwgBCAEIAwgDEAEiJAAAgD8AAIA/AACAPwAAgD8A"
    "AIA/AACAPwAAgD8AAIA/AACAP0IBd1obCgF4EhYKFAgBEhAKAggBCgIIAQoCCAQKAggEYhsKAXkSFgoUCAESEAoCCAEKAggBCgIIBAoCCARC"
    "BAoAEBE="
)

# TensorRT and MIGraphX take some seconds for the first graph of a process.
SECONDS = 180
MAX_REASON = 300


# By name, since these are not to be imported with this module.
_TORCH, _ONNXRUNTIME = (functools.partial(importlib.import_module, name) for name in ("torch", "onnxruntime"))


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def read_signals(
    *,
    providers: bool = True,
    root: Path = Path("/"),
    version: Callable[[str], str | None] = _version,
    torch: Callable[[], Any] = _TORCH,
    onnxruntime: Callable[[], Any] = _ONNXRUNTIME,
    environ: Mapping[str, str] = os.environ,
) -> Signals:
    """Look at files, packages, PyTorch and ONNX Runtime, and try its providers with a graph if so asked."""
    found = {name: version(name) for name in ONNXRUNTIMES}
    distributions = tuple(Distribution(name=name, version=each) for name, each in found.items() if each)
    return Signals.model_validate(
        {
            "device_files": [
                f"/dev/{file.name}" for name in DEVICE_FILES for file in sorted((root / "dev").glob(name))
            ],
            "kfd": _kfd(root / "sys/class/kfd/kfd/topology/nodes"),
            "visible": {name: environ[name] for name in VISIBLE if name in environ},
            "drivers": drivers(root),
            "onnxruntimes": distributions,
            # PyTorch first: it loads the libraries of CUDA that both are to share.
            **_torch(torch),
            **(_onnxruntime(onnxruntime, providers) if distributions else {}),
        }
    )


def signals_apart(seconds: float = SECONDS) -> Signals:
    """The signals as a process of its own reads them. One that a provider kills is asked again without them.

    JubakoError when none comes to its end.
    """
    try:
        return _asked(seconds)
    except JubakoError as error:
        rest = _asked(seconds, "--without-providers")
        return rest.model_copy(update={"loading": dict.fromkeys(rest.providers, str(error))})


def own_signals() -> Signals:
    """The signals for a process that serves: where there is a GPU, another one tries the providers."""
    signals = read_signals(providers=False)
    return signals_apart() if signals.torch_sees else read_signals()


def preload(onnxruntime: Any) -> None:
    """Load CUDA, cuDNN and TensorRT from their wheels, in whose folders nothing else looks for them."""
    with contextlib.suppress(ImportError, OSError):
        importlib.import_module("tensorrt_libs")
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()


def main() -> None:
    """Print the signals of this machine as one line of JSON; what libraries print goes to standard error."""
    parser = argparse.ArgumentParser(prog="python -m jubako.probe", description=main.__doc__)
    parser.add_argument("--without-providers", action="store_true", help="Try no provider of ONNX Runtime.")
    arguments = parser.parse_args()
    with contextlib.redirect_stdout(sys.stderr):
        signals = read_signals(providers=not arguments.without_providers)
    print(signals.model_dump_json())


def _asked(seconds: float, *arguments: str) -> Signals:
    try:
        done = subprocess.run(
            [sys.executable, "-m", "jubako.probe", *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as error:
        raise JubakoError(f"looking at the hardware took more than {seconds:g} s") from error
    try:
        return Signals.model_validate_json(done.stdout.strip().rpartition("\n")[2])
    except ValidationError as error:
        said = done.stderr.strip().rpartition("\n")[2][:MAX_REASON]
        raise JubakoError(
            f"looking at the hardware ended with exit status {done.returncode}: {said}"
        ) from error


def drivers(root: Path = Path("/")) -> dict[Vendor, str]:
    """The versions of the kernel's drivers."""
    nvidia = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", _text(root / "proc/driver/nvidia/version"))
    amd = _text(root / "sys/module/amdgpu/version").strip()
    found: dict[Vendor, str] = {"nvidia": nvidia[1] if nvidia else "", "amd": amd}
    return {vendor: version for vendor, version in found.items() if version}


def _kfd(nodes: Path) -> dict[str, int] | None:
    """The memory in bytes of the GPUs among the nodes of AMD's kernel driver, by architecture."""
    if not nodes.is_dir():
        return None
    found: dict[str, int] = {}
    for node in sorted(nodes.iterdir()):
        version = _properties(node / "properties").get("gfx_target_version", 0)
        if version:
            banks = [_properties(bank / "properties") for bank in sorted((node / "mem_banks").glob("*"))]
            # Heaps of the types 1 and 2 are the GPU's own memory.
            memory = sum(bank.get("size_in_bytes", 0) for bank in banks if bank.get("heap_type") in {1, 2})
            name = f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"
            found[name] = max(found.get(name, 0), memory)
    return found


def _properties(file: Path) -> dict[str, int]:
    words = [line.split() for line in _text(file).splitlines()]
    return {pair[0]: int(pair[1]) for pair in words if len(pair) == 2 and pair[1].isdigit()}


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _torch(getter: Callable[[], Any]) -> dict[str, Any]:
    """What PyTorch is and sees. It warns, where it does not raise, about drivers that it can't work with."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch = getter()
            hip, cuda = torch.version.hip, torch.version.cuda
            read = {
                "torch_version": str(torch.__version__),
                "torch_build": "rocm" if hip else "cuda" if cuda else "cpu",
                "toolkit": hip or cuda,
            }
        except Exception as error:  # noqa: BLE001 # a broken installation fails in any way
            return {"torch_problem": _reason(error)}
        if read["torch_build"] == "cpu":
            return read
        try:
            vendor: Vendor = "amd" if hip else "nvidia"
            numbers = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
            read["torch_sees"] = tuple(_gpu(torch, number, vendor) for number in numbers)
        except Exception as error:  # noqa: BLE001 # so does a broken driver
            return read | {"torch_problem": _reason(error)}
    told = [_reason(each.message) for each in caught if "initialization" in str(each.message)]
    return read | {"torch_problem": told[0] if told and not read["torch_sees"] else ""}


def _gpu(torch: Any, number: int, vendor: Vendor) -> Gpu:
    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    if vendor == "amd":
        # As gfx942:sramecc+:xnack-
        architecture = properties.gcnArchName.partition(":")[0]
        return Gpu(vendor=vendor, name=properties.name, architecture=architecture, memory=total, free=free)
    capability = float(f"{properties.major}.{properties.minor}")
    return Gpu(vendor=vendor, name=properties.name, compute_capability=capability, memory=total, free=free)


def _onnxruntime(getter: Callable[[], Any], try_them: bool) -> dict[str, Any]:
    try:
        onnxruntime = getter()
        providers = tuple(onnxruntime.get_available_providers())
    except Exception as error:  # noqa: BLE001 # a broken installation fails in any way
        return {"onnxruntime_problem": _reason(error)}
    if not try_them:
        return {"providers": providers}
    preload(onnxruntime)
    tried = [name for name in EVERY_PROVIDER if name in providers]
    return {"providers": providers, "loading": {name: _loading(onnxruntime, name) for name in tried}}


def _loading(onnxruntime: Any, provider: str) -> str:
    """Why the graph does not run on a provider, empty if it does. ONNX Runtime alone would take the CPU."""
    import numpy as np

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if provider != CPU_PROVIDER:
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(MODEL, options, providers=[provider], enable_fallback=0)
        if provider not in session.get_providers():
            return _missing_library(onnxruntime, provider) or "ONNX Runtime left it out without a word"
        (picture,) = session.run(None, {"x": np.ones((1, 1, 4, 4), np.float32)})
    except Exception as error:  # noqa: BLE001 # its exceptions have no class in common but this
        return _missing_library(onnxruntime, provider) or _reason(error)
    return "" if picture[0, 0, 1, 1] == 9 else "a convolution came out wrong"


def _missing_library(onnxruntime: Any, provider: str) -> str:
    """The shared library that a provider lacks, which ONNX Runtime itself tells only to its log."""
    if provider not in LIBRARIES:
        return ""
    name = f"libonnxruntime_providers_{LIBRARIES[provider]}.so"
    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / name))
    except OSError as error:
        missing = re.match(r"(\S+): cannot open shared object file", str(error))
        return f"the library {missing[1]} is missing" if missing and Path(missing[1]).name != name else ""
    return ""


def _reason(error: object) -> str:
    """The first lines of an error's text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MAX_REASON else text[: MAX_REASON - 1] + "…"


if __name__ == "__main__":
    main()
