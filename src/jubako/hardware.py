"""What this machine can run: its GPUs, whose they are, what ONNX Runtime can run there, and what to mend.

Nothing here looks at the machine: ``jubako.probe`` reads the signals, from which everything follows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict

from jubako.settings import SettingsError
from jubako.weight_sets import Vendor

__all__ = [
    "CPU_PROVIDER",
    "CUDA",
    "EVERY_PROVIDER",
    "MIGRAPHX",
    "NAMES",
    "PROVIDERS",
    "TENSORRT",
    "VENDORS",
    "Distribution",
    "Gpu",
    "Machine",
    "Signals",
    "machine",
    "provider_problem",
    "providers_for",
    "require_device",
]

VENDORS: tuple[Vendor, ...] = ("nvidia", "amd")
NAMES: Mapping[Vendor, str] = {"nvidia": "NVIDIA", "amd": "AMD"}

CPU_PROVIDER = "CPUExecutionProvider"
TENSORRT, CUDA, MIGRAPHX = "TensorrtExecutionProvider", "CUDAExecutionProvider", "MIGraphXExecutionProvider"

# What graphs run on, by the vendor who made them and the setting; the one to prefer first.
PROVIDERS: Mapping[Vendor, Mapping[str, tuple[str, ...]]] = {
    "nvidia": {
        "auto": (TENSORRT, CUDA),
        "tensorrt": (TENSORRT, CUDA),
        "cuda": (CUDA,),
        "cpu": (CPU_PROVIDER,),
    },
    "amd": {"auto": (MIGRAPHX,), "migraphx": (MIGRAPHX,), "cpu": (CPU_PROVIDER,)},
}

Build = Literal["cpu", "cuda", "rocm"]
EVERY_PROVIDER = (TENSORRT, CUDA, MIGRAPHX, CPU_PROVIDER)

BUILDS: Mapping[Vendor, Build] = {"nvidia": "cuda", "amd": "rocm"}
BUILD_NAMES: Mapping[Build, str] = {"cpu": "CPUs", "cuda": "NVIDIA (CUDA)", "rocm": "AMD (ROCm)"}
DISTRIBUTIONS: Mapping[Vendor, str] = {"nvidia": "onnxruntime-gpu", "amd": "onnxruntime-migraphx"}

# The oldest NVIDIA driver for each major version of CUDA.
DRIVERS: Mapping[str, int] = {"13": 580, "12": 525, "11": 450}

# The kernel's driver lists the graphics part of a processor too; with so little memory of its own, bytes,
# nobody means to serve from it.
LEAST_MEMORY = 4 * 10**9


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Gpu(_Value):
    """A GPU that PyTorch sees. ``memory`` and ``free`` are bytes, the architecture is AMD's (gfx942)."""

    vendor: Vendor
    name: str
    compute_capability: float | None = None
    architecture: str | None = None
    memory: int
    free: int


class Distribution(_Value):
    """An installed package: its name and version."""

    name: str
    version: str


class Signals(_Value):
    """Everything that detection reads.

    ``torch_build`` is None where PyTorch can't be imported, ``toolkit`` its version of CUDA or HIP, and
    ``torch_problem`` its words about what is wrong. ``device_files`` are hints only. ``kfd`` has the bytes of
    memory of the GPUs that AMD's kernel driver lists, by architecture, None where that can't be read.
    ``visible`` has the variables that hide GPUs from libraries. ``providers`` are those that ONNX Runtime
    was compiled with; ``loading`` has for each one tried why a tiny graph did not run, empty if it did.
    """

    torch_version: str | None = None
    torch_build: Build | None = None
    toolkit: str | None = None
    torch_sees: tuple[Gpu, ...] = ()
    torch_problem: str = ""
    device_files: tuple[str, ...] = ()
    kfd: Mapping[str, int] | None = None
    visible: Mapping[str, str] = {}
    drivers: Mapping[Vendor, str] = {}
    onnxruntimes: tuple[Distribution, ...] = ()
    onnxruntime_problem: str = ""
    providers: tuple[str, ...] = ()
    loading: Mapping[str, str] = {}


