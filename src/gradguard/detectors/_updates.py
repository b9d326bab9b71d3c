"""Update-to-weight ratios that can be compared: matrices that learn, robustly summarised per observation."""

from __future__ import annotations

import math

import numpy as np

from gradguard.detectors._episodes import BoolArray
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["comparable", "leading_ratios", "matrix_ratios", "median_ratios", "ratio_before", "ratio_quantile"]

_LEADING = 0.5
"""Share of the highest rate from which a group is one of those that lead. Ours: groups without weight decay have the
same rate as the others, those of a trunk that is spared a tenth."""


def comparable(history: History) -> BoolArray:
    """Return which parameters have an update ratio that says something, ``[observations, parameters]``, read-only.

    Matrices and kernels only: vectors (biases, normalization) start at 0 or 1 and move by other amounts. Parameters
    that began at exactly zero (the B of LoRA, zero-initialized branches and heads) are left out for good, as a ratio to
    almost nothing is huge; so are embeddings, of which a batch moves a few rows.

    Source: Karpathy, CS231n notes, for the ratio; exclusions: ours (algorithms.md, section F7).
    """
    return history.derived("comparable", lambda: _comparable(history))


def _comparable(history: History) -> BoolArray:
    table = history.parameters
    weight = history.parameter("weight_norm")
    gradient = history.parameter("grad_norm")
    roles = dict(zip(history.layers.names, history.layers.roles, strict=True))
    fixed = np.array(
        [dims >= 2 and roles.get(layer) != "embedding" for dims, layer in zip(table.dims, table.layers, strict=True)],
        dtype=np.bool_,
    )
    began_at_zero = np.zeros(len(table), dtype=np.bool_)
    if len(weight):
        known = ~np.isnan(weight)
        began_at_zero = weight[known.argmax(axis=0), np.arange(len(table))] == 0.0
    result: BoolArray = (
        (fixed & ~began_at_zero)[None, :]
        & (history.parameter("trainable") != 0.0)
        & (history.parameter("in_optimizer") != 0.0)
        & np.isfinite(gradient)
        & (gradient > 0.0)
        & np.isfinite(weight)
        & (weight > 0.0)
    )
    return result


def matrix_ratios(history: History) -> FloatArray:
    """Return update ratios, NaN where they are not comparable; shape ``[observations, parameters]``, read-only."""
    return history.derived("matrix_ratios", lambda: _matrix_ratios(history))


def _matrix_ratios(history: History) -> FloatArray:
    ratios = history.parameter("update_ratio")
    return np.where(comparable(history) & np.isfinite(ratios), ratios, np.nan)


def median_ratios(history: History) -> FloatArray:
    """Return the median of :func:`matrix_ratios` per observation, shape ``[observations]``, read-only."""
    return history.derived("median_ratios", lambda: ratio_quantile(matrix_ratios(history), 0.5))


def leading_ratios(history: History) -> FloatArray:
    """Return the median over the matrices whose rate is at least half of the highest, shape ``[observations]``.

    Where a trunk is spared by a low rate, what it does says nothing about that of the head.
    """
    rates = history.parameter("lr")
    highest = np.fmax.reduce(rates, axis=1, keepdims=True) if rates.shape[1] else rates
    spared = (rates < _LEADING * highest) | (rates == 0.0)
    return ratio_quantile(np.where(spared, np.nan, matrix_ratios(history)), 0.5)


def ratio_quantile(ratios: FloatArray, quantile: float) -> FloatArray:
    """Return a quantile of the ratios per observation, shape ``[observations]``; NaN where there is none."""
    ordered = np.sort(ratios, axis=1)
    known = np.sum(~np.isnan(ratios), axis=1)
    result = np.full(len(ratios), np.nan)
    some = np.flatnonzero(known)
    position = quantile * (known[some] - 1)
    low = np.floor(position).astype(np.intp)
    high = np.ceil(position).astype(np.intp)
    weight = position - low
    result[some] = ordered[some, low] * (1.0 - weight) + ordered[some, high] * weight
    return result


def ratio_before(history: History, index: int) -> float:
    """Return the largest median update ratio over the observations up to ``index``, NaN where none is known."""
    medians = median_ratios(history)[: index + 1]
    return float(np.nanmax(medians)) if np.isfinite(medians).any() else math.nan
