"""What comes back from a family for one job. A failure is a value too, since it crosses processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

from jubako.errors import JubakoError, from_body

__all__ = ["File", "Progress", "Result", "Timings"]


class Timings(BaseModel):
    """Where a job's time went, in seconds."""

    model_config = ConfigDict(frozen=True)

    queued: float
    prepared: float
    denoised: float
    decoded: float
    encoded: float

    @property
    def total(self) -> float:
        """From the job's arrival to its file."""
        return self.queued + self.prepared + self.denoised + self.decoded + self.encoded


class Progress(BaseModel):
    """A job's step count after one more step; ``preview`` is a small JPEG of it so far, or empty."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    job_id: str
    step: int
    steps: int
    preview: bytes = b""


class File(BaseModel):
    """A file's content. No field may be called ``media_type``, see :class:`Result`."""

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    content_type: str
    content: bytes


class Result(BaseModel):
    """The file of one job, or its error in the shape that clients see.

    ``variants`` are further files by name: a clip's ``thumbnail`` and ``spritesheet``, an object's
    ``turntable`` or ``mesh``. ``fingerprint`` is near for what looks alike; empty where nobody asks for it.
    ``flagged`` is what the safety checker said; None where none has looked.

    No field may be called ``media_type``: BentoML's own attribute of that name would take its place.
    """

    model_config = ConfigDict(frozen=True, ser_json_bytes="base64", val_json_bytes="base64")

    job_id: str
    seed: int
    content_type: str = ""
    content: bytes = b""
    variants: Mapping[str, File] = {}
    timings: Timings | None = None
    fingerprint: str = ""
    flagged: bool | None = None
    error: Mapping[str, Any] | None = None

    @classmethod
    def failed(cls, job_id: str, seed: int, error: JubakoError) -> Result:
        """The result of a job that ended in an error."""
        return cls(job_id=job_id, seed=seed, error=error.body())

    def checked(self) -> Result:
        """This result, or its error raised."""
        if self.error is not None:
            raise from_body(self.error)
        return self
