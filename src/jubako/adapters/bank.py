"""The adapters that a model has in memory: read when a job asks, the least recently used forgotten."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from jubako.adapters.deltas import AdapterSet
from jubako.adapters.embedding import Embedding, read_embedding
from jubako.adapters.lora import Lora, read_lora
from jubako.adapters.mixing import Mixer
from jubako.adapters.store import AdapterStore, Kind
from jubako.errors import InvalidRequest
from jubako.job import EmbeddingUse, LoraUse
from jubako.weights.graphs.proxies import GraphModule

__all__ = ["AdapterBank"]

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2")
_READERS: Mapping[Kind, Callable[[str, Path, Any, str], Lora | Embedding]] = {
    "lora": read_lora,
    "embedding": read_embedding,
}


class AdapterBank:
    """One model's adapters. ``take`` may be called from any thread; a set that was taken stays whole.

    ``budget`` are bytes; what a running job has may go past it, since it is freed with the job only.
    """

    def __init__(self, pipeline: Any, model: str, store: AdapterStore, budget: int) -> None:
        self._pipeline, self._model = pipeline, model
        self._store, self._budget = store, budget
        self._resident: OrderedDict[str, Lora | Embedding] = OrderedDict()
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self._mixers = {
            name: Mixer(module, name)
            for name in _COMPONENTS
            if isinstance(module := pipeline.components.get(name), torch.nn.Module)
            and not isinstance(module, GraphModule)
        }

    @property
    def bytes(self) -> int:
        """Memory of those that are resident."""
        with self._lock:
            return sum(adapter.bytes for adapter in self._resident.values())

    def take(self, uses: Sequence[LoraUse]) -> AdapterSet:
        """The adapters of a job in memory; InvalidRequest when one can't be had or does not fit."""
        if not uses:
            return ()
        if not {"unet", "transformer"} & self._mixers.keys():
            raise InvalidRequest(
                f"loras: {self._model} is served from graphs, which take no adapters; serve it with "
                "standard weights",
                param="loras",
            )
        return tuple((self._one(use, "lora"), use.weight) for use in uses)

    def embeddings(self, uses: Sequence[EmbeddingUse]) -> Mapping[str, Embedding]:
        """The embeddings of a job by their names; InvalidRequest as for ``take``."""
        encoders = [self._pipeline.components.get(name) for name in ("text_encoder", "text_encoder_2")]
        if uses and any(isinstance(encoder, GraphModule) for encoder in encoders):
            raise InvalidRequest(
                f"embeddings: {self._model} is served from graphs, which take none; serve it with standard "
                "weights",
                param="embeddings",
            )
        return {use.name: self._one(use, "embedding") for use in uses}

    def rows(self, component: str, sets: Sequence[AdapterSet]) -> AbstractContextManager[None]:
        """The adapters of the rows of the component's forwards within."""
        mixer = self._mixers.get(component)
        return mixer.rows(sets) if mixer else nullcontext()

    def at_work(self, component: str) -> bool:
        """Whether the component's forward that runs now has rows with adapters."""
        mixer = self._mixers.get(component)
        return mixer is not None and mixer.at_work

    def _one(self, use: LoraUse | EmbeddingUse, kind: Kind) -> Any:
        """An adapter in memory. A job that was planned without a store takes what its name stands for now."""
        # Before the other lock: nobody who only wants what is here waits for what is read.
        if use.sha256 and (found := self._found(use.sha256)):
            return found
        with self._reading:
            sha256 = use.sha256 or self._store.wanted(use.name, kind).sha256
            if found := self._found(sha256):
                return found
            adapter = self._store.wanted(use.name, kind)
            if adapter.sha256 != sha256:
                field = f"{kind}s"
                raise InvalidRequest(f"{field}: {use.name} was replaced meanwhile; ask again", param=field)
            read = _READERS[kind](use.name, adapter.file, self._pipeline, self._model)
            with self._lock:
                self._resident[sha256] = read
                self._make_room()
            return read

    def _found(self, sha256: str) -> Lora | Embedding | None:
        with self._lock:
            if found := self._resident.get(sha256):
                self._resident.move_to_end(sha256)
            return found

    def _make_room(self) -> None:
        """Forget the least recently used, but never the one that was just read."""
        while len(self._resident) > 1 and sum(each.bytes for each in self._resident.values()) > self._budget:
            self._resident.popitem(last=False)
