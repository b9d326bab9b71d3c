"""When the steps of a copy are too long for its loss, or far too short, and which other rates to try then."""

from __future__ import annotations

import math

from gradguard._race import Lane
from gradguard._rates import HALF_A_DECADE

__all__ = ["EASED", "OVERSHOOTS", "UNDERSHOOTS", "does_better", "halved"]

EASED = (1.0 / HALF_A_DECADE, 0.1)
"""Factors at which a cure is tried again."""

OVERSHOOTS = 0.5
"""Share of the gain that the gradient promises, below which lower rates are tried. Ours; along a parabola a step that
ends at its minimum gains one half, one half as long three quarters (Nocedal and Wright, Numerical Optimization, 2006,
chapter 3)."""

UNDERSHOOTS = 0.97
"""Share of it from which steps are so short that the loss is a straight line along them, and longer ones are tried.
Ours: of 8 sick runs cured by such steps and trained to their ends at three times the rate none ended worse, six better
by 0.03 to 0.25."""

_HALF = 0.5
"""Share of the first loss at which a cure does well enough. Ours: of 22 runs in which a lower rate was chosen it made
none better by more than 0.02 whose loss had fallen further."""


def halved(lane: Lane, control: Lane) -> bool:
    """Whether a copy ends below half the loss that the untreated one began with."""
    first = control.losses[0] if control.losses else math.nan
    return lane.result < _HALF * first


def does_better(other: Lane, given: Lane, *, share: float) -> bool:
    """Whether a copy at another rate ends below one at the rate that was given, by more than a share of its loss."""
    if not math.isfinite(given.result):
        return math.isfinite(other.result)
    return given.result - other.result > share * abs(given.result)
