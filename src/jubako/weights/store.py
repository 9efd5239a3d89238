"""What is on disk: which folder holds a model's weights, without opening them and without torch.

Pulled weights lie in the Hugging Face cache, shared with other programs. A record under ``JUBAKO_HOME``
names the commit and the files of each model, so that a half-fetched model is not taken for a whole one.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from jubako.catalog import Model
from jubako.errors import ModelNotOnDisk

__all__ = [
    "WeightRecord",
    "find_weights",
    "read_record",
    "record_path",
    "require_weights",
    "size_on_disk",
    "write_record",
]


class WeightRecord(BaseModel):
    """What was pulled for a model: repository, resolved commit, folder and each file's size in bytes."""

    model_config = ConfigDict(frozen=True)

    model: str
    repo: str
    commit: str
    folder: Path
    files: dict[str, int]

    def is_whole(self) -> bool:
        """Whether every file is there with its size."""
        paths = ((self.folder / name, size) for name, size in self.files.items())
        return all(path.is_file() and path.stat().st_size == size for path, size in paths)


def record_path(home: Path, model: Model) -> Path:
    """Where a model's record lies."""
    return home / "weights" / f"{model.name}.json"


def read_record(home: Path, model: Model) -> WeightRecord | None:
    """The record of a pulled model of this catalog entry's repository; None when there is none to use."""
    try:
        record = WeightRecord.model_validate_json(record_path(home, model).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
    return record if record.repo == model.weights.repo else None


def write_record(home: Path, record: WeightRecord) -> None:
    """Write a record under a temporary name and rename it into place."""
    path = home / "weights" / f"{record.model}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(record.model_dump(mode="json"), indent=1), encoding="utf-8")
    temporary.replace(path)


def _layout_is_there(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def find_weights(home: Path, model: Model) -> Path | None:
    """The folder of the model's weights, or None when they are not (wholly) on disk."""
    if model.weights.folder is not None:
        return model.weights.folder if _layout_is_there(model.weights.folder) else None
    record = read_record(home, model)
    return record.folder if record is not None and record.is_whole() else None


def size_on_disk(home: Path, model: Model) -> int | None:
    """Bytes of the model's weights and configs, or None when they are not (wholly) on disk."""
    if (folder := find_weights(home, model)) is None:
        return None
    record = None if model.weights.folder is not None else read_record(home, model)
    if record is not None:
        return sum(record.files.values())
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def require_weights(home: Path, model: Model) -> Path:
    """The folder of the model's weights; ModelNotOnDisk names the command that fetches them."""
    if (folder := find_weights(home, model)) is not None:
        return folder
    raise ModelNotOnDisk(
        f"model: the weights of {model.name} are not on disk; fetch them with: jubako pull {model.name}",
        param="model",
    )
