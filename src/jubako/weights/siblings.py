"""Which models of the catalog a single file can borrow configs and tokenizers from.

A checkpoint of all weights holds tensors and nothing else. What its networks look like is told by a model of
the same pipeline whose denoiser is as large: sizes tell SD 1 from 2, SDXL from its refiner and the SD3s from
each other, and no list of names has to be kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from jubako.catalog import Model
from jubako.errors import UnusableWeights
from jubako.weights.checkpoint import tensors

__all__ = ["DENOISER", "siblings"]

DENOISER = "model.diffusion_model."

# The catalog's numbers are rounded; SD 1 and 2 differ by 0.7 %, and the nearest comes first.
_TOLERANCE = 0.03


def siblings(model: Model, models: Mapping[str, Model]) -> tuple[Model, ...]:
    """The models whose configs fit the model's file, the best first; the one of ``weights.config`` if set.

    UnusableWeights when the file can't be read, holds no denoiser, or names a config that is no model with
    configs of its own.
    """
    wanted, file = model.weights.config, model.weights.file
    own = {name: each for name, each in models.items() if each.weights.file is None}
    if wanted is not None:
        if wanted not in own:
            raise UnusableWeights(
                f"{model.name}: weights.config: {wanted!r} is no model of the family with configs; those are "
                f"{', '.join(own)}"
            )
        return (own[wanted],)
    size = _parameters(Path(str(file)))
    fitting = [
        each
        for each in own.values()
        if each.pipeline == model.pipeline and abs(each.parameters / size - 1) <= _TOLERANCE
    ]
    return tuple(sorted(fitting, key=lambda each: _distance(each, model, size)))


def _distance(candidate: Model, model: Model, size: int) -> tuple[bool, float]:
    """Another kind of prediction comes last: its scheduler's config would be the wrong one."""
    return candidate.prediction_type != model.prediction_type, abs(candidate.parameters / size - 1)


def _parameters(file: Path) -> int:
    counts = [header.count for name, header in tensors(file).items() if name.startswith(DENOISER)]
    if not counts:
        raise UnusableWeights(
            f"{file} holds no tensors under {DENOISER}: it is no checkpoint of a whole model. A denoiser or "
            "a LoRA alone goes into weights.overlay of a model"
        )
    return sum(counts)
