"""The search for a learning rate: by decades, then between them."""

from __future__ import annotations

import math
from collections.abc import Callable

__all__ = ["search_rate"]

_DECADES = 8
"""Decades searched at most. Ours: a rate of 1e-8 that should be 1 is the worst of the clinic."""

_PATIENCE = 2
"""Decades in a row without a better loss after which the search ends. Ours."""


def search_rate(attempt: Callable[[float], float], *, up: bool) -> float:
    """Return the factor for the learning rate that gives the lowest loss.

    Args:
        attempt: Trains with a factor for a few steps and returns the loss, inf where that diverges.
        up: Whether to search upwards.
    """
    results: dict[float, float] = {}
    worse = 0
    for decade in range(1, _DECADES + 1):
        factor = 10.0 ** (decade if up else -decade)
        best = min(results.values(), default=math.inf)
        results[factor] = attempt(factor)
        worse = 0 if results[factor] < best else worse + 1
        if worse == _PATIENCE:
            break
    best_factor = min(results, key=lambda factor: results[factor])
    for factor in (best_factor / math.sqrt(10.0), best_factor * math.sqrt(10.0)):
        results[factor] = attempt(factor)
    return min(results, key=lambda factor: results[factor])
