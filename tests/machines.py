"""Invented machines, as the signals that detection would read there. docs/selection.md lists them."""

from __future__ import annotations

from jubako.hardware import Distribution, Gpu, Signals
from jubako.weight_sets import Vendor

__all__ = ["CPU_ONLY", "MACHINES", "amd", "gpu", "nvidia"]

GIB = 2**30

NVIDIA_PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
AMD_PROVIDERS = ("MIGraphXExecutionProvider", "CPUExecutionProvider")

CPU_ONLY = Signals(
    torch_version="2.13.0+cpu",
    torch_build="cpu",
    onnxruntimes=(Distribution(name="onnxruntime", version="1.32.0"),),
    providers=("AzureExecutionProvider", "CPUExecutionProvider"),
    loading={"CPUExecutionProvider": ""},
)


def gpu(name: str, gib: float, capability: float | None = None, architecture: str | None = None) -> Gpu:
    """A GPU of which half a gigabyte is taken."""
    vendor: Vendor = "amd" if architecture else "nvidia"
    memory = int(gib * GIB)
    return Gpu(
        vendor=vendor,
        name=name,
        compute_capability=capability,
        architecture=architecture,
        memory=memory,
        free=memory - GIB // 2,
    )


def nvidia(*gpus: Gpu, **changes: object) -> Signals:
    """A machine with GPUs of NVIDIA's, and everything installed that they need."""
    well = {
        "torch_version": "2.13.0",
        "torch_build": "cuda",
        "toolkit": "13.0",
        "torch_sees": gpus,
        "device_files": ("/dev/nvidiactl", "/dev/nvidia0"),
        "drivers": {"nvidia": "580.95.05"},
        "onnxruntimes": (Distribution(name="onnxruntime-gpu", version="1.31.1"),),
        "providers": NVIDIA_PROVIDERS,
        "loading": dict.fromkeys(NVIDIA_PROVIDERS, ""),
    }
    return Signals.model_validate(well | changes)


def amd(*gpus: Gpu, **changes: object) -> Signals:
    """A machine with GPUs of AMD's, and everything installed that they need."""
    well = {
        "torch_version": "2.13.0+rocm7.1",
        "torch_build": "rocm",
        "toolkit": "7.1.25424",
        "torch_sees": gpus,
        "device_files": ("/dev/kfd",),
        "kfd": {each.architecture: each.memory for each in gpus},
        "drivers": {"amd": "6.16.6"},
        "onnxruntimes": (Distribution(name="onnxruntime-migraphx", version="1.27.1"),),
        "providers": AMD_PROVIDERS,
        "loading": dict.fromkeys(AMD_PROVIDERS, ""),
    }
    return Signals.model_validate(well | changes)


H200 = gpu("NVIDIA H200", 139.8, capability=9.0)
RTX_4090 = gpu("NVIDIA GeForce RTX 4090", 23.5, capability=8.9)
RX_7900 = gpu("AMD Radeon RX 7900 XTX", 24, architecture="gfx1100")
BOTH = ("/dev/nvidiactl", "/dev/nvidia0", "/dev/kfd")

# What PyTorch says where the driver is too old, in short.
TOO_OLD = "CUDA initialization: The NVIDIA driver on your system is too old (found version 12020)."

MACHINES: dict[str, Signals] = {
    "no GPU": CPU_ONLY,
    "H200": nvidia(H200),
    "RTX 4090": nvidia(RTX_4090),
    "L4": nvidia(gpu("NVIDIA L4", 22.0, capability=8.9)),
    "T4": nvidia(gpu("Tesla T4", 14.6, capability=7.5)),
    "MI300X": amd(gpu("AMD Instinct MI300X", 192, architecture="gfx942")),
    "RX 7900 XTX": amd(RX_7900),
    "RTX 4090 and RX 7900 XTX, PyTorch for CUDA": nvidia(
        RTX_4090, device_files=BOTH, kfd={"gfx1100": RX_7900.memory}
    ),
    "RTX 4090 and RX 7900 XTX, PyTorch for ROCm": amd(RX_7900, device_files=BOTH),
    "RTX 4090 and RX 7900 XTX, PyTorch for CPUs": CPU_ONLY.model_copy(
        update={"device_files": BOTH, "kfd": {"gfx1100": RX_7900.memory}}
    ),
    "H200, driver 535 and PyTorch for CUDA 13": nvidia(
        torch_problem=TOO_OLD,
        drivers={"nvidia": "535.183.01"},
        loading={
            "TensorrtExecutionProvider": "CUDA driver version is insufficient for CUDA runtime version",
            "CUDAExecutionProvider": "CUDA driver version is insufficient for CUDA runtime version",
            "CPUExecutionProvider": "",
        },
    ),
    "H200, onnxruntime for CPUs": nvidia(
        H200,
        onnxruntimes=CPU_ONLY.onnxruntimes,
        providers=CPU_ONLY.providers,
        loading=CPU_ONLY.loading,
    ),
}
