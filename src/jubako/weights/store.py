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
from jubako.disk import room_in
from jubako.errors import ModelNotOnDisk, UnusableWeights
from jubako.weights.layout import INDEX
from jubako.weights.manifest import Manifest, listed
from jubako.weights.siblings import siblings

__all__ = [
    "OverlayRecord",
    "WeightRecord",
    "files_of",
    "find_configs",
    "find_overlay",
    "find_weights",
    "first_torn",
    "manifests_of",
    "read_checker_record",
    "read_record",
    "record_path",
    "require_configs",
    "require_own_files",
    "require_weights",
    "size_on_disk",
    "write_document",
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
    sha256: str = ""


class WeightRecord(BaseModel):
    """What was pulled for a model: repository, commit, folder, each file's size in bytes and its SHA-256.

    A model that is one file of the user's has a record of the configs that were pulled for it (``config``
    names the model that they are of), and a folder of the user's with an overlay has one of the overlay.
    """

    model_config = ConfigDict(frozen=True)

    model: str
    repo: str = ""
    commit: str = ""
    folder: Path
    files: dict[str, int] = {}
    digests: dict[str, str] = {}
    left_out: tuple[str, ...] = ()
    config: str | None = None
    overlay: OverlayRecord | None = None

    def is_whole(self) -> bool:
        """Whether every file is there with its size."""
        return self.torn() is None

    def torn(self) -> Path | None:
        """The first file that is not there with its size."""
        sizes = [(self.folder / name, size) for name, size in self.files.items()]
        if self.overlay is not None:
            sizes.append((self.overlay.folder / self.overlay.file, self.overlay.size))
        return first_torn(sizes)

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        """What the files must contain; records of older versions do not know."""
        own, overlay = Manifest(self.folder, self.digests), self.overlay
        if overlay is None or not overlay.sha256:
            return (own,)
        return own, Manifest(overlay.folder, {overlay.file: overlay.sha256})

    def is_for(self, model: Model) -> bool:
        """Whether this is what the model's entry asks for now: entries are edited, records stay."""
        weights = model.weights
        overlay = weights.overlay if weights.overlay and weights.overlay.repo else None
        wanted = (overlay.repo, overlay.file, overlay.kind) if overlay else None
        had = (self.overlay.repo, self.overlay.file, self.overlay.kind) if self.overlay else None
        source = weights.config in {None, self.config} if weights.file else self.repo == (weights.repo or "")
        return source and wanted == had and set(self.left_out) <= set(weights.left_out)


def first_torn(sizes: Iterable[tuple[Path, int]]) -> Path | None:
    """The first of these files that is not there with its size."""
    return next(
        (path for path, size in sizes if not path.is_file() or path.stat().st_size != size),
        None,
    )


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
    """Write a record under a temporary name and rename it into place. DiskFull when there is no room."""
    write_document(home / "weights" / f"{record.model}.json", record)


def write_document(path: Path, document: BaseModel) -> None:
    """A record as JSON below ``JUBAKO_HOME``, whole or as it was."""
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        with room_in("JUBAKO_HOME"):
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(document.model_dump(mode="json"), indent=1), encoding="utf-8")
            temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


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
    if find_weights(home, model, models) is None:
        return None
    return sum(path.stat().st_size for path in files_of(home, model))


def files_of(home: Path, model: Model) -> tuple[Path, ...]:
    """The files of the model's weights and configs, whether they are there or not."""
    weights, record = model.weights, read_record(home, model)
    paths: Iterable[Path]
    if weights.folder is not None:
        paths = sorted(path for path in weights.folder.rglob("*") if path.is_file())
    elif weights.file is not None:
        paths = [weights.file]
    else:
        paths = [record.folder / name for name in record.files] if record else []
    overlay = weights.overlay
    if overlay is None:
        return tuple(paths)
    if overlay.repo is None:
        return (*paths, Path(overlay.file))
    arrived = record.overlay if record else None
    return (*paths, *([arrived.folder / arrived.file] if arrived else []))


def manifests_of(home: Path, model: Model) -> tuple[Manifest, ...]:
    """What the model's files must contain, as far as a pull has recorded it or a list beside them says so."""
    record, folder = read_record(home, model), model.weights.folder
    own = listed(folder) if folder is not None else None
    return (*(record.manifests if record else ()), *([own] if own else []))


def require_weights(home: Path, model: Model, models: Mapping[str, Model] = _NONE) -> Path:
    """The folder of the model's weights, or its single file; ModelNotOnDisk says what to do."""
    if (found := find_weights(home, model, models)) is not None:
        return found
    require_own_files(model)
    record = read_record(home, model)
    torn = f" ({path} is missing or cut off)" if record and (path := record.torn()) else ""
    raise ModelNotOnDisk(_not_on_disk(model, models) + torn, param="model")


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
