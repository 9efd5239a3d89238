"""Which files of a repository make up a model: a rule over names, without a network and without torch.

A repository holds the same weights many times: as pickles, in two precisions, for other runtimes and as one
big file at its root. What is taken is what diffusers reads of the components in ``model_index.json``:
their safetensors in one variant, and their configs. Nothing that runs code is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from jubako.catalog import Model
from jubako.errors import JubakoError

__all__ = ["INDEX", "PullFailed", "choose_files", "components"]

INDEX = "model_index.json"

# model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors, model.fp16-00001-of-…
_WEIGHTS = re.compile(r"[^.]+(?:\.(?P<variant>[^.]+?)(?:-\d+-of-\d+)?)?\.safetensors")
# model.safetensors.index.json, model.safetensors.index.fp16.json
_SHARDS = re.compile(r"[^.]+\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
_INDEX_OF_PICKLES = re.compile(r".*\.bin\.index(\.[^.]+)?\.json")
_CONFIGS = (".json", ".txt", ".model")
_OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pb", ".pkl", ".pt", ".pth")


class PullFailed(JubakoError):
    """A model's weights could not be fetched; the text says what to do about it."""


def components(index: Any, model: Model) -> tuple[str, ...]:
    """The components that a ``model_index.json`` names, without those that the catalog leaves out."""
    if not isinstance(index, dict):
        raise PullFailed(f"{model.weights.repo}: {INDEX} is not a JSON object")
    named = (name for name, entry in index.items() if isinstance(entry, list) and all(entry))
    return tuple(name for name in named if name not in model.weights.left_out)


def choose_files(names: Iterable[str], index: Any, model: Model) -> tuple[str, ...]:
    """The files to take, sorted; PullFailed names a component that has no safe weights or no files."""
    names = tuple(names)
    chosen = {INDEX}
    for component in components(index, model):
        prefix = f"{component}/"
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if not inside:
            raise PullFailed(f"{model.weights.repo}: {INDEX} names {component}, but it has no files there")
        chosen.update(prefix + name for name in _of_component(component, inside, model))
    return tuple(sorted(chosen))


def _of_component(component: str, names: list[str], model: Model) -> list[str]:
    # Files of one component lie directly in its folder; what lies deeper is for other runtimes.
    names = [name for name in names if "/" not in name]
    weights = {name: match["variant"] for name in names if (match := _WEIGHTS.fullmatch(name))}
    variant = model.weights.variant if model.weights.variant in weights.values() else None
    taken = [name for name, its_variant in weights.items() if its_variant == variant]
    others = [name for name in names if name in weights or name.endswith(_OTHER_WEIGHTS)]
    if others and not taken:
        raise PullFailed(
            f"{model.weights.repo}: the component {component} has no safetensors to take, only "
            f"{', '.join(others)}; Jubako loads no pickles"
        )
    return taken + [name for name in names if _is_config(name, variant)]


def _is_config(name: str, variant: str | None) -> bool:
    if shards := _SHARDS.fullmatch(name):
        return shards["variant"] == variant
    return name.endswith(_CONFIGS) and not _INDEX_OF_PICKLES.fullmatch(name)
