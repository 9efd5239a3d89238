"""Video: Stable Video Diffusion, its orbits around objects (SV3D), and AnimateDiff."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jubako.catalog import Model
from jubako.families.animatediff import AnimateDiff
from jubako.families.loaded import LoadedModel
from jubako.families.sv3d import StableVideo3D
from jubako.families.svd import StableVideoDiffusion

__all__ = ["wrap"]

_KINDS: Mapping[str, Callable[[Any, Model], LoadedModel]] = {
    "StableVideoDiffusionPipeline": StableVideoDiffusion,
    "StableVideo3DPipeline": StableVideo3D,
    "AnimateDiffPipeline": AnimateDiff,
}


def wrap(pipeline: Any, model: Model) -> LoadedModel:
    """A model of this family around its pipeline in memory."""
    return _KINDS[model.pipeline](pipeline, model)
