"""Parts of a pipeline, and those that are read from a folder in the diffusers layout.

A part knows what it is (its key), how much memory it takes and how to be read, not who shares it.
"""

from __future__ import annotations

import importlib
import inspect
import json
import threading
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from jubako.catalog import Model
from jubako.errors import UnusableWeights
from jubako.memory import out_of_memory
from jubako.weights.checkpoint import TensorHeader, digest, tensors
from jubako.weights.layout import INDEX, choose_weights, other_weights

__all__ = [
    "Finish",
    "FinishedPart",
    "FolderPart",
    "Part",
    "beginning",
    "bytes_in",
    "class_named",
    "config_of",
    "construction",
    "identity",
    "placed",
    "read_index",
    "weights_of",
]

# What differs between copies of one component without changing what it computes.
_NAMES = {
    "_class_name",
    "_commit_hash",
    "_diffusers_version",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
}

construction = threading.Lock()
"""Held by whoever makes modules: for one without memory the libraries change ``torch.nn.Module`` itself, and
two who do so at a time leave it changed for good."""

_LINES, _LINE = 4, 300
_ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}


class Part(Protocol):
    """One heavy component of a pipeline, before it is in memory."""

    @property
    def name(self) -> str:
        """What the pipeline calls it: unet, vae, text_encoder, …"""
        ...

    @property
    def key(self) -> Hashable:
        """Equal for parts that are the same module: class, config, precision, device and content."""
        ...

    @property
    def bytes(self) -> int:
        """Memory that it will take, from its files' headers."""
        ...

    def read(self) -> torch.nn.Module:
        """The module from disk, on its device, in its precision, in evaluation mode."""
        ...


@dataclass(frozen=True)
class FolderPart:
    """A component of a folder: the weights and the config in its subfolder, read by its own class."""

    name: str
    folder: Path
    cls: type[Any]
    weights: tuple[str, ...]
    variant: str | None
    device: torch.device
    dtype: torch.dtype

    @property
    def files(self) -> tuple[Path, ...]:
        """The safetensors that are read."""
        return tuple(self.folder / self.name / file for file in self.weights)

    @property
    def key(self) -> Hashable:
        content = tuple(digest(file) for file in self.files)
        return (*identity(self.cls, self.folder / self.name), str(self.dtype), str(self.device), content)

    @property
    def bytes(self) -> int:
        return sum(bytes_in(tensors(file), self.dtype, self.cls) for file in self.files)

    def read(self) -> torch.nn.Module:
        where = self.folder / self.name
        try:
            module, info = self.cls.from_pretrained(
                where,
                dtype=self.dtype,
                variant=self.variant,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
        except Exception as error:
            if out_of_memory(error):
                raise
            raise UnusableWeights(f"{where}: the {self.name} can't be read: {beginning(error)}") from error
        # The libraries fill what a file lacks with noise and only warn.
        if missing := sorted(info["missing_keys"]):
            raise UnusableWeights(f"{where} lacks {len(missing)} tensors, such as {missing[0]}")
        return placed(module, self.device)


@dataclass(frozen=True)
class Finish:
    """What is done to modules once they are read. ``form`` tells those of another finish apart."""

    form: Hashable
    apply: Callable[[torch.nn.Module, str], torch.nn.Module]


@dataclass(frozen=True)
class FinishedPart:
    """Another part with a finish."""

    base: Part
    finish: Finish

    @property
    def name(self) -> str:
        return self.base.name

    @property
    def key(self) -> Hashable:
        return self.base.key, self.finish.form

    @property
    def bytes(self) -> int:
        return self.base.bytes

    def read(self) -> torch.nn.Module:
        return self.finish.apply(self.base.read(), self.name)


def placed(module: Any, device: torch.device) -> torch.nn.Module:
    """The module on its device and ready to predict; it keeps the precision that its class chose."""
    there: torch.nn.Module = module.to(device).eval().requires_grad_(False)
    return there


def identity(cls: type[Any], folder: Path) -> tuple[str, str]:
    """The class and the config in a comparable form, without the names and versions of who saved it."""
    config = _complete_config(cls, folder)
    kept = {name: value for name, value in config.items() if name not in _NAMES}
    return f"{cls.__module__}.{cls.__qualname__}", json.dumps(kept, sort_keys=True, default=str)


def _complete_config(cls: type[Any], folder: Path) -> Mapping[str, Any]:
    """The config with the class's values for what the file leaves out: old files say less than new ones."""
    if hasattr(cls, "config_class"):
        complete: Mapping[str, Any] = cls.config_class.from_pretrained(folder).to_dict()
        return complete
    parameters = inspect.signature(cls).parameters.values()
    defaults = {each.name: each.default for each in parameters if each.default is not inspect.Parameter.empty}
    return {**defaults, **config_of(folder)}


def config_of(folder: Path) -> Mapping[str, Any]:
    """A component's config.json as it stands, empty when there is none."""
    file = folder / "config.json"
    return _object(file) if file.is_file() else {}


def read_index(folder: Path) -> Mapping[str, Any]:
    """A folder's model_index.json."""
    return _object(folder / INDEX)


def _object(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnusableWeights(f"{file} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise UnusableWeights(f"{file} is no JSON object")
    return value


def class_named(library: str, name: str) -> type[Any]:
    """The class that a model_index.json names, of diffusers, of one of its pipelines or of transformers.

    A folder's own code is never imported.
    """
    from diffusers import pipelines

    if library in {"diffusers", "transformers"}:
        found = getattr(importlib.import_module(library), name, None)
    else:
        found = getattr(getattr(pipelines, library, None), name, None)
    if not isinstance(found, type):
        raise UnusableWeights(
            f"{INDEX} names {library}.{name}, which is no class of diffusers or transformers"
        )
    return found


def weights_of(name: str, folder: Path, model: Model) -> tuple[tuple[str, ...], str | None]:
    """The safetensors of one component's subfolder and their variant; none for a tokenizer or a scheduler."""
    inside = [path.name for path in (folder / name).glob("*") if path.is_file()]
    taken, variant = choose_weights(inside, model.weights.variant)
    if not taken and (others := other_weights(inside)):
        raise UnusableWeights(
            f"{folder / name}: {model.name} has no safetensors there, only {', '.join(sorted(others))}; "
            "Jubako loads no pickles"
        )
    return taken, variant


def bytes_in(headers: Mapping[str, TensorHeader], dtype: torch.dtype, cls: type[Any] | None = None) -> int:
    """Memory of these tensors in a precision; some classes keep some of theirs in float32 beside float16."""
    wide = tuple(getattr(cls, "_keep_in_fp32_modules", None) or ()) if dtype == torch.float16 else ()
    total = 0
    for name, header in headers.items():
        if not header.is_floating:
            total += header.count * _ITEM_BYTES.get(header.dtype, 1)
        elif any(module in name.split(".") for module in wide):
            total += header.count * torch.float32.itemsize
        else:
            total += header.count * dtype.itemsize
    return total


def beginning(error: Exception) -> str:
    """The beginning of an error that may list every tensor of a model."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(line if len(line) <= _LINE else line[:_LINE] + " …" for line in lines[:_LINES])
