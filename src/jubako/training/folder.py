"""The folder of one training: what lies where, events as lines of JSON, files that are whole or not there.

    plan.json  images/000.png …                           what the trainer is given
    events.jsonl  checkpoints/00000050/  validation/00000050.png   what it writes on its way
    adapter.safetensors  card.json  sheet.png             what it ends with
    held                                                  there while others are to have the device

No torch: whoever starts the trainer reads and writes this too.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from jubako.errors import InvalidRequest
from jubako.training.plan import TrainingPlan

__all__ = ["Event", "EventType", "TrainingFolder", "replaced", "write_whole"]

EventType = Literal["started", "progress", "validation", "checkpoint", "completed", "failed"]
Event = Mapping[str, Any]

CHECKPOINTS_KEPT = 2
_PARTIAL = ".partial"


class TrainingFolder:
    """One training's folder, which exists already."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.images = path / "images"
        self.checkpoints = path / "checkpoints"
        self.validation = path / "validation"
        self.events = path / "events.jsonl"
        self.adapter = path / "adapter.safetensors"
        self.card = path / "card.json"
        self.sheet = path / "sheet.png"
        self.cache = path / "cache.safetensors"
        self._held = path / "held"

    def write_plan(self, plan: TrainingPlan, sha256: tuple[str, ...]) -> None:
        """What is to be done, and the hashes of the files that the pictures were."""
        document = {"plan": plan.model_dump(mode="json"), "sha256": list(sha256)}
        write_whole(self.path / "plan.json", json.dumps(document, indent=1).encode())

    def read_plan(self) -> tuple[TrainingPlan, tuple[str, ...]]:
        """What ``write_plan`` wrote; InvalidRequest when it can't be read."""
        try:
            document = json.loads((self.path / "plan.json").read_text(encoding="utf-8"))
            return TrainingPlan.model_validate(document["plan"]), tuple(map(str, document["sha256"]))
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise InvalidRequest(f"plan.json: it can't be read: {error}") from error

    def tell(self, kind: EventType, **facts: Any) -> None:
        """Append an event; it is on its way to the disk before this returns."""
        line = json.dumps({"type": kind, "time": round(time.time(), 3), **facts}) + "\n"
        with self.events.open("ab") as file:
            if file.tell() > 0 and not self._ends_with_a_line():
                line = "\n" + line
            file.write(line.encode())

    def read_events(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """Events with the offset behind each, from an offset on; half a line is left for the next time."""
        if not self.events.exists():
            return
        with self.events.open("rb") as file:
            file.seek(after)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                after += len(line)
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # cut off by a kill
                if isinstance(event, dict):
                    yield after, event

    @property
    def completed(self) -> bool:
        """Whether the adapter and its card are there; the card comes last."""
        return self.adapter.is_file() and self.card.is_file()

    def latest_checkpoint(self) -> Path | None:
        """The last whole checkpoint."""
        whole = self._whole_checkpoints()
        return whole[-1] if whole else None

    def add_checkpoint(self, step: int, write: Callable[[Path], None]) -> Path:
        """Let a checkpoint be written, then give it its name and drop all but the last two."""
        place = self.checkpoints / f"{step:08}"
        partial = place.with_name(place.name + _PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        for file in partial.iterdir():
            _synced(file)
        _synced(partial)
        if place.exists():
            _drop(place)
        partial.rename(place)
        _synced(self.checkpoints)
        for old in self._whole_checkpoints()[:-CHECKPOINTS_KEPT]:
            _drop(old)
        return place

    @property
    def held(self) -> bool:
        """Whether the trainer is to wait between two steps."""
        return self._held.exists()

    def hold(self, held: bool) -> None:
        """Have the trainer wait, or go on."""
        if held:
            self._held.touch()
        else:
            self._held.unlink(missing_ok=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """For one trainer at a time; the next one waits until the one before has ended."""
        with (self.path / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def sweep(self) -> None:
        """Remove what an earlier trainer was killed over."""
        for rest in (*self.path.glob(f"*{_PARTIAL}"), *self.checkpoints.glob(f"*{_PARTIAL}")):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()

    def _whole_checkpoints(self) -> list[Path]:
        return sorted(each for each in self.checkpoints.glob("[0-9]*") if each.name.isdigit())

    def _ends_with_a_line(self) -> bool:
        with self.events.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def write_whole(place: Path, content: bytes) -> None:
    """The file with this content, or as it was."""
    with replaced(place) as partial:
        partial.write_bytes(content)


@contextmanager
def replaced(place: Path) -> Iterator[Path]:
    """A name to write a file under; at the end it is on the disk and has its own, or is gone."""
    partial = place.with_name(place.name + _PARTIAL)
    try:
        yield partial
        _synced(partial)
        partial.replace(place)
    finally:
        partial.unlink(missing_ok=True)
    _synced(place.parent)


def _drop(checkpoint: Path) -> None:
    """Remove a checkpoint, whose name is gone first: one that is half removed must not look whole."""
    gone = checkpoint.with_name(checkpoint.name + "-old" + _PARTIAL)
    shutil.rmtree(gone, ignore_errors=True)
    checkpoint.rename(gone)
    shutil.rmtree(gone)


def _synced(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