class Machine(_Value):
    """What is used here, and what a person must mend.

    ``vendor`` is the one whose GPUs PyTorch sees; None, and ``unused`` says why, when it sees none.
    ``present`` are the vendors of whom there is a GPU, seen or not. ``providers`` has for each execution
    provider why it does not run here, empty if it does.
    """

    vendor: Vendor | None = None
    gpus: tuple[Gpu, ...] = ()
    present: tuple[Vendor, ...] = ()
    unused: str = ""
    providers: Mapping[str, str] = {}
    problems: tuple[str, ...] = ()

    def using(self, device: str) -> Self:
        """The machine as a setting of the device leaves it: without its GPUs, or with one of them first.

        The device is as :func:`require_device` gives it.
        """
        if not device.startswith("cuda"):
            unused = f"JUBAKO_DEVICE is {device}" if self.vendor else self.unused
            return self.model_copy(update={"vendor": None, "gpus": (), "unused": unused})
        return self.model_copy(update={"gpus": self.gpus[_index(device) :]})


def machine(signals: Signals) -> Machine:
    """What follows from the signals."""
    vendor = signals.torch_sees[0].vendor if signals.torch_sees else None
    present = tuple(
        each for each in VENDORS if each == vendor or (_hinted(signals, each) and not _hidden(signals, each))
    )
    unused = "" if vendor else _unused(signals, present)
    providers = {name: _not_running(signals, name, vendor) for name in EVERY_PROVIDER}
    problems = [unused] if present or signals.torch_build is None else []
    problems += _onnxruntime_problems(signals, vendor, present, providers)
    return Machine(
        vendor=vendor,
        gpus=signals.torch_sees,
        present=present,
        unused=unused,
        providers=providers,
        problems=tuple(filter(None, problems)),
    )


def providers_for(vendor: Vendor, setting: str) -> tuple[str, ...]:
    """What runs a vendor's graphs with a setting, the one to prefer first; empty: it is none for them."""
    return PROVIDERS[vendor].get(setting, ())


def provider_problem(machine: Machine, vendor: Vendor, setting: str) -> str | None:
    """Why graphs of the vendor don't run here with a setting of the execution provider, None if they do."""
    providers = providers_for(vendor, setting)
    if not providers:
        known = ", ".join(PROVIDERS[vendor])
        return f"JUBAKO_EXECUTION_PROVIDER is {setting}; for graphs of {NAMES[vendor]}: {known}"
    if providers != (CPU_PROVIDER,) and machine.vendor != vendor:
        return _not_in_use(machine, vendor)
    problems = [(name, machine.providers.get(name, "it was not tried")) for name in providers]
    return next((f"{name} does not run: {reason}" for name, reason in problems if reason), None)


def _not_in_use(machine: Machine, vendor: Vendor) -> str:
    """Why there is no GPU of the vendor's to run graphs on."""
    if machine.present and vendor not in machine.present:
        return f"there is no GPU of {NAMES[vendor]} here"
    if machine.vendor is not None:
        return f"PyTorch uses the GPU of {NAMES[machine.vendor]}"
    return machine.unused or "there is no GPU here"


def require_device(machine: Machine, setting: str) -> str:
    """The torch device of a setting; ``auto`` is the GPU, or the CPU of a machine without one.

    SettingsError when there is a GPU that PyTorch can't use, or none of that number: a CPU must be asked for.
    """
    if setting == "auto":
        if machine.vendor is None and machine.present:
            raise SettingsError(f"JUBAKO_DEVICE: {machine.unused}; to run on the CPU, set JUBAKO_DEVICE=cpu")
        return "cuda" if machine.vendor else "cpu"
    if setting.startswith("cuda"):
        if machine.vendor is None:
            raise SettingsError(f"JUBAKO_DEVICE: {setting} can't be used: {machine.unused}")
        if _index(setting) >= len(machine.gpus):
            known = ", ".join(f"cuda:{number}" for number in range(len(machine.gpus)))
            raise SettingsError(f"JUBAKO_DEVICE: there is no {setting}; known: {known}")
    return setting


def _index(device: str) -> int:
    number = device.partition(":")[2]
    return int(number) if number.isdigit() else 0


def _hinted(signals: Signals, vendor: Vendor) -> bool:
    """Whether the system shows a GPU of the vendor's, be it of use to PyTorch or not."""
    if vendor == "nvidia":
        return any(file.startswith("/dev/nvidia") for file in signals.device_files)
    if "/dev/kfd" not in signals.device_files:
        return False
    return signals.kfd is None or any(memory >= LEAST_MEMORY for memory in signals.kfd.values())


def _hidden(signals: Signals, vendor: Vendor) -> bool:
    """Whether somebody hid all GPUs of the vendor's on purpose."""
    names = ["CUDA_VISIBLE_DEVICES"]
    if vendor == "amd":
        names += ["HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"]
    return any(signals.visible.get(name, "0").strip() in {"", "-1"} for name in names)


