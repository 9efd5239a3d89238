"""Adapters on disk, below ``JUBAKO_HOME/adapters``: found by name, never by path, and without torch.

``<name>.safetensors`` is one that was put there, ``<name>/adapter.safetensors`` one that was made or added
here, with a ``card.json`` that says of what.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jubako.errors import InvalidRequest, UnusableWeights, nearest
from jubako.job import Job, LoraUse
from jubako.request import ADAPTER_NAME
from jubako.weights.checkpoint import digest, tensors

__all__ = ["MAX_BYTES", "Adapter", "AdapterStore"]

FILE, CARD = "adapter.safetensors", "card.json"
MAX_BYTES = 4 * 2**30

# What names of tensors in a LoRA have in common, over all trainers: diffusers and peft, kohya.
_LORA = re.compile(r"lora[_.](A|B|down|up)\b|\.alpha$|lora_linear_layer")


@dataclass(frozen=True)
class Adapter:
    """One adapter's file and what its card says."""

    name: str
    file: Path
    card: dict[str, Any] = field(default_factory=dict)

    @property
    def sha256(self) -> str:
        """The digest of its content."""
        return digest(self.file)

    @property
    def bytes(self) -> int:
        """Size of its file."""
        return self.file.stat().st_size


class AdapterStore:
    """The adapters of one home."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "adapters"

    def __iter__(self) -> Iterator[Adapter]:
        """All adapters by name."""
        found: dict[str, Adapter] = {}
        for path in sorted(self._folder.glob("*")):
            name = path.stem if path.suffix == ".safetensors" else path.name
            if re.fullmatch(ADAPTER_NAME, name) and (adapter := self._named(name)):
                found[name] = adapter
        return iter(found.values())

    def find(self, name: str) -> Adapter:
        """The adapter of that name; InvalidRequest lists those that there are."""
        if re.fullmatch(ADAPTER_NAME, name) and (adapter := self._named(name)):
            return adapter
        known = [adapter.name for adapter in self]
        raise InvalidRequest(
            f"loras: there is no adapter {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}",
            param="loras",
        )

    def resolved(self, job: Job) -> Job:
        """The job with the digests of the files that its adapters' names stand for now."""
        if not job.loras:
            return job
        loras = tuple(use.model_copy(update={"sha256": self.find(use.name).sha256}) for use in job.loras)
        return job.model_copy(update={"loras": loras})

    def with_triggered(self, job: Job) -> Job:
        """The job with the adapters trained here on its model whose trigger is in its prompt."""
        named = {use.name for use in job.loras}
        found = [
            adapter.name
            for adapter in self
            if adapter.card.get("automatic")
            and adapter.card.get("base") == job.model
            and adapter.name not in named
            and _says(job.prompt, str(adapter.card.get("trigger")))
        ]
        told = tuple(
            f"the adapter {name} is used, since its trigger is in the prompt; `loras: []` leaves it out"
            for name in found
        )
        loras = (*job.loras, *(LoraUse(name=name, weight=1.0) for name in found))
        return job.model_copy(update={"loras": loras, "warnings": (*job.warnings, *told)}) if found else job

    def add(self, name: str, source: Path, card: dict[str, Any] | None = None) -> Adapter:
        """Take in a copy of a file; InvalidRequest, and nothing is written, when it is none to take."""
        if not re.fullmatch(ADAPTER_NAME, name):
            raise InvalidRequest(
                f"name: {name!r} is no name; take letters, digits, dots, dashes and underscores, up to 64",
                param="name",
            )
        if self._named(name):
            raise InvalidRequest(f"name: there is an adapter {name!r} already; remove it first", param="name")
        _check(source)
        final = self._folder / name
        temporary = self._folder / f".{name}.{os.getpid()}.tmp"
        temporary.mkdir(parents=True)
        try:
            shutil.copyfile(source, temporary / FILE)
            (temporary / CARD).write_text(json.dumps(card or {}, indent=1), encoding="utf-8")
            temporary.replace(final)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return self.find(name)

    def remove(self, name: str) -> None:
        """Delete an adapter; requests that run with it go on."""
        adapter = self.find(name)
        if adapter.file.parent == self._folder:
            adapter.file.unlink()
        else:
            shutil.rmtree(adapter.file.parent)

    def _named(self, name: str) -> Adapter | None:
        own, put = self._folder / name / FILE, self._folder / f"{name}.safetensors"
        if own.is_file():
            return Adapter(name, own, _card(own.parent / CARD))
        return Adapter(name, put) if put.is_file() else None


def _says(prompt: str, word: str) -> bool:
    """Whether it is a whole word of the prompt."""
    return bool(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", prompt, re.IGNORECASE))


def _card(file: Path) -> dict[str, Any]:
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _check(file: Path) -> None:
    """Refuse what is no LoRA by its header alone."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise InvalidRequest(f"file: more than {MAX_BYTES // 2**30} GiB is not taken", param="file")
        names = tuple(tensors(file))
    except (OSError, UnusableWeights) as error:
        raise InvalidRequest(
            f"file: this is no safetensors file, or a torn one: {file.name}", param="file"
        ) from error
    if not any(_LORA.search(name) for name in names):
        raise InvalidRequest(f"file: {file.name} holds no tensors of a LoRA", param="file")
