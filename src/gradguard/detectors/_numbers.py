"""Numbers in words, and what several rules read from one observation."""

from __future__ import annotations

import math

import numpy as np

from gradguard.detectors._episodes import BoolArray
from gradguard.records import FloatArray, StepRecord

__all__ = [
    "column",
    "finite_median",
    "in_range",
    "is_bad",
    "median_with_error",
    "names_text",
    "parameter_column",
    "percent",
    "positive",
    "power_of_ten",
    "signal",
    "usual_rate",
]


def column(record: StepRecord, name: str) -> FloatArray:
    """Return a layer statistic of one observation, shape ``[layers]``; NaN where it was not measured."""
    values = record.layer_values.get(name)
    return values if values is not None else np.full(len(record.layers), np.nan)


def parameter_column(record: StepRecord, name: str) -> FloatArray:
    """Return a parameter statistic of one observation, shape ``[parameters]``; NaN where it was not measured."""
    values = record.parameter_values.get(name)
    return values if values is not None else np.full(len(record.parameters), np.nan)


def signal(record: StepRecord, *, at: str = "delta") -> FloatArray:
    """Return delta (``at="delta"``) or the gradient at the inputs (``at="input_delta"``), shape ``[layers]``.

    Where the L2 norm left the range of its precision but the largest entry did not, the largest entry stands in: an
    overflow of squares is no infinity, an underflow of squares no zero.
    """
    return in_range(column(record, f"{at}_norm"), column(record, f"{at}_max_abs"))


def in_range(norm: FloatArray, largest: FloatArray) -> FloatArray:
    """Return ``norm`` with entries replaced by ``largest`` where only the norm over- or underflowed."""
    outside = np.isfinite(largest) & (largest > 0.0) & (np.isinf(norm) | (norm == 0.0))
    return np.where(outside, largest, norm)


def is_bad(norm: FloatArray, largest: FloatArray) -> BoolArray:
    """Whether an entry of the tensor was NaN or infinite, per row.

    A NaN alone means "not measured" in several columns; an infinite norm is what a NaN entry gives. A finite largest
    entry clears the row: the squares overflowed.
    """
    bad: BoolArray = (np.isinf(norm) | np.isinf(largest)) & ~np.isfinite(largest)
    return bad


def positive(values: FloatArray) -> FloatArray:
    """Return the finite entries above 0."""
    return values[np.isfinite(values) & (values > 0.0)]


def finite_median(values: FloatArray) -> float:
    """Return the median of the finite entries, NaN for none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else math.nan


def median_with_error(values: FloatArray) -> tuple[float, float]:
    """Return the median and its standard error (1.2533 times that of the mean, for Gaussian noise), from the MAD."""
    centre = float(np.median(values))
    spread = 1.4826 * float(np.median(np.abs(values - centre)))
    return centre, 1.2533 * spread / math.sqrt(values.size)


def usual_rate(rates: FloatArray, sizes: FloatArray) -> float:
    """Return the learning rate in the middle, by weights; NaN where none is above 0.

    Args:
        rates: Learning rates, shape ``[groups]``; those that are not above 0 train nothing and are left out.
        sizes: Weights trained at each, shape ``[groups]``.
    """
    known = np.isfinite(rates) & (rates > 0.0)
    if not sizes[known].any():
        return math.nan
    rates, sizes = rates[known], sizes[known]
    order = np.argsort(rates)
    reached = np.cumsum(sizes[order])
    return float(rates[order][np.searchsorted(reached, 0.5 * reached[-1])])


def power_of_ten(value: float) -> str:
    """Return a positive ratio as a power of ten, for instance ``"10^-3.1"``; ``"0"`` for zero."""
    return f"10^{math.log10(value):.1f}" if value > 0.0 else "0"


def percent(share: float) -> str:
    """Return a share as a percentage: whole, with one digit below 10 %."""
    value = 100.0 * share
    return f"{value:.0f} %" if value >= 10.0 or value == 0.0 else f"{value:.1f} %"


def names_text(names: tuple[str, ...], *, shown: int = 2) -> str:
    """Return a few names in words: ``"a"``, ``"a and b"``, ``"a, b and 3 more"``. The model itself has no name."""
    called = [name or "the model itself" for name in names]
    if len(called) <= 1:
        return "".join(called)
    if len(called) <= shown:
        return f"{', '.join(called[:-1])} and {called[-1]}"
    return f"{', '.join(called[:shown])} and {len(called) - shown} more"
