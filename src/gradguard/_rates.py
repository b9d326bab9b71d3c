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
"""Factor by which the rate that does best in so few steps is lowered in the end, at most. Ours: in eight steps the best
rate is one that a whole run does not bear; of 102 sick runs half a decade below it cures 94, the rate itself 84."""

_MODEST = 7e-3
"""Median ratio of update to weight up to which it is lowered by less. Source: ours: where steps are that small the best
rate is borne; with this 98 of those 102 are cured, as with every limit from 5e-3 to 1e-2. Karpathy's rule of thumb for
long runs, CS231n notes, is 1e-3."""

_DECADES = 8
"""Decades searched at most. Ours: a rate of 1e-8 that should be 1 is the worst of the clinic."""

_PATIENCE = 2
"""Decades in a row without a better loss after which the search ends. Ours."""


_FLAT = 0.01
"""Share of the loss by which a decade must lower it to tell anything. Ours: of one batch and the next."""

_USUAL_RATIO = 1e-3
"""Median ratio of update to weight to aim at where no loss tells. Source: Karpathy, CS231n notes."""

_FAST = 1e-2
"""The same above which a search upwards ends even where no loss has told anything. Source: as above."""


def search_rate(attempt: Callable[[float, int], tuple[float, float]], *, up: bool) -> float:
    """Return the factor for the learning rate that gives the lowest loss, less a margin for the steps to come.

    Where no higher rate moves the loss within a few steps, it is the one at which steps are of usual size.

    Args:
        attempt: Trains with a factor for so many steps and returns the loss, inf where that diverges, and the median
            ratio of update to weight, NaN where that is not known.
        up: Whether to search upwards.
    """
    coarse: dict[float, float] = {}
    ratios: dict[float, float] = {}
    worse = 0
    for decade in range(1, _DECADES + 1):
        factor = 10.0 ** (decade if up else -decade)
        best = min(coarse.values(), default=math.inf)
        coarse[factor], ratios[factor] = attempt(factor, _FIRST_STEPS)
        lost = math.isinf(best) and not up  # lower rates may hold where all so far diverge
        worse = 0 if lost or coarse[factor] < best else worse + 1
        silent = up and best > (1.0 - _FLAT) * coarse[10.0]
        if worse >= _PATIENCE and not (silent and ratios[factor] < _FAST):
            break
    if up and min(coarse.values()) > (1.0 - _FLAT) * coarse[10.0] > 0.0 and 0.0 < ratios[10.0] < _USUAL_RATIO:
        known = {factor: ratio for factor, ratio in ratios.items() if 0.0 < ratio < math.inf}
        nearest = min(known, key=lambda factor: abs(math.log(known[factor] / _USUAL_RATIO)))
        return nearest * _USUAL_RATIO / known[nearest]
    middle = _best(coarse, up=up)
    fine = {factor: attempt(factor, _STEPS) for factor in (middle, middle / HALF_A_DECADE, middle * HALF_A_DECADE)}
    factor = _best({factor: loss for factor, (loss, _) in fine.items()}, up=up)
    ratio = fine[factor][1]
    spare = _MODEST * _MARGIN / ratio if ratio > 0.0 else 1.0
    return factor / _MARGIN * min(_MARGIN, max(1.0, spare))


def _best(losses: dict[float, float], *, up: bool) -> float:
    """Return the factor of the lowest loss; downwards the highest whose loss is as good, since no step is no cure."""
    lowest = min(losses.values())
    if up or not 0.0 < lowest < math.inf:
        return min(losses, key=lambda factor: losses[factor])
    return max(factor for factor, loss in losses.items() if loss <= (1.0 + _FLAT) * lowest)
