"""Where a model's weights come from: a repository, a folder, one file, or a worker that has them."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

__all__ = ["HubFile", "Overlay", "WeightSource", "Worker"]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _safetensors(file: Path | str) -> None:
    suffix = Path(file).suffix.lower()
    if suffix in {".bin", ".ckpt", ".pkl", ".pt", ".pth"}:
        raise ValueError(
            f"{Path(file).name} is a pickle, which can run any code when it is opened, so Jubako opens none: "
            "convert it to .safetensors, or take the .safetensors file that most authors publish beside it"
        )
    if suffix != ".safetensors":
        raise ValueError(f"{Path(file).name} is no .safetensors file")


def _inside(file: str, repo: str) -> None:
    path = PurePosixPath(file)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"file: {file} is no file of {repo}")


class HubFile(_Value):
    """One safetensors file of a repository."""

    repo: str
    revision: str = "main"
    file: str

    @model_validator(mode="after")
    def _file_is_safe(self) -> Self:
        _safetensors(self.file)
        _inside(self.file, self.repo)
        return self


class Overlay(_Value):
    """One safetensors file laid over a model: the whole denoiser, a LoRA that is fused into it, the motion
    modules of AnimateDiff, or the denoiser and the autoencoder under their authors' original names (SV3D).

    The file lies in the overlay's repository; without one on this disk, relative to the catalog's file.
    """

    repo: str | None = None
    revision: str = "main"
    file: str
    kind: Literal["denoiser", "lora", "motion", "original"] = "denoiser"

    @model_validator(mode="after")
    def _file_is_safe(self) -> Self:
        _safetensors(self.file)
        if self.repo is not None:
            _inside(self.file, self.repo)
        return self


class Worker(_Value):
    """A program of its own for a model that can't share this environment; ``docs/workers.md`` says how.

    Without ``url`` the model is listed, but not served.
    """

    url: str | None = None
    health_path: str = Field(default="/health", pattern="^/")
    timeout: float = Field(default=300.0, gt=0, description="Seconds")


class WeightSource(_Value):
    """Where files come from: a repository of the Hugging Face hub, a folder, or one file of all weights.

    Folders and files are relative to the catalog's file. ``config`` names the model of the catalog whose
    configs and tokenizers a single file is read with; unset, it is detected. ``text_encoder_3: false`` leaves
    out SD3's T5 and its tokenizer.
    """

    repo: str | None = None
    revision: str = "main"
    variant: str | None = None
    folder: Path | None = None
    file: Path | None = None
    config: str | None = None
    overlay: Overlay | None = None
    worker: Worker | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    components_left_out: tuple[str, ...] = ()
    text_encoder_3: bool = True

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(source is not None for source in (self.repo, self.folder, self.file, self.worker)) != 1:
            raise ValueError("give one of repo, folder, file and worker")
        if self.file is not None:
            _safetensors(self.file)
        elif self.config is not None:
            raise ValueError("config goes with file: a repository and a folder have their own configs")
        return self

    @property
    def left_out(self) -> tuple[str, ...]:
        """The components that are neither fetched nor loaded."""
        t5 = () if self.text_encoder_3 else ("text_encoder_3", "tokenizer_3")
        return (*self.components_left_out, *t5)
