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
from jubako.weight_sets import GraphSet

__all__ = [
    "CHECKER_FILES",
    "DENOISERS",
    "INDEX",
    "PullFailed",
    "choose_files",
    "choose_graphs",
    "choose_weights",
    "components",
    "other_weights",
]

INDEX = "model_index.json"
CHECKER_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")
DENOISERS = ("unet", "transformer", "prior")

# model.safetensors, model.fp16.safetensors, model-00001-of-00002.safetensors, model.fp16-00001-of-…
_WEIGHTS = re.compile(r"[^.]+(?:\.(?P<variant>[^.]+?)(?:-\d+-of-\d+)?)?\.safetensors")
# model.safetensors.index.json, model.safetensors.index.fp16.json
_SHARDS = re.compile(r"[^.]+\.safetensors\.index(?:\.(?P<variant>[^.]+))?\.json")
_INDEX_OF_PICKLES = re.compile(r".*\.bin\.index(\.[^.]+)?\.json")
_CONFIGS = (".json", ".txt", ".model")
# What each kind of overlay brings whole.
_REPLACED = {"denoiser": DENOISERS, "original": (*DENOISERS, "vae")}
# What AMD's repositories hold beside: compiled caches, and graphs for another runtime.
_OTHER_RUNTIMES = {"MXR", "RyzenAI", "controlnet"}
_OTHER_WEIGHTS = (".bin", ".ckpt", ".h5", ".msgpack", ".onnx", ".pb", ".pkl", ".pt", ".pth")


class PullFailed(JubakoError):
    """A model's weights could not be fetched; the text says what to do about it."""


def components(index: Any, model: Model) -> tuple[str, ...]:
    """The components that a ``model_index.json`` names, without those that the catalog leaves out."""
    if not isinstance(index, dict):
        raise PullFailed(f"{model.weights.repo}: {INDEX} is not a JSON object")
    named = (name for name, entry in index.items() if isinstance(entry, list) and all(entry))
    return tuple(name for name in named if name not in model.weights.left_out)


def choose_files(
    names: Iterable[str], index: Any, model: Model, *, bare: Iterable[str] = ()
) -> tuple[str, ...]:
    """The files to take, sorted; PullFailed names a component that has no safe weights or no files.

    Of the ``bare`` components only the configs are taken, and so of those that an overlay brings whole.
    """
    overlay = model.weights.overlay
    replaced = {*bare, *(_REPLACED.get(overlay.kind, ()) if overlay else ())}
    names = tuple(names)
    chosen = {INDEX}
    for component in components(index, model):
        prefix = f"{component}/"
        inside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
        if not inside:
            raise PullFailed(f"{model.weights.repo}: {INDEX} names {component}, but it has no files there")
        config_alone = component in replaced
        taken = _configs(inside, None) if config_alone else _of_component(component, inside, model)
        chosen.update(prefix + name for name in taken)
    return tuple(sorted(chosen))


def choose_graphs(names: Iterable[str], graphs: GraphSet) -> tuple[str, ...]:
    """The files of a vendor's weight set, sorted: each graph with all that lies in its folder.

    Files of weights have any name, and no suffix tells them. PullFailed names a graph that is not there.
    """
    names = set(names)
    chosen: set[str] = set()
    for slot in graphs.graphs:
        graph = next((file for file in graphs.files(slot) if file in names), None)
        if graph is None:
            raise PullFailed(
                f"{graphs.repo} holds no graph of the {slot} where one should be: "
                f"{' or '.join(graphs.files(slot))}"
            )
        inside = f"{graph.rpartition('/')[0]}/"
        chosen |= {
            name
            for name in names
            if name.startswith(inside) and not set(name.removeprefix(inside).split("/")) & _OTHER_RUNTIMES
        }
    return tuple(sorted(chosen))


def choose_weights(names: Iterable[str], wanted: str | None) -> tuple[tuple[str, ...], str | None]:
    """The safetensors to take of one component's files, sorted, and their variant: the wanted one if there.

    None are taken where there are only other variants or pickles, or no weights at all.
    """
    weights = {name: match["variant"] for name in names if (match := _WEIGHTS.fullmatch(name))}
    variant = wanted if wanted in weights.values() else None
    return tuple(sorted(name for name, its_variant in weights.items() if its_variant == variant)), variant


def other_weights(names: Iterable[str]) -> tuple[str, ...]:
    """The files of one component that hold weights in any form, safe or not."""
    return tuple(name for name in names if _WEIGHTS.fullmatch(name) or name.endswith(_OTHER_WEIGHTS))


def _of_component(component: str, names: list[str], model: Model) -> list[str]:
    # Files of one component lie directly in its folder; what lies deeper is for other runtimes.
    names = [name for name in names if "/" not in name]
    taken, variant = choose_weights(names, model.weights.variant)
    if not taken and (others := other_weights(names)):
        raise PullFailed(
            f"{model.weights.repo}: the component {component} has no safetensors to take, only "
            f"{', '.join(others)}; Jubako loads no pickles"
        )
    return [*taken, *_configs(names, variant)]


def _configs(names: list[str], variant: str | None) -> list[str]:
    return [name for name in names if "/" not in name and _is_config(name, variant)]


def _is_config(name: str, variant: str | None) -> bool:
    if shards := _SHARDS.fullmatch(name):
        return shards["variant"] == variant
    return name.endswith(_CONFIGS) and not _INDEX_OF_PICKLES.fullmatch(name)
