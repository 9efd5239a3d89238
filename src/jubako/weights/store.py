"""What is on disk: which files hold a model's weights, without reading a tensor and without torch.

Pulled weights lie in the Hugging Face cache, shared with other programs. A record under ``JUBAKO_HOME``
names the commit and the files of each model, so that a half-fetched model is not taken for a whole one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from jubako.catalog import CheckerEntry, Model
from jubako.errors import ModelNotOnDisk, UnusableWeights
from jubako.weights.layout import INDEX
from jubako.weights.siblings import siblings

__all__ = [
    "OverlayRecord",
    "WeightRecord",
    "find_configs",
    "find_overlay",
    "find_weights",
    "read_checker_record",
    "read_record",
    "record_path",
    "require_configs",
    "require_own_files",
    "require_weights",
    "size_on_disk",
    "write_record",
]

_NONE: Mapping[str, Model] = {}


class OverlayRecord(BaseModel):
    """The overlay's file as it was pulled."""

    model_config = ConfigDict(frozen=True)

    repo: str
    commit: str
    folder: Path
    file: str
    kind: str
    size: int


class WeightRecord(BaseModel):
    """What was pulled for a model: repository, resolved commit, folder and each file's size in bytes.

    A model that is one file of the user's has a record of the configs that were pulled for it (``config``
    names the model that they are of), and a folder of the user's with an overlay has one of the overlay.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    repo: str = ""
    commit: str = ""
    folder: Path
    files: dict[str, int] = {}
    left_out: tuple[str, ...] = ()
    config: str | None = None
    overlay: OverlayRecord | None = None

    def is_whole(self) -> bool:
        """Whether every file is there with its size."""
        sizes = [(self.folder / name, size) for name, size in self.files.items()]
        if self.overlay is not None:
            sizes.append((self.overlay.folder / self.overlay.file, self.overlay.size))
        return all(path.is_file() and path.stat().st_size == size for path, size in sizes)

    def is_for(self, model: Model) -> bool:
        """Whether this is what the model's entry asks for now: entries are edited, records stay."""
        weights = model.weights
        overlay = weights.overlay if weights.overlay and weights.overlay.repo else None
        wanted = (overlay.repo, overlay.file, overlay.kind) if overlay else None
        had = (self.overlay.repo, self.overlay.file, self.overlay.kind) if self.overlay else None
        source = weights.config in {None, self.config} if weights.file else self.repo == (weights.repo or "")
        return source and wanted == had and set(self.left_out) <= set(weights.left_out)


def record_path(home: Path, model: Model) -> Path:
    """Where a model's record lies."""
    return home / "weights" / f"{model.name}.json"


def read_record(home: Path, model: Model) -> WeightRecord | None:
    """The record of a pulled model as this catalog entry has it; None when there is none to use."""
    record = _read(record_path(home, model))
    return record if record and record.is_for(model) else None


def read_checker_record(home: Path, entry: CheckerEntry) -> WeightRecord | None:
    """The record of a pulled safety checker; None when it is not (wholly) on disk, or from elsewhere."""
    record = _read(home / "weights" / f"{entry.name}.json")
    return record if record and record.repo == entry.repo and record.is_whole() else None


def _read(path: Path) -> WeightRecord | None:
    try:
        return WeightRecord.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None


def write_record(home: Path, record: WeightRecord) -> None:
    """Write a record under a temporary name and rename it into place."""
    path = home / "weights" / f"{record.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record.model_dump(mode="json"), indent=1), encoding="utf-8")
    temporary.replace(path)


def find_weights(home: Path, model: Model, models: Mapping[str, Model] = _NONE) -> Path | None:
    """The folder of the model's weights, or its single file; None when they are not (wholly) on disk.

    ``models`` are those of the family, from which a single file may borrow configs; without them only the
    configs that were pulled for the file itself count.
    """
    weights = model.weights
    if weights.overlay is not None and find_overlay(home, model) is None:
        return None
    if weights.file is not None:
        return weights.file if weights.file.is_file() and find_configs(home, model, models) else None
    if weights.folder is not None:
        return weights.folder if (weights.folder / INDEX).is_file() else None
    record = _whole_record(home, model)
    return record.folder if record else None


