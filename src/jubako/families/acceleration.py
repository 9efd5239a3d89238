"""How the standard weights run fast in PyTorch: options that can each be switched off alone.

``acceleration_for`` reads the setting, ``in_effect`` applies what belongs to the whole process and
``accelerate`` what belongs to a module, when it has been read and before anybody shares it. The table of the
options in ``docs/acceleration.md`` is checked against ``OPTIONS``.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from jubako.families.float8 import to_float8
from jubako.families.fused import fuse

__all__ = [
    "OPTIONS",
    "Acceleration",
    "Option",
    "accelerate",
    "acceleration_for",
    "attention_order",
    "in_effect",
    "uncompiled",
]

DENOISERS = ("unet", "transformer")

# What a denoiser or an autoencoder repeats, so that one compilation serves many of its modules.
REPEATED = {
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "ResnetBlock2D",
    "TemporalBasicTransformerBlock",
}

# A UNet has a dozen widths of one block, each in a few row counts; PyTorch gives up after 8 by default.
COMPILATIONS = 64


@dataclass(frozen=True)
class Acceleration:
    """What is on; every field is an option of ``OPTIONS``. As it is made, all is off."""

    channels_last: bool = False
    fused_qkv: bool = False
    attention: Literal["off", "fastest", "cudnn", "flash", "efficient", "math"] = "off"
    tf32: bool = False
    tuned_convolutions: bool = False
    compile: Literal["off", "blocks", "whole"] = "off"
    warm_up: bool = False
    row_buckets: bool = False
    cuda_graphs: bool = False
    float8: bool = False

    def on(self, option: Option) -> bool:
        """Whether an option is on."""
        return getattr(self, option.field) not in {False, "off"}


@dataclass(frozen=True)
class Option:
    """One option: its word, what it can be beside off (the usual one first), where it is on by default."""

    word: str
    choices: tuple[str, ...] = ()
    on_gpu: bool = False
    gpu_only: bool = False
    lossy: bool = False

    @property
    def field(self) -> str:
        """Its name in an :class:`Acceleration`."""
        return self.word.replace("-", "_")


OPTIONS = (
    Option("channels-last", on_gpu=True),
    Option("fused-qkv", on_gpu=True),
    Option("attention", ("fastest", "cudnn", "flash", "efficient", "math"), on_gpu=True, gpu_only=True),
    Option("tf32", on_gpu=True, gpu_only=True),
    Option("tuned-convolutions", gpu_only=True),
    Option("compile", ("blocks", "whole"), on_gpu=True),
    Option("warm-up", on_gpu=True),
    Option("row-buckets"),
    Option("cuda-graphs", gpu_only=True),
    Option("float8", lossy=True),
)


def acceleration_for(device_type: Literal["cpu", "cuda"], words: tuple[str, ...] = ()) -> Acceleration:
    """What the words of the setting ask for on a device, from left to right over its defaults.

    ``none`` switches all off, a word one on, ``no-`` before it one off, ``=`` behind it takes a choice.
    Anything else is a ValueError that lists what there is; so is an option that a CPU has not.
    """
    wanted = Acceleration()
    if device_type != "cpu":
        for option in OPTIONS:
            if option.on_gpu:
                wanted = replace(wanted, **_value(option, ""))
    for word in words:
        wanted = Acceleration() if word == "none" else replace(wanted, **_switched(word, device_type))
    return wanted


def _switched(word: str, device_type: str) -> dict[str, Any]:
    name, _, choice = word.removeprefix("no-").partition("=")
    off = word.startswith("no-")
    option = next((option for option in OPTIONS if option.word == name), None)
    known = "=" not in word or (option is not None and choice in option.choices and not off)
    if option is None or not known:
        raise ValueError(f"{word!r} is none; there are: {', '.join(_words())}")
    if off:
        return {option.field: "off" if option.choices else False}
    if option.gpu_only and device_type == "cpu":
        raise ValueError(f"{word!r} needs a GPU, and this device is a CPU; leave it out")
    return _value(option, choice)


def _value(option: Option, choice: str) -> dict[str, Any]:
    return {option.field: choice or option.choices[0] if option.choices else True}


def _words() -> Iterator[str]:
    yield "none"
    for option in OPTIONS:
        yield option.word
        yield from (f"{option.word}={choice}" for choice in option.choices[1:])
        yield f"no-{option.word}"


def accelerate(module: torch.nn.Module, name: str, acceleration: Acceleration) -> torch.nn.Module:
    """The module of that name in a pipeline, made fast; it is changed in place, so nobody may share it yet.

    Only denoisers and autoencoders are touched. But for float8, what comes out differs by rounding.
    """
    if name not in {*DENOISERS, "vae"}:
        return module
    if acceleration.fused_qkv:
        fuse(module)
    if acceleration.channels_last and name != "transformer":
        _to_channels_last(module)
    if acceleration.float8 and name in DENOISERS:
        to_float8(module)
    if acceleration.compile != "off":
        _compile(module, acceleration.compile)
    return module


def uncompiled(module: torch.nn.Module) -> bool:
    """Take back what ``accelerate`` compiled of a module; whether there was something."""
    compiled = [part for part in module.modules() if part._compiled_call_impl is not None]  # noqa: SLF001 # no other way
    for part in compiled:
        part._compiled_call_impl = None  # noqa: SLF001 # as above
    return bool(compiled)


def _to_channels_last(module: torch.nn.Module) -> None:
    """Lay out the weights of two-dimensional convolutions; what flows through them follows."""
    for part in module.modules():
        if isinstance(part, torch.nn.Conv2d):
            part.weight.data = part.weight.data.contiguous(memory_format=torch.channels_last)


def _compile(module: torch.nn.Module, extent: Literal["blocks", "whole"]) -> None:
    """Have it compiled when it is first called. Of an autoencoder, the decoder, which every picture takes."""
    module = getattr(module, "decoder", module)
    options: dict[str, Any] = {"fullgraph": True}
    if "recompile_limit" in inspect.signature(torch.compile).parameters:
        options["recompile_limit"] = COMPILATIONS
    if extent == "whole":
        # CUDA graphs are an option of their own, so that they can be measured alone.
        module.compile(**options, mode="max-autotune-no-cudagraphs", dynamic=False)
        return
    for part in module.modules():
        if type(part).__name__ in REPEATED:
            # Row counts and sizes become variables as soon as a second one comes.
            part.compile(**options)


@contextmanager
def in_effect(
    acceleration: Acceleration, device: torch.device, compiled: Path | None = None
) -> Iterator[None]:
    """Set what holds for the whole process, for as long as the context lasts.

    That is the order of attention's kernels, the precision of float32 on matrix units, the tuning of
    convolutions, and the folder in which compiled kernels outlive the process. Without ``tf32`` float32 is
    float32 everywhere, also in convolutions, where PyTorch's own default is TF32.
    """
    with ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(_float32_as(acceleration.tf32))
            stack.enter_context(_convolutions(acceleration.tuned_convolutions))
            if acceleration.attention != "off":
                order = attention_order(acceleration.attention, device)
                stack.enter_context(sdpa_kernel(order, set_priority=True))
        if acceleration.compile != "off" and compiled is not None:
            stack.enter_context(_kept_in(compiled))
        yield


def attention_order(choice: str, device: torch.device) -> list[SDPBackend]:
    """The kernels to try, the first that takes the shapes is used; the rest stand behind the chosen one.

    The fastest is cuDNN's from Hopper on, which PyTorch's own flash attention was not written for, and flash
    attention on older GPUs and on AMD's, which have no cuDNN.
    """
    order = [
        SDPBackend.FLASH_ATTENTION,
        SDPBackend.CUDNN_ATTENTION,
        SDPBackend.EFFICIENT_ATTENTION,
        SDPBackend.MATH,
    ]
    if choice == "fastest":
        hopper = torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
        choice = "cudnn" if hopper else "flash"
    first = {"cudnn": 1, "flash": 0, "efficient": 2, "math": 3}[choice]
    return [order[first], *order[:first], *order[first + 1 :]]


@contextmanager
def _float32_as(tf32: bool) -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = tf32, tf32
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


@contextmanager
def _convolutions(tuned: bool) -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = tuned
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


@contextmanager
def _kept_in(folder: Path) -> Iterator[None]:
    """Compiled kernels are kept in this folder, unless the environment names another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    wanted = {"TORCHINDUCTOR_CACHE_DIR": str(folder), "TORCHINDUCTOR_FX_GRAPH_CACHE": "1"}
    # The compiler writes its own default into the environment; that is nobody's wish.
    unset = {None, default_cache_dir()}
    own = {name: value for name, value in wanted.items() if os.environ.get(name) in unset}
    os.environ.update(own)
    try:
        yield
    finally:
        for name in own:
            del os.environ[name]
