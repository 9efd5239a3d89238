"""Weight sets: in which forms a model's weights exist, and what each of them asks of the machine.

``standard`` is safetensors run by PyTorch (``weights`` of a model); ``nvidia`` and ``amd`` are ONNX graphs
that the vendors publish, run by ONNX Runtime. That a vendor publishes none is said, with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, model_validator

__all__ = [
    "Absence",
    "GraphSet",
    "Precision",
    "Profile",
    "Requirement",
    "Slot",
    "Vendor",
    "VendorSets",
    "WeightsChoice",
]

Vendor = Literal["nvidia", "amd"]
WeightsChoice = Literal["auto", "standard", "nvidia", "amd"]

# Of what is computed; ``mixed`` is float16 inside of the graphs and float32 at their edges.
Precision = Literal["float32", "float16", "bfloat16", "float8", "mixed"]

# The parts of a pipeline that a graph can stand for.
Slot = Literal[
    "text_encoder", "text_encoder_2", "text_encoder_3", "unet", "transformer", "vae_decoder", "vae_encoder"
]


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


def _tuple(value: object) -> object:
    return (value,) if isinstance(value, str) else value


class Requirement(_Value):
    """What the graphs ask of the GPU.

    ``compute_capability`` is NVIDIA's (8.9 is Ada), ``architectures`` are AMD's (gfx942); unset, any will do.
    ``memory_gb`` is what all components together take while they run.
    """

    compute_capability: float | None = None
    architectures: tuple[str, ...] = ()
    memory_gb: float | None = Field(default=None, gt=0)


class Profile(_Value):
    """The shapes that engines are built for: sides in pixels, and numbers of rows, to the next of which
    forwards are padded. ``sides`` names the only sizes (width, height) of graphs that take no others.
    """

    min_side: int = Field(default=256, gt=0)
    max_side: int = Field(default=1360, gt=0)
    rows: tuple[int, ...] = Field(default=(1, 2, 4, 8), min_length=1)
    sizes: tuple[tuple[int, int], ...] = ()

    @model_validator(mode="after")
    def _rows_rise(self) -> Self:
        if list(self.rows) != sorted(set(self.rows)) or self.rows[0] < 1:
            raise ValueError("rows: give numbers of rows from the least to the most")
        return self

    def padded(self, rows: int) -> int:
        """The next number of rows that there is an engine for; of more than all, the most."""
        return next((each for each in self.rows if each >= rows), self.rows[-1])

    def allows(self, width: int, height: int) -> bool:
        """Whether an engine takes pictures of this size."""
        if self.sizes:
            return (width, height) in self.sizes
        return all(self.min_side <= side <= self.max_side for side in (width, height))


class GraphSet(_Value):
    """A vendor's graphs of one model in one precision.

    Files are named relative to ``repo`` (a repository of the Hugging Face hub) or ``folder`` (on this disk,
    relative to the catalog's file), below ``subfolder``; of several for one graph the first that is there.
    What ``graphs`` does not name comes from the model's standard weights and runs in PyTorch;
    ``torch_components`` says of which of these it is known to be so. Without ``licence`` that of the model
    holds.
    """

    repo: str | None = None
    revision: str = "main"
    folder: Path | None = None
    subfolder: str = ""
    layout: Vendor
    precision: Precision
    graphs: Mapping[Slot, Annotated[tuple[str, ...], BeforeValidator(_tuple)]] = Field(min_length=1)
    torch_components: tuple[str, ...] = ()
    hardware: Requirement = Requirement()
    profile: Profile = Profile()
    licence: str | None = None
    gated: bool = False
    status: Literal["verified-cpu-fixture", "untested-hardware"] = "untested-hardware"
    note: str = ""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.repo is None) == (self.folder is None):
            raise ValueError("give one of repo and folder")
        for name, files in (("subfolder", (self.subfolder,)), *self.graphs.items()):
            for path in map(PurePosixPath, files):
                if path.is_absolute() or ".." in path.parts:
                    raise ValueError(f"{name}: {path} does not lie below the set's folder")
        if not {"unet", "transformer"} & set(self.graphs):
            raise ValueError("graphs: a set has at least a denoiser: unet or transformer")
        return self

    def files(self, slot: Slot) -> tuple[str, ...]:
        """Where a graph may lie, relative to the repository or folder, the likeliest first."""
        return tuple(str(PurePosixPath(self.subfolder) / file) for file in self.graphs[slot])


class Absence(_Value):
    """A vendor publishes no graphs of this model, and why nothing stands in for them."""

    none: str = Field(min_length=1)


def _kind(value: Any) -> str:
    return "absence" if isinstance(value, Absence | Mapping) else "sets"


VendorSets = Annotated[
    Annotated[Absence, Tag("absence")] | Annotated[tuple[GraphSet, ...], Tag("sets")], Discriminator(_kind)
]
