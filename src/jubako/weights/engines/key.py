"""What an engine depends on: with any one of these facts changed it is another engine, or would not load."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

__all__ = ["EngineKey", "ShapeRange"]


class ShapeRange(NamedTuple):
    """The shapes of one input that an engine takes: from ``least`` to ``most``, fastest at ``best``."""

    least: tuple[int, ...]
    best: tuple[int, ...]
    most: tuple[int, ...]


class EngineKey(BaseModel):
    """All facts that an engine was built from; ``digest`` names its directory.

    ``graph`` is the SHA-256 of the ONNX file, ``data`` those of its files of weights.
    ``provider`` compiles (tensorrt, migraphx), ``gpu`` is the card's name and ``architecture`` its sm_89 or
    gfx942, ``toolkit`` the major version of CUDA or ROCm, ``shapes`` the profile by input, ``options`` what
    the provider was told of precision and ``system`` the operating system with its machine.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    graph: str
    data: tuple[str, ...]
    onnxruntime: str
    provider: str
    provider_version: str
    gpu: str
    architecture: str
    driver: str
    toolkit: str
    shapes: Mapping[str, ShapeRange]
    options: Mapping[str, str]
    system: str

    @property
    def digest(self) -> str:
        """The SHA-256 of the facts as canonical JSON: the order in which mappings were made is no fact."""
        facts = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(facts.encode()).hexdigest()
