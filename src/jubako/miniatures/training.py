"""The training loop and what it needs: a budget, a learning rate, averaged weights, checkpoints, progress."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

CHECKPOINT_EVERY = 250


@dataclass
class Budget:
    """How long to train: a number of steps (reproducible) or, on a busy machine, minutes of wall time.

    The clock starts at the first look; `spent_s` carries the seconds of earlier, interrupted runs.
    """

    steps: int | None = None
    minutes: float | None = None
    spent_s: float = 0.0
    _started: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either steps or minutes")

    def elapsed_s(self) -> float:
        if self._started is None:
            self._started = time.monotonic()
        return self.spent_s + time.monotonic() - self._started

    def progress(self, step: int) -> float:
        """From 0 to 1."""
        if self.steps is not None:
            return min(1.0, step / self.steps)
        return min(1.0, self.elapsed_s() / (60 * (self.minutes or 1)))

    def remaining_s(self, step: int) -> float:
        done = self.progress(step)
        return self.elapsed_s() * (1 - done) / done if done > 0 else math.inf


def learning_rate(peak: float, step: int, progress: float, warmup_steps: int = 200) -> float:
    """Linear warm-up, then half a cosine from `peak` to 0."""
    return peak * min(1.0, (step + 1) / warmup_steps) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Record:
    """What a stage took and where it ended, for the figures beside the weights."""

    steps: int
    seconds: float
    losses: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Average:
    """An exponential moving average of a module's parameters, in float32; shorter memory at the start."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = [], []
        for name, parameter in module.named_parameters():
            mine.append(self.values[name])
            theirs.append(parameter.detach())
        torch._foreach_lerp_(mine, theirs, 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(self.values[name])


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write whole or not at all, so that an interrupted run can always resume."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def load_checkpoint(path: Path) -> dict[str, Any] | None:
    """The last state saved at `path`, tensors and plain values only; `None` when there is none."""
    if not path.exists():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state


class Progress:
    """Prints a line every `every` steps: step, share done, seconds left, running means of the losses."""

    def __init__(self, title: str, budget: Budget, every: int = 100) -> None:
        self.title, self.budget, self.every = title, budget, every
        self.means: dict[str, float] = {}

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint keeps of this."""
        return {"step": step, "seconds": self.budget.elapsed_s(), "losses": self.means}

    def resume(self, state: dict[str, Any]) -> int:
        """Take up a checkpoint's state; returns its step."""
        self.budget.spent_s, self.means = state["seconds"], state["losses"]
        return int(state["step"])

    def record(self, step: int) -> Record:
        losses = {name: round(mean, 5) for name, mean in self.means.items()}
        return Record(step, round(self.budget.elapsed_s(), 1), losses)

    def report(self, step: int, losses: Iterable[tuple[str, float]]) -> None:
        for name, loss in losses:
            self.means[name] = 0.98 * self.means.get(name, loss) + 0.02 * loss
        if step % self.every == 0:
            text = "  ".join(f"{name} {mean:.4f}" for name, mean in self.means.items())
            share, left = self.budget.progress(step), self.budget.remaining_s(step)
            print(f"{self.title} step {step:>6}  {share:6.1%}  {left:6.0f} s left  {text}", flush=True)


@dataclass(frozen=True)
class Group:
    """Parameters that share a peak learning rate and a weight decay.

    `orthogonal` matrices are stepped by Muon, all with the same spread, at AdamW's scale.
    """

    parameters: Sequence[nn.Parameter]
    peak: float
    weight_decay: float = 0.01
    orthogonal: bool = False

    def optimizer(self) -> torch.optim.Optimizer:
        if self.orthogonal:
            return torch.optim.Muon(
                self.parameters,
                lr=self.peak,
                weight_decay=self.weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        return torch.optim.AdamW(
            self.parameters, lr=self.peak, betas=(0.9, 0.99), weight_decay=self.weight_decay
        )


def fit(
    module: nn.Module,
    groups: Sequence[Group],
    losses: Callable[[int, float], tuple[torch.Tensor, dict[str, float]]],
    *,
    title: str,
    budget: Budget,
    checkpoint: Path,
    watch: Callable[[int, Average], None] = lambda _step, _average: None,
    watch_every: int = 1000,
) -> Record:
    """Train until the budget is spent and leave the averaged weights in `module`; resumes from `checkpoint`.

    `losses(step, progress)` gives the loss to descend and what to print of it; it must depend on nothing
    else, so that a resumed training draws what an uninterrupted one would have. `watch` looks on every
    `watch_every` steps.
    """
    optimizers = [group.optimizer() for group in groups]
    average, progress, step = Average(module), Progress(title, budget), 0
    if state := load_checkpoint(checkpoint):
        module.load_state_dict(state["model"])
        for optimizer, kept in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        average.values, step = state["average"], progress.resume(state)
    while budget.progress(step) < 1:
        loss, parts = losses(step, budget.progress(step))
        module.zero_grad(set_to_none=True)
        # The fused attention's bfloat16 backward is many times slower than plain arithmetic on a CPU.
        with sdpa_kernel(SDPBackend.MATH):
            loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group, optimizer in zip(groups, optimizers, strict=True):
            optimizer.param_groups[0]["lr"] = learning_rate(group.peak, step, budget.progress(step))
            optimizer.step()
        average.update(module, step)
        step += 1
        progress.report(step, parts.items())
        done = budget.progress(step) >= 1
        if step % CHECKPOINT_EVERY == 0 or done:
            state = {
                "model": module.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "average": average.values,
            }
            save_checkpoint(checkpoint, state | progress.state(step))
        if step % watch_every == 0 and not done:
            watch(step, average)
    average.copy_to(module)
    return progress.record(step)
