"""Adapters on disk, below ``JUBAKO_HOME/adapters``: found by name, never by path, and without torch.

``<name>.safetensors`` is one that was put there, ``<name>/adapter.safetensors`` one that was made or added
here, with a ``card.json`` that says of what.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from jubako.errors import InvalidRequest, TooLarge, UnknownAdapter, UnusableWeights, nearest
from jubako.job import Job, LoraUse, new_id
from jubako.request import ADAPTER_NAME
from jubako.weights.checkpoint import digest, tensors_in

__all__ = ["MAX_BYTES", "Adapter", "AdapterStore"]

FILE, CARD = "adapter.safetensors", "card.json"
MAX_BYTES = 4 * 2**30
# A LoRA has some thousands of tensors, and its trainer's notes; parsing more would hold up everyone else.
MAX_HEADER_BYTES = 16 * 2**20

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

    @property
    def base(self) -> str | None:
        """The model that it was made for, where its card says so: by a name, or with more about it."""
        base = self.card.get("base")
        name = base.get("model") if isinstance(base, dict) else base
        return name if isinstance(name, str) else None


class AdapterStore:
    """The adapters of one home."""

    def __init__(self, home: Path) -> None:
        self._folder = home / "adapters"

    def __iter__(self) -> Iterator[Adapter]:
        """All adapters by name."""
        found: dict[str, Adapter] = {}
        for path in sorted(self._folder.glob("*")):
            name = path.name if path.is_dir() else path.stem
            if adapter := self.named(name):
                found[name] = adapter
        return iter(found.values())

    def named(self, name: str) -> Adapter | None:
        """The adapter of that name; None when there is none."""
        if not re.fullmatch(ADAPTER_NAME, name):
            return None
        own, put = self._folder / name / FILE, self._folder / f"{name}.safetensors"
        if own.is_file():
            return Adapter(name, own, _card(own.parent / CARD))
        return Adapter(name, put) if put.is_file() else None

    def find(self, name: str) -> Adapter:
        """The adapter of that name; UnknownAdapter lists those that there are."""
        if adapter := self.named(name):
            return adapter
        raise UnknownAdapter(self._unknown(name), param="name")

    def wanted(self, name: str) -> Adapter:
        """The adapter that a request for a picture names; InvalidRequest lists those that there are."""
        if adapter := self.named(name):
            return adapter
        raise InvalidRequest(f"loras: {self._unknown(name)}", param="loras")

    def resolved(self, job: Job) -> Job:
        """The job and its source with the digests of the files that their adapters' names stand for now."""
        loras = tuple(use.model_copy(update={"sha256": self.wanted(use.name).sha256}) for use in job.loras)
        source = self.resolved(job.source) if job.source else None
        return job.model_copy(update={"loras": loras, "source": source})

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
        try:
            content = source.open("rb")
        except OSError as error:
            raise InvalidRequest(f"file: {source} can't be read: {error.strerror}", param="file") from error
        with content:
            return self.take_in(name, content, card)

    def take_in(self, name: str, content: IO[bytes], card: dict[str, Any] | None = None) -> Adapter:
        """Take in a copy of an open file, as :meth:`add` does."""
        self.require_free(name)
        _check(content)
        final = self._folder / name
        temporary = self._temporary(name)
        temporary.mkdir(parents=True)
        try:
            content.seek(0)
            with (temporary / FILE).open("wb") as copy:
                shutil.copyfileobj(content, copy, 2**20)
            (temporary / CARD).write_text(json.dumps(card or {}, indent=1), encoding="utf-8")
            temporary.rename(final)
        except OSError as error:
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:  # somebody else was faster
                raise _taken(name) from error
            raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        return self.find(name)

    def require_free(self, name: str) -> None:
        """InvalidRequest when the name is none, or taken."""
        if not re.fullmatch(ADAPTER_NAME, name):
            raise InvalidRequest(
                f"name: {name!r} is no name; take letters, digits, dots, dashes and underscores, up to 64",
                param="name",
            )
        if self.named(name):
            raise _taken(name)

    def remove(self, name: str) -> None:
        """Delete an adapter, or raise UnknownAdapter; requests that run with it go on."""
        adapter = self.find(name)
        put = adapter.file.parent == self._folder
        gone = self._temporary(name)
        try:
            (adapter.file if put else adapter.file.parent).rename(gone)
        except FileNotFoundError as error:
            raise UnknownAdapter(self._unknown(name), param="name") from error
        if put:
            gone.unlink()
        else:
            shutil.rmtree(gone)

    def _temporary(self, name: str) -> Path:
        """A place beside the adapters, under a name that none of them can have."""
        return self._folder / f".{name}.{new_id()}.tmp"

    def _unknown(self, name: str) -> str:
        known = [adapter.name for adapter in self]
        return f"there is no adapter {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}"


def _taken(name: str) -> InvalidRequest:
    return InvalidRequest(f"name: there is an adapter {name!r} already; remove it first", param="name")


def _says(prompt: str, word: str) -> bool:
    """Whether it is a whole word of the prompt."""
    return bool(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", prompt, re.IGNORECASE))


def _card(file: Path) -> dict[str, Any]:
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _check(content: IO[bytes]) -> None:
    """Refuse what is no LoRA by its header alone."""
    if content.seek(0, os.SEEK_END) > MAX_BYTES:
        raise TooLarge(f"file: more than {MAX_BYTES // 2**30} GiB is not taken", param="file")
    try:
        names = tuple(tensors_in(content, MAX_HEADER_BYTES))
    except UnusableWeights as error:
        raise InvalidRequest(f"file: it is {error.message}", param="file") from error
    if not any(_LORA.search(name) for name in names):
        raise InvalidRequest("file: it holds no tensors of a LoRA", param="file")
