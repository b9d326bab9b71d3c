"""The search for a learning rate: by decades, then between them."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["HALF_A_DECADE", "search_rate"]

HALF_A_DECADE = math.sqrt(10.0)
"""Factor between the rates that are told apart."""

_FIRST_STEPS = 3
"""Steps for which each decade is tried. Ours: a rate that is too high shows in three."""

_STEPS = 8
"""Steps for which the best decade and what lies around it are tried. Ours."""

_MARGIN = HALF_A_DECADE
"""Factor by which the rate that does best in so few steps is lowered in the end. Ours: in eight steps the best rate is
one that a whole run does not bear; of 21 sick runs half a decade below it ends within 5 % of the best rate in 19, the
rate itself in 16 (17 after six steps)."""

_DECADES = 8
"""Decades searched at most. Ours: a rate of 1e-8 that should be 1 is the worst of the clinic."""

_PATIENCE = 2
"""Decades in a row without a better loss after which the search ends. Ours."""


def search_rate(attempt: Callable[[float, int], float], *, up: bool) -> float:
    """Return the factor for the learning rate that gives the lowest loss, less a margin for the steps to come.

    Args:
        attempt: Trains with a factor for so many steps and returns the loss, inf where that diverges.
        up: Whether to search upwards.
    """
    coarse: dict[float, float] = {}
    worse = 0
    for decade in range(1, _DECADES + 1):
        factor = 10.0 ** (decade if up else -decade)
        best = min(coarse.values(), default=math.inf)
        coarse[factor] = attempt(factor, _FIRST_STEPS)
        worse = 0 if coarse[factor] < best else worse + 1
        if worse == _PATIENCE:
            break
    middle = min(coarse, key=lambda factor: coarse[factor])
    fine = {factor: attempt(factor, _STEPS) for factor in (middle / HALF_A_DECADE, middle, middle * HALF_A_DECADE)}
    return min(fine, key=lambda factor: fine[factor]) / _MARGIN
