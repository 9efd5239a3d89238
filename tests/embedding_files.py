"""Embedding files in the formats of the trainers, with random vectors."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["embedding_file"]


def embedding_file(file: Path, seed: int = 0, /, **shapes: tuple[int, ...]) -> Path:
    """A file of one tensor of these names and shapes each, as large as those of a random text encoder."""
    generator = torch.Generator().manual_seed(seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, file)
    return file
