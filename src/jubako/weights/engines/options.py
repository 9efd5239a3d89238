"""What ONNX Runtime's providers are told about an engine's directory. None of it was run on a GPU.

The TensorRT provider takes True and False as words only: for 1 it raises, and without its guard ONNX Runtime
then goes on with a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jubako.weight_sets import Precision
from jubako.weights.engines.key import ShapeRange

__all__ = ["migraphx_environment", "migraphx_options", "tensorrt_options"]

# What TensorRT may choose beside float32. There is no option for float8: such graphs name it themselves.
_PRECISION_OPTIONS: Mapping[Precision, str] = {
    "float16": "trt_fp16_enable",
    "mixed": "trt_fp16_enable",
    "bfloat16": "trt_bf16_enable",
}


def tensorrt_options(
    directory: Path, shapes: Mapping[str, ShapeRange], precision: Precision
) -> dict[str, str]:
    """Options of the TensorRT provider: engines in this directory, for these shapes by the graph's input."""
    options = {
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(directory),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(directory),
    }
    if shapes:
        options |= {
            "trt_profile_min_shapes": _words({name: each.least for name, each in shapes.items()}),
            "trt_profile_opt_shapes": _words({name: each.best for name, each in shapes.items()}),
            "trt_profile_max_shapes": _words({name: each.most for name, each in shapes.items()}),
        }
    if enabled := _PRECISION_OPTIONS.get(precision):
        options[enabled] = "True"
    return options


def migraphx_options(directory: Path) -> dict[str, str]:
    """Options of the MIGraphX provider; set ``migraphx_environment`` as well."""
    return {"migraphx_model_cache_dir": str(directory)}


def migraphx_environment(directory: Path) -> dict[str, str]:
    """Environment variables to set before a session is made: not every release heeds the option."""
    return {"ORT_MIGRAPHX_MODEL_CACHE_PATH": str(directory)}


def _words(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """As in ``sample:1x4x64x64,timestep:1``."""
    return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())
