"""What a goal came to: a figure, of how many, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Verdict", "told"]


@dataclass(frozen=True)
class Verdict:
    """One goal. ``figure`` and ``bound`` are of the same unit; ``count`` is of what it was measured on."""

    goal: str
    figure: float
    bound: float
    count: int
    at_least: bool = False

    @property
    def holds(self) -> bool:
        """Whether the figure is within the bound, and anything was measured at all."""
        within = self.figure >= self.bound if self.at_least else self.figure <= self.bound
        return within and self.count > 0


def told(verdicts: Iterable[Verdict]) -> str:
    """A line a goal."""
    return "\n".join(
        f"{'holds ' if each.holds else 'BROKEN'} {each.goal}: {each.figure:.4g} "
        f"({'at least' if each.at_least else 'at most'} {each.bound:g}; N = {each.count:,})"
        for each in verdicts
    )
