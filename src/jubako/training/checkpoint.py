"""A training's state between two steps: the adapter so far, the optimizer's moments, the losses.

Every step draws its chance from the seed and its own number, so that no generator's state needs to be kept: a
resumed training sees what an uninterrupted one would have. Safetensors and JSON only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from jubako.errors import JubakoError
from jubako.training.folder import TrainingFolder
from jubako.training.learner import Learner

__all__ = ["Progress", "restore", "save"]


@dataclass
class Progress:
    """How far a training is: steps done, each one's loss, and the seconds that they took."""

    step: int
    losses: list[float]
    seconds: float

    @property
    def recent_loss(self) -> float:
        """The mean of the last 20 steps."""
        recent = self.losses[-20:]
        return round(sum(recent) / max(1, len(recent)), 5)


def save(
    folder: TrainingFolder, learner: Learner, optimizer: torch.optim.Optimizer, progress: Progress
) -> Path:
    """Write a checkpoint of this step; it is there whole or not at all."""

    def write(place: Path) -> None:
        learner.write(place / "adapter.safetensors")
        save_file(_moments(optimizer), place / "optimizer.safetensors")
        state = {"step": progress.step, "seconds": round(progress.seconds, 2), "losses": progress.losses}
        (place / "state.json").write_text(json.dumps(state), encoding="utf-8")

    return folder.add_checkpoint(progress.step, write)


def restore(place: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> Progress:
    """Take up a checkpoint; JubakoError when it does not belong to this plan."""
    try:
        state = json.loads((place / "state.json").read_text(encoding="utf-8"))
        learner.read(place / "adapter.safetensors")
        _take_up(optimizer, load_file(place / "optimizer.safetensors"))
        return Progress(
            int(state["step"]), [float(loss) for loss in state["losses"]], float(state["seconds"])
        )
    except (KeyError, ValueError, RuntimeError, OSError) as error:
        raise JubakoError(
            f"the checkpoint {place.name} can't be taken up ({error}); remove it to begin before it"
        ) from error


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    state: dict[int, dict[str, Any]] = optimizer.state_dict()["state"]
    return {
        f"{number}.{name}": torch.as_tensor(value).cpu().contiguous()
        for number, values in state.items()
        for name, value in values.items()
    }


def _take_up(optimizer: torch.optim.Optimizer, moments: dict[str, torch.Tensor]) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in moments.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    document = optimizer.state_dict()
    optimizer.load_state_dict({**document, "state": state})
