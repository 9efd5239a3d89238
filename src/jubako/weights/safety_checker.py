"""Stable Diffusion's safety checker: a CLIP that compares a picture with concepts, each with its threshold.

Read from safetensors alone and wholly: a weight that is missing would be left random, and the checker would
say anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError

from jubako.catalog import CheckerEntry
from jubako.errors import ModelNotOnDisk, UnusableWeights
from jubako.weights.layout import CHECKER_FILES
from jubako.weights.store import read_checker_record

__all__ = ["SafetyChecker", "load_safety_checker"]


class SafetyChecker:
    """The :class:`jubako.safety.Checker` that came with Stable Diffusion 1."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor

    @torch.inference_mode()
    def flags(self, pictures: Sequence[Image.Image]) -> Sequence[bool]:
        """Whether a concept is nearer than its threshold, of each picture."""
        pixels = self._processor(list(pictures), return_tensors="pt").pixel_values
        # It blackens what it flags, of which only the flags are wanted here.
        _, flagged = self._model(
            clip_input=pixels.to(self._model.device, self._model.dtype), images=np.zeros((len(pictures), 1))
        )
        return [bool(flag) for flag in flagged]


def load_safety_checker(entry: CheckerEntry, home: Path, device: torch.device) -> SafetyChecker:
    """The checker in memory, in float32 on a CPU and float16 elsewhere; ModelNotOnDisk, UnusableWeights."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    folder = _folder(entry, home)
    try:
        # It knows the names that published files have.
        model, told = StableDiffusionSafetyChecker.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
        processor = CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UnusableWeights(f"{entry.name} in {folder} can't be loaded: {reason}") from error
    if missing := sorted(told["missing_keys"]):
        raise UnusableWeights(f"{entry.name} in {folder} has no {', '.join(missing)}")
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    return SafetyChecker(model.to(device, dtype).eval(), processor)


def _folder(entry: CheckerEntry, home: Path) -> Path:
    record = read_checker_record(home, entry)
    folder = entry.folder or (record.folder if record else None)
    if folder is None:
        raise ModelNotOnDisk(f"{entry.name} is not on disk; fetch it with: jubako pull {entry.name}")
    for name in CHECKER_FILES:
        if not (folder / name).is_file():
            raise ModelNotOnDisk(f"{entry.name} in {folder} has no {name}")
    return folder