def find_configs(home: Path, model: Model, models: Mapping[str, Model] = _NONE) -> Path | None:
    """The folder that a single file's configs and tokenizers are read from, None when none is on disk."""
    if record := _whole_record(home, model):
        return record.folder
    try:
        fitting = siblings(model, models) if models else ()
    except UnusableWeights:
        return None  # a list of models must not break on one bad file; require_configs tells what is wrong
    return next(filter(None, (find_weights(home, each) for each in fitting)), None)


def find_overlay(home: Path, model: Model) -> Path | None:
    """The file of the model's overlay, None when it has none or it is not (wholly) on disk."""
    overlay = model.weights.overlay
    if overlay is None:
        return None
    if overlay.repo is None:
        return Path(overlay.file) if Path(overlay.file).is_file() else None
    record = _whole_record(home, model)
    return record.overlay.folder / record.overlay.file if record and record.overlay else None


def size_on_disk(home: Path, model: Model, models: Mapping[str, Model] = _NONE) -> int | None:
    """Bytes of the model's weights and configs, or None when they are not (wholly) on disk."""
    if (found := find_weights(home, model, models)) is None:
        return None
    paths: Iterable[Path] = [found]
    if model.weights.folder is not None:
        paths = (path for path in found.rglob("*") if path.is_file())
    elif model.weights.file is None:
        record = _whole_record(home, model)
        paths = [found / name for name in record.files] if record else []
    overlay = find_overlay(home, model)
    return sum(path.stat().st_size for path in (*paths, *([overlay] if overlay else [])))


def require_weights(home: Path, model: Model, models: Mapping[str, Model] = _NONE) -> Path:
    """The folder of the model's weights, or its single file; ModelNotOnDisk says what to do."""
    if (found := find_weights(home, model, models)) is not None:
        return found
    require_own_files(model)
    raise ModelNotOnDisk(_not_on_disk(model, models), param="model")


def require_configs(home: Path, model: Model, models: Mapping[str, Model] = _NONE) -> Path:
    """The folder of a single file's configs; ModelNotOnDisk names the command that fetches them."""
    if (found := find_configs(home, model, models)) is not None:
        return found
    raise ModelNotOnDisk(_not_on_disk(model, models), param="model")


def require_own_files(model: Model) -> None:
    """ModelNotOnDisk when a file or folder of the user's that the entry names is not there."""
    weights = model.weights
    own = [weights.folder, weights.file]
    if weights.overlay is not None and weights.overlay.repo is None:
        own.append(Path(weights.overlay.file))
    for path in filter(None, own):
        if not path.exists():
            raise ModelNotOnDisk(f"model: {model.name} needs {path}, which is not there", param="model")


def _whole_record(home: Path, model: Model) -> WeightRecord | None:
    record = read_record(home, model)
    return record if record is not None and record.is_whole() else None


def _not_on_disk(model: Model, models: Mapping[str, Model]) -> str:
    if model.weights.worker is not None:
        return (
            f"model: {model.name} runs in a worker of its own, and none is named; set its weights.worker.url "
            "in your catalog"
        )
    if model.weights.file is None or not models:
        return (
            f"model: the weights of {model.name} are not on disk; fetch them with: jubako pull {model.name}"
        )
    names = [sibling.name for sibling in siblings(model, models)]
    if not names:
        return (
            f"model: {model.weights.file} fits no model of the catalog whose pipeline is {model.pipeline}; "
            "name the one that it was made from in weights.config"
        )
    return (
        f"model: the configs and tokenizers that {model.weights.file} is read with are not on disk (those of "
        f"{' or '.join(names)} fit); fetch them with: jubako pull {model.name}"
    )
