"""A part of a pipeline that graphs stand in for, wholly or with a module for what they leave out."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from jubako.weight_sets import Slot
from jubako.weights.graphs.admission import Admission, lacking
from jubako.weights.graphs.proxies import GraphAutoencoder, GraphDenoiser, GraphModule, GraphTextEncoder
from jubako.weights.graphs.runtime import GraphRuntime
from jubako.weights.parts import Part, identity

__all__ = ["GraphPart", "admissions", "slots_of"]

_OF_VAE: tuple[Slot, ...] = ("vae_decoder", "vae_encoder")
_DENOISERS = {"unet", "transformer"}


@dataclass(frozen=True)
class GraphPart:
    """``name`` of a pipeline as graphs; ``base`` is the module for what they leave out, if they do.

    ``folder`` has the config of the module that they stand for, in a subfolder of its name.
    """

    name: str
    cls: type[Any]
    folder: Path
    admitted: tuple[Admission, ...]
    runtime: GraphRuntime
    base: Part | None = None

    @property
    def key(self) -> Hashable:
        content = tuple(admission.graph.key for admission in self.admitted)
        where = (self.runtime.providers, str(self.runtime.device), self.runtime.graphs.profile)
        own = identity(self.cls, self.folder / self.name)
        return ("graphs", *own, content, where, self.base.key if self.base else None)

    @property
    def bytes(self) -> int:
        return self._graph_bytes + (self.base.bytes if self.base else 0)

    def read(self) -> torch.nn.Module:
        config, device = _config(self.cls, self.folder / self.name), self.runtime.device
        opened = {admission.slot: self.runtime.opened(admission) for admission in self.admitted}
        module: GraphModule
        if self.name == "vae":
            left = self.base.read() if self.base else None
            module = GraphAutoencoder(
                opened.get("vae_decoder"),
                opened.get("vae_encoder"),
                left,
                config=config,
                device=device,
                graph_bytes=self._graph_bytes,
            )
        else:
            kind = GraphDenoiser if self.name in _DENOISERS else GraphTextEncoder
            module = kind(opened[self.admitted[0].slot], config, device, self._graph_bytes)
        return module.eval()

    @property
    def _graph_bytes(self) -> int:
        return sum(
            admission.graph.bytes * (2 if admission.remedy == "float32" else 1) for admission in self.admitted
        )


def slots_of(name: str) -> tuple[Slot, ...]:
    """The places for graphs in one component of a pipeline."""
    slots: Mapping[str, tuple[Slot, ...]] = {
        "text_encoder": ("text_encoder",),
        "text_encoder_2": ("text_encoder_2",),
        "text_encoder_3": ("text_encoder_3",),
        "unet": ("unet",),
        "transformer": ("transformer",),
        "vae": _OF_VAE,
    }
    return slots.get(name, ())


def admissions(
    name: str, cls: type[Any], runtime: GraphRuntime, among: tuple[str, ...]
) -> tuple[tuple[Admission, ...], str | None]:
    """The graphs for a component of a pipeline (``among`` are its components), and why one is not used.

    A text encoder whose graph lacks an output that this pipeline reads stays in PyTorch. Everything else that
    speaks against a graph is raised as UnusableWeights.
    """
    found = tuple(runtime.admitted(slot) for slot in slots_of(name) if slot in runtime.graphs.graphs)
    if not found or not name.startswith("text_encoder"):
        return found, None
    if without := lacking(found[0], _read_of(cls, among)):
        return (), f"the {name} stays in PyTorch: its graph has no {' and no '.join(without)}"
    return found, None


def _read_of(cls: type[Any], among: tuple[str, ...]) -> tuple[str, ...]:
    """What a pipeline reads of a text encoder's outputs: with two of them, not the last state."""
    wanted: list[Literal["last_hidden_state", "penultimate", "text_embeds"]] = []
    if cls.__name__.startswith("CLIP") and "text_encoder_2" in among:
        wanted.append("penultimate")
    else:
        wanted.append("last_hidden_state")
    if cls.__name__.endswith("WithProjection"):
        wanted.append("text_embeds")
    return tuple(wanted)


def _config(cls: type[Any], folder: Path) -> Any:
    """The config that the class would have, defaults included, without its weights."""
    if hasattr(cls, "config_class"):
        return cls.config_class.from_pretrained(folder)
    from accelerate import init_empty_weights  # type: ignore[import-untyped] # publishes no types

    with init_empty_weights():
        return cls.from_config(cls.load_config(folder)).config
