"""A job: a request made complete and legal. Nothing after planning has a choice left to make."""

from __future__ import annotations

import hashlib
import uuid
from typing import Any

from pydantic import BaseModel, ConfigDict

from jubako.request import OutputFormat, SkipLayerGuidance, Task

__all__ = [
    "Clip",
    "EmbeddingUse",
    "Job",
    "LoraUse",
    "MicroConditioning",
    "Refinement",
    "Solid",
    "new_id",
]


class MicroConditioning(BaseModel):
    """What SDXL is told of a picture beside the prompt, in pixels; sizes are (width, height)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    original_size: tuple[int, int]
    crop: tuple[int, int]
    target_size: tuple[int, int]


class Refinement(BaseModel):
    """The model that takes over once this share of the steps is done."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    after: float


class LoraUse(BaseModel):
    """An adapter of a job: its weight, and the SHA-256 of the file that its name stood for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    weight: float
    sha256: str = ""


class EmbeddingUse(BaseModel):
    """An embedding of a job's prompts, where they have its tag, and the SHA-256 of its file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    sha256: str = ""


class Clip(BaseModel):
    """What a video model is told beside the picture, and how its frames are decoded and shown.

    ``fps`` is the rate at which the file plays; guidance rises from ``min_guidance_scale`` in the first frame
    to the job's ``guidance_scale`` in the last. What a model does not take is None.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_frames: int
    fps: int
    decode_chunk_size: int
    motion_bucket_id: int | None = None
    noise_aug_strength: float | None = None
    min_guidance_scale: float | None = None


class Solid(BaseModel):
    """How an object becomes a file: its surface's grid, and the views of the turntable, in pixels."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    grid_size: int
    frame_size: int
    turntable: bool


class Job(BaseModel):
    """One picture, clip or object to make.

    ``image`` and ``mask`` are PNG files of the job's own size, the mask white where to paint; what a task or
    a model has no use for is None. ``source`` is the job whose picture this one starts from; it comes first.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    id: str
    task: Task
    family: str
    model: str
    prompt: str
    negative_prompt: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    scheduler: str
    seed: int
    image: bytes | None = None
    mask: bytes | None = None
    strength: float | None = None
    refinement: Refinement | None = None
    micro_conditioning: MicroConditioning | None = None
    max_sequence_length: int | None = None
    skip_layer_guidance: SkipLayerGuidance | None = None
    loras: tuple[LoraUse, ...] = ()
    embeddings: tuple[EmbeddingUse, ...] = ()
    clip: Clip | None = None
    solid: Solid | None = None
    source: Job | None = None
    output_format: OutputFormat
    output_compression: int
    warnings: tuple[str, ...] = ()

    def siblings(self, n: int) -> list[Job]:
        """This job ``n`` times, each with an id of its own and the next seed."""
        return [self.model_copy(update={"id": new_id(), "seed": (self.seed + i) % 2**63}) for i in range(n)]

    def described(self) -> dict[str, Any]:
        """What is set, as JSON; pictures by the SHA-256 of their files."""
        left_out = {"image", "mask", "warnings", "source"}
        left_out |= {name for name in ("loras", "embeddings") if not getattr(self, name)}
        fields = self.model_dump(mode="json", exclude=left_out, exclude_none=True)
        if self.source is not None:
            fields["source"] = self.source.described()
        pictures = {"image": self.image, "mask": self.mask}
        hashes = {
            f"{name}_sha256": hashlib.sha256(data).hexdigest() for name, data in pictures.items() if data
        }
        return fields | hashes


def new_id() -> str:
    """An id that no other job has."""
    return uuid.uuid4().hex