def _unused(signals: Signals, present: tuple[Vendor, ...]) -> str:
    """Why PyTorch uses no GPU, with what to do about it where there is one."""
    if signals.torch_build is None:
        return f"PyTorch can't be imported ({signals.torch_problem or 'not installed'}): run scripts/setup"
    if not present:
        hidden = [name for name, value in signals.visible.items() if value.strip() in {"", "-1"}]
        return f"{' and '.join(hidden)} hides all GPUs" if hidden else "there is no GPU here"
    names = " and ".join(NAMES[each] for each in present)
    fitting = [each for each in present if BUILDS[each] == signals.torch_build]
    if not fitting:
        remedies = ", or ".join(_remedy(each, "torch") for each in present)
        built = BUILD_NAMES[signals.torch_build]
        those = f"is a GPU of {names}" if len(present) == 1 else f"are GPUs of {names}"
        return f"there {those}, but PyTorch is built for {built}: {remedies}"
    (vendor,) = fitting
    if old := _old_driver(signals, vendor):
        return old
    words = f" ({signals.torch_problem})" if signals.torch_problem else ""
    tool, toolkit = ("nvidia-smi", "CUDA") if vendor == "nvidia" else ("rocminfo", "ROCm")
    return (
        f"there is a GPU of {NAMES[vendor]}, but PyTorch {signals.torch_version} does not see it{words}: see "
        f"that {tool} lists it for this user and in this container, with a driver for {toolkit} "
        f"{signals.toolkit}"
    )


def _remedy(vendor: Vendor | None, *replaced: str) -> str:
    """The command that installs what is for the vendor, for None what is for machines without a GPU."""
    hardware = vendor or "cpu"
    own = f"pip install 'jubako[{hardware}]'"
    if "torch" in replaced and vendor == "amd":
        own = f"PyTorch for ROCm as https://pytorch.org says, then {own}"
    gone = f"pip uninstall -y {' '.join(replaced)}, then " if replaced else ""
    return f"run scripts/serve --hardware {hardware} (in an environment of your own: {gone}{own})"


def _old_driver(signals: Signals, vendor: Vendor) -> str:
    driver, toolkit = signals.drivers.get(vendor, ""), signals.toolkit or ""
    least = DRIVERS.get(toolkit.partition(".")[0], 0) if vendor == "nvidia" else 0
    major = re.match(r"\d+", driver)
    if major is None or int(major[0]) >= least:
        return ""
    return (
        f"there is a GPU of NVIDIA, but its driver {driver} is too old for CUDA {toolkit}, which PyTorch "
        f"{signals.torch_version} is built with: install driver {least} or newer"
    )


def _not_running(signals: Signals, name: str, vendor: Vendor | None) -> str:
    """Why an execution provider does not run here, empty if it does."""
    installed = signals.onnxruntimes
    owner = next((each for each in VENDORS if name in PROVIDERS[each]["auto"]), vendor)
    if not installed:
        return f"ONNX Runtime is not installed: {_remedy(owner)}"
    if signals.onnxruntime_problem:
        return f"ONNX Runtime can't be imported ({signals.onnxruntime_problem})"
    if name not in signals.providers:
        names = [each.name for each in installed]
        return f"{' and '.join(names)} is built without it: {_remedy(owner, *names)}"
    return signals.loading.get(name, "it was not tried")


def _onnxruntime_problems(
    signals: Signals, vendor: Vendor | None, present: tuple[Vendor, ...], providers: Mapping[str, str]
) -> list[str]:
    """What is wrong with ONNX Runtime, of which one distribution is needed: the one for the vendor."""
    names = [each.name for each in signals.onnxruntimes]
    owner = vendor or (present[0] if len(present) == 1 else None)
    remedy = _remedy(owner, *names)
    if len(names) > 1:
        return [f"{' and '.join(names)} are installed at once and overwrite each other's files: {remedy}"]
    if signals.onnxruntime_problem:
        return [f"ONNX Runtime can't be imported ({signals.onnxruntime_problem}): {remedy}"]
    if vendor is None:
        return []
    for_whom = f"weights of {NAMES[vendor]}"
    if not names:
        return [f"ONNX Runtime, which runs {for_whom}, is not installed: {remedy}"]
    if names != [DISTRIBUTIONS[vendor]] and not set(PROVIDERS[vendor]["auto"]) <= set(signals.providers):
        return [f"{names[0]} is installed, but {for_whom} need {DISTRIBUTIONS[vendor]}: {remedy}"]
    return [
        f"{name}, which runs {for_whom}, does not load: {providers[name]}"
        for name in PROVIDERS[vendor]["auto"]
        if providers[name]
    ]
