"""The trainings of a home: their folders while they last, and the adapters that they become. No torch."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from jubako.adapters.store import AdapterStore
from jubako.disk import room_in
from jubako.errors import InvalidRequest
from jubako.jobs.record import Training
from jubako.media import MEDIA_TYPES
from jubako.result import File, Result
from jubako.settings import Settings
from jubako.training.folder import Event, TrainingFolder
from jubako.training.pictures import Accepted, keep
from jubako.training.plan import TrainingPlan
from jubako.training.process import train

__all__ = ["Trainings"]

logger = logging.getLogger(__name__)

Told = Callable[[Literal["progress", "checkpoint", "validation"], Mapping[str, Any]], None]

# A folder is there before the job that it is for: what is younger than this is not swept away.
GRACE_SECONDS = 3600.0
PREVIEW_SIDE = 256


class Trainings:
    """Prepares, runs and ends trainings; each lies in ``trainings/JOB`` until it has become an adapter.

    ``busy`` says whether the device is wanted for pictures now.
    """

    def __init__(self, settings: Settings, adapters: AdapterStore, busy: Callable[[], bool]) -> None:
        self._folder = settings.home / "trainings"
        self._processes = settings.training_processes
        self._adapters = adapters
        self._busy = busy

    def free_name(self, name: str) -> str:
        """The name, if no adapter has it."""
        if any(adapter.name == name for adapter in self._adapters):
            raise InvalidRequest(f"name: there is an adapter {name!r} already; take another", param="name")
        return name

    def prepare(self, job_id: str, plan: TrainingPlan, pictures: Sequence[Accepted]) -> None:
        """Write what the trainer needs: all of it, or nothing. DiskFull when there is no room for it."""
        partial, whole = self._folder / f".{job_id}.partial", self._folder / job_id
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with room_in("JUBAKO_HOME"):
                keep(pictures, partial / "images")
                TrainingFolder(partial).write_plan(plan, tuple(each.sha256 for each in pictures))
                partial.rename(whole)
        except OSError:
            if not whole.exists():  # else the same request came twice, and the other was quicker
                raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    async def run(self, job_id: str, training: Training, told: Told) -> Result:
        """Train, register the adapter, and give its file; GenerationFailed when it can't be made.

        A job that is begun again goes on where it was, also behind its last step; so does one that is tried
        again after DiskFull.
        """
        folder = TrainingFolder(self._folder / job_id)
        with room_in("JUBAKO_HOME"):
            if not folder.completed:
                await train(
                    folder, self._processes, lambda event: self._tell(folder, event, told), self._busy
                )
        card = json.loads(folder.card.read_text(encoding="utf-8"))
        self._register(job_id, folder, training, card)
        return Result(
            job_id=job_id,
            seed=card["settings"]["seed"],
            content_type=MEDIA_TYPES["safetensors"],
            content=folder.adapter.read_bytes(),
            variants={
                "card": File(content_type="application/json", content=folder.card.read_bytes()),
                "sheet": File(content_type="image/png", content=folder.sheet.read_bytes()),
            },
        )

    def remove(self, job_id: str) -> None:
        """Delete the folder of a training that is over, and with it the pictures."""
        shutil.rmtree(self._folder / job_id, ignore_errors=True)

    def sweep(self, unfinished: Iterable[str]) -> None:
        """Delete the folders of jobs that are over or gone, and what is left of adapters on their way."""
        self._adapters.sweep()
        kept = set(unfinished)
        for path in self._folder.glob("*"):
            name = re.sub(r"^\.|\.partial$", "", path.name)
            if name not in kept and path.stat().st_mtime < time.time() - GRACE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)

    def registered(self, job_id: str) -> str | None:
        """The name of the adapter that a job has become, if it is still there."""
        return next((adapter.name for adapter in self._adapters if adapter.card.get("job") == job_id), None)

    def _register(
        self, job_id: str, folder: TrainingFolder, training: Training, card: Mapping[str, Any]
    ) -> None:
        """Add the adapter under its name, or under one of its own if that was taken meanwhile."""
        name = self.registered(job_id)
        if name is None:
            taken = {adapter.name for adapter in self._adapters}
            name = training.name if training.name not in taken else f"{training.name[:55]}-{job_id[:8]}"
            self._adapters.add(name, folder.adapter, {**card, "job": job_id, "automatic": True})
            logger.info("job %s has become the adapter %s", job_id, name)
        place = self._adapters.find(name).file.parent
        with room_in("JUBAKO_HOME"):
            shutil.copyfile(folder.sheet, place / "sheet.png")
            if training.keep_images:
                shutil.copytree(folder.images, place / "images", dirs_exist_ok=True)

    def _tell(self, folder: TrainingFolder, event: Event, told: Told) -> None:
        facts = {key: value for key, value in event.items() if key not in {"type", "time", "file"}}
        match event["type"]:
            case "progress":
                told("progress", facts)
            case "checkpoint":
                told("checkpoint", facts)
            case "validation":
                told("validation", {**facts, "preview": _preview(folder.path / event["file"])})


def _preview(file: Path) -> str:
    """A small JPEG of a picture, in base64."""
    buffer = io.BytesIO()
    with Image.open(file) as image:
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        image.convert("RGB").save(buffer, "JPEG", quality=90)
    return base64.b64encode(buffer.getvalue()).decode()
