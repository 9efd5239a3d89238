"""Engines: what TensorRT or MIGraphX compiles a graph into for one GPU, kept because compiling takes minutes.

``key`` says what an engine depends on, ``record`` what its directory holds; ``store`` builds each engine once
and makes room, by the ``locks``; ``shapes`` tells for which shapes, and ``options`` is all that providers are
told.
"""

from jubako.weights.engines.key import EngineKey, ShapeRange
from jubako.weights.engines.options import migraphx_environment, migraphx_options, tensorrt_options
from jubako.weights.engines.record import EngineRecord
from jubako.weights.engines.shapes import profile_shapes
from jubako.weights.engines.store import Cleared, Engine, EngineStore, Entry, UnknownEngine

__all__ = [
    "Cleared",
    "Engine",
    "EngineKey",
    "EngineRecord",
    "EngineStore",
    "Entry",
    "ShapeRange",
    "UnknownEngine",
    "migraphx_environment",
    "migraphx_options",
    "profile_shapes",
    "tensorrt_options",
]
