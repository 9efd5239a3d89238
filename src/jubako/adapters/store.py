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
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, get_args

from jubako.disk import room_in
from jubako.errors import InvalidRequest, TooLarge, UnknownAdapter, UnusableWeights, nearest
from jubako.job import EmbeddingUse, Job, LoraUse, new_id
from jubako.planning.embeddings import says, tagged
from jubako.request import ADAPTER_NAME
from jubako.weights.checkpoint import TensorHeader, digest, tensors, tensors_in

__all__ = ["KINDS", "MAX_BYTES", "SDXL_KEYS", "Adapter", "AdapterStore", "Kind"]

Kind = Literal["lora", "embedding"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Requests and jobs have a field of each, in the plural."""

FILE, CARD = "adapter.safetensors", "card.json"
MAX_BYTES = 4 * 2**30
# A large file may be long on its way.
GRACE_SECONDS = 3600.0
# A LoRA has some thousands of tensors, and its trainer's notes; parsing more would hold up everyone else.
MAX_HEADER_BYTES = 16 * 2**20

# What names of tensors in a LoRA have in common, over all trainers: diffusers and peft, kohya.
_LORA = re.compile(r"lora[_.](A|B|down|up)\b|\.alpha$|lora_linear_layer")

SDXL_KEYS = ("clip_l", "clip_g")
"""What an embedding's tensors are called where there is one for each of SDXL's text encoders, in order."""


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
    def kind(self) -> Kind:
        """What its file's header says; a file that was put there and is neither fails as a LoRA when read."""
        try:
            return _kind(tensors(self.file)) or "lora"
        except UnusableWeights:
            return "lora"

    @property
    def word(self) -> str:
        """What stands for it in a prompt: its card's trigger, else its name."""
        return str(self.card.get("trigger") or self.name)

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

    def wanted(self, name: str, kind: Kind) -> Adapter:
        """The adapter that a request for a picture names; InvalidRequest lists those of its kind."""
        adapter = self.named(name)
        if adapter and adapter.kind == kind:
            return adapter
        known = ", ".join(each.name for each in self if each.kind == kind)
        problem = (
            f"{name!r} is of the kind {adapter.kind}. Known: {known}"
            if adapter
            else self._unknown(name, kind)
        )
        raise InvalidRequest(f"{kind}s: {problem}", param=f"{kind}s")

    def resolved(self, job: Job) -> Job:
        """The job and its source bound to the files that their adapters' names stand for now.

        Tags are where embeddings stand.
        """
        source = self.resolved(job.source) if job.source else None
        loras = tuple(
            use.model_copy(update={"sha256": self.wanted(use.name, "lora").sha256}) for use in job.loras
        )
        found = [self.wanted(use.name, "embedding") for use in job.embeddings]
        embeddings = tuple(EmbeddingUse(name=each.name, sha256=each.sha256) for each in found)
        if found:
            job = tagged(job, {each.name: each.word for each in found})
        return job.model_copy(update={"loras": loras, "embeddings": embeddings, "source": source})

    def with_triggered(self, job: Job, kinds: Collection[Kind]) -> Job:
        """The job with the adapters of these kinds trained here on its model whose word is in its prompt."""
        named = {use.name for use in job.loras} | {use.name for use in job.embeddings}
        found = {
            adapter.name: adapter.kind
            for adapter in self
            if adapter.card.get("automatic")
            and adapter.card.get("base") == job.model
            and adapter.name not in named
            and adapter.kind in kinds
            and says(job.prompt, adapter.word)
        }
        told = (
            f"the adapter {name} is used, since its trigger is in the prompt; `{kind}s: []` leaves it out"
            for name, kind in found.items()
        )
        loras = (LoraUse(name=name, weight=1.0) for name, kind in found.items() if kind == "lora")
        embeddings = (EmbeddingUse(name=name) for name, kind in found.items() if kind == "embedding")
        more = {"loras": loras, "embeddings": embeddings, "warnings": told}
        return job.model_copy(update={each: (*getattr(job, each), *new) for each, new in more.items()})

    def add(self, name: str, source: Path, card: dict[str, Any] | None = None) -> Adapter:
        """Take in a copy of a file; InvalidRequest, and nothing is written, when it is none to take."""
        try:
            content = source.open("rb")
        except OSError as error:
            raise InvalidRequest(f"file: {source} can't be read: {error.strerror}", param="file") from error
        with content:
            return self.take_in(name, content, card)

    def take_in(self, name: str, content: IO[bytes], card: dict[str, Any] | None = None) -> Adapter:
        """Take in a copy of an open file, as :meth:`add` does: whole or not at all. DiskFull without room."""
        self.require_free(name)
        _check(content)
        final = self._folder / name
        temporary = self._temporary(name)
        try:
            with room_in("JUBAKO_HOME"):
                temporary.mkdir(parents=True)
                content.seek(0)
                _write(temporary / FILE, iter(partial(content.read, 2**20), b""))
                _write(temporary / CARD, [json.dumps(card or {}, indent=1).encode()])
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

    def sweep(self, grace: float = GRACE_SECONDS) -> None:
        """Remove what was being added or removed when a process was killed, unless it is young."""
        for path in self._folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - grace:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def _temporary(self, name: str) -> Path:
        """A place beside the adapters, under a name that none of them can have."""
        return self._folder / f".{name}.{new_id()}.tmp"

    def _unknown(self, name: str, kind: Kind | None = None) -> str:
        known = [adapter.name for adapter in self if kind in {None, adapter.kind}]
        return f"there is no adapter {name!r}.{nearest(name, known)} Known: {', '.join(known) or 'none'}"


def _taken(name: str) -> InvalidRequest:
    return InvalidRequest(f"name: there is an adapter {name!r} already; remove it first", param="name")


def _write(file: Path, parts: Iterable[bytes]) -> None:
    """Write a file that outlasts a loss of power."""
    with file.open("wb") as opened:
        opened.writelines(parts)
        opened.flush()
        os.fsync(opened.fileno())


def _card(file: Path) -> dict[str, Any]:
    try:
        card = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return card if isinstance(card, dict) else {}


def _check(content: IO[bytes]) -> None:
    """Refuse what is no adapter by its header alone."""
    if content.seek(0, os.SEEK_END) > MAX_BYTES:
        raise TooLarge(f"file: more than {MAX_BYTES // 2**30} GiB is not taken", param="file")
    try:
        kind = _kind(tensors_in(content, MAX_HEADER_BYTES))
    except UnusableWeights as error:
        raise InvalidRequest(f"file: it is {error.message}", param="file") from error
    if kind is None:
        raise InvalidRequest("file: it holds neither tensors of a LoRA nor an embedding alone", param="file")


def _kind(headers: Mapping[str, TensorHeader]) -> Kind | None:
    """An embedding is one tensor called as its maker liked, but not as a layer's, or SDXL's two."""
    if any(_LORA.search(name) for name in headers):
        return "lora"
    vectors = all(header.is_floating and len(header.shape) in {1, 2} for header in headers.values())
    alone = len(headers) == 1 and not any(name.endswith((".weight", ".bias")) for name in headers)
    return "embedding" if vectors and (alone or headers.keys() == set(SDXL_KEYS)) else None
