"""Muon for convolutions too, in single precision.

torch's takes only matrices and orthogonalizes them in bfloat16, which CPUs without such arithmetic imitate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jubako.miniatures.training import Group

MOMENTUM = 0.95
_STEPS = 5
# Newton-Schulz' quintic, https://kellerjordan.github.io/posts/muon/
_A, _B, _C = 3.4445, -4.7750, 2.0315


@dataclass(frozen=True)
class OrthogonalGroup(Group):
    """Parameters of two or more dimensions, each seen as a matrix of its outputs by everything else."""

    def optimizer(self) -> torch.optim.Optimizer:
        return Muon(self.parameters, {"lr": self.peak, "weight_decay": self.weight_decay})


class Muon(torch.optim.Optimizer):
    """Steps in the direction of the nearest orthogonal matrix, as long as AdamW's would be."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # noqa: ARG002 - torch passes none
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group["lr"], group["weight_decay"])

    def _step(self, parameter: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        mean = state.setdefault("mean", torch.zeros_like(gradient))
        mean.lerp_(gradient, 1 - MOMENTUM)
        direction = gradient.lerp(mean, MOMENTUM).flatten(1)
        length = 0.2 * max(direction.shape) ** 0.5
        parameter.mul_(1 - rate * decay)
        parameter.add_(orthogonal(direction).view_as(parameter), alpha=-rate * length)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix of the same singular vectors whose singular values are all about 1."""
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    made: torch.Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(_STEPS):
        square = made @ made.T
        made = _A * made + (_B * square + _C * square @ square) @ made
    return made.T if tall else made
