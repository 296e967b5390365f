"""Choose among predictors: the cheapest that predicts about as well as the best, and say why.

Pure: what was measured goes in, a choice comes out. Used for each layer and distance by itself.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# So that 0.70 is within 0.02 of 0.72, which it is not in binary fractions.
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A predictor as measured for one layer and distance."""

    name: str
    score: float
    """Recall of the top k on held-out sequences, or another score of which more is better."""
    cost_us: float
    """Cost of one prediction, in microseconds."""

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("name must not be empty")
        if not math.isfinite(self.score):
            raise ValueError(f"{self.name}: score must be finite, got {self.score}")
        if not (math.isfinite(self.cost_us) and self.cost_us >= 0):
            raise ValueError(f"{self.name}: cost_us must be finite and >= 0, got {self.cost_us}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The candidate to use, and one sentence that says why."""

    name: str
    reason: str


def choose(candidates: Sequence[Candidate], tolerance: float) -> Choice:
    """The cheapest candidate whose score is at most `tolerance` below the best one's.

    Of equally cheap ones the higher score wins, then the name that sorts first: the order of candidates is irrelevant.

    Raises: ValueError without candidates, if two share a name, or for a negative tolerance.
    """
    if not candidates:
        raise ValueError("candidates must not be empty")
    names = [candidate.name for candidate in candidates]
    if len(set(names)) < len(names):
        raise ValueError(f"candidates must have different names, got {', '.join(sorted(names))}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    best = min(candidates, key=lambda candidate: (-candidate.score, candidate.cost_us, candidate.name))
    near = [candidate for candidate in candidates if best.score - candidate.score <= tolerance + _ROUNDING]
    chosen = min(near, key=lambda candidate: (candidate.cost_us, -candidate.score, candidate.name))
    return Choice(name=chosen.name, reason=_reason(chosen, best, candidates, tolerance))


def _reason(chosen: Candidate, best: Candidate, candidates: Sequence[Candidate], tolerance: float) -> str:
    if len(candidates) == 1:
        return f"{chosen.name}: {chosen.score:.2f}, the only candidate, {_cost(chosen)}"
    if chosen is not best:
        return (
            f"{chosen.name}: {chosen.score:.2f}, within {tolerance:g} of the best ({best.name} {best.score:.2f}), "
            f"{_cost(chosen)} instead of {_cost(best)}"
        )
    cheaper = [candidate for candidate in candidates if candidate.cost_us < chosen.cost_us]
    if not cheaper:
        return f"{chosen.name}: {chosen.score:.2f}, the best, and none is cheaper, {_cost(chosen)}"
    next_best = min(cheaper, key=lambda candidate: (-candidate.score, candidate.cost_us, candidate.name))
    return (
        f"{chosen.name}: {chosen.score:.2f}, the best, {_cost(chosen)}; no cheaper one is within {tolerance:g} "
        f"({next_best.name} {next_best.score:.2f})"
    )


def _cost(candidate: Candidate) -> str:
    return f"{candidate.cost_us:.3g} µs"
