"""The depth criterion: which rows count, over how many decades delta changes, by which factor per layer."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from gradguard.records import FloatArray, LayerTable

__all__ = [
    "TRUNK_ROLES",
    "power",
    "span_decades",
    "supported_span",
    "supported_spans",
    "theil_sen_gain",
    "trunk",
    "weight_layers",
]

TRUNK_ROLES = frozenset({"affine", "norm", "recurrent", "embedding", "attention"})
"""Roles of the layers that the depth criterion compares: those that hold weights. Activations stand between them."""

_SUPPORT = 0.75
"""Share of a span that must be left without the rows most in its favour. Ours: 0.93 is left of a uniform decay."""

_MOST_SLOPES = 256
"""Rows from which a slope is fitted at most: pairs grow with the square. Deeper trunks are thinned evenly."""


def trunk(table: LayerTable, values: FloatArray) -> NDArray[np.intp]:
    """Return the rows that count towards the depth criterion, in execution order.

    Args:
        table: Names and roles of the rows.
        values: Delta, L2 norm, shape ``[layers]``.

    Returns:
        Indices of the rows with weights (or normalization) and a finite delta above 0. Exact zeros are left out: they
        have owners of their own.

    Example:
        >>> import numpy as np
        >>> from gradguard.records import LayerTable
        >>> nan = float("nan")
        >>> table = LayerTable(names=("0", "1", "2"), types=("Linear", "ReLU", "Linear"), kinds=("", "", ""),
        ...                    roles=("affine", "activation", "affine"), derivative_bounds=(nan, 1.0, nan))
        >>> trunk(table, np.array([0.1, 0.2, 0.3])).tolist()
        [0, 2]
    """
    roles = np.array([role in TRUNK_ROLES for role in table.roles], dtype=np.bool_)
    return np.flatnonzero(roles & np.isfinite(values) & (values > 0.0))


def weight_layers(table: LayerTable, rows: NDArray[np.intp]) -> list[int]:
    """Return the trunk rows that readers call layers: without normalization, unless there is nothing else."""
    return [int(row) for row in rows if table.roles[row] != "norm"] or [int(row) for row in rows]


def span_decades(delta: FloatArray, *, minimum_layers: int = 6) -> float:
    """Return over how many decades delta changes between input and output.

    The median of log10 delta over the first eighth of the layers, less that over the last eighth. With up to 23 layers
    an eighth is one or two of them, where the median is the mean.

    Args:
        delta: L2 norms at layer outputs in execution order, shape ``[layers]``. Exact zeros and non-finite entries are
            left out.
        minimum_layers: With fewer layers than this the first is compared with the last.

    Returns:
        Decades: negative where the gradient shrinks on its way to the input, positive where it grows; NaN below two
            layers.

    Example:
        >>> import numpy as np
        >>> round(span_decades(0.1 ** np.arange(5.0, 0.0, -1.0)), 6)
        -4.0

    Source:
        The exponential law: Schoenholz et al. (2017), "Deep Information Propagation", ICLR, arXiv 1611.01232. The
        statistic is ours: algorithms.md, section G.
    """
    return float(_row_spans(_logs(delta)[None, :], minimum_layers)[0][0])


def supported_span(delta: FloatArray, *, minimum_layers: int = 6) -> float:
    """Return :func:`span_decades`, or what is left of it where a single side branch may have made it.

    A shrinking gradient is measured from the *largest* delta of the first eighth as well, a growing one to the largest
    of the last eighth: everything upstream of a loss is small, whereas a branch behind a LayerScale of 1e-6 stands
    among large ones. Where that leaves less than three quarters of the span, it counts instead. The result never
    exceeds the span and has the same sign, or is 0.

    Args:
        delta: See :func:`span_decades`.
        minimum_layers: See :func:`span_decades`.

    Source: ours.
    """
    return float(_row_spans(_logs(delta)[None, :], minimum_layers)[1][0])


def supported_spans(delta: FloatArray, *, minimum_layers: int = 6) -> FloatArray:
    """Return :func:`supported_span` of each row, shape ``[observations]``; rows with the same live layers go together.

    Args:
        delta: L2 norms at layer outputs in execution order, shape ``[observations, layers]``.
        minimum_layers: See :func:`span_decades`.
    """
    spans = np.full(len(delta), np.nan)
    live = np.isfinite(delta) & (delta > 0.0)
    if not live.any():
        return spans
    logs = np.log10(np.where(live, delta, 1.0))
    patterns, group = live[:1], np.zeros(len(live), dtype=np.intp)
    if not (live == live[0]).all():
        patterns, group = np.unique(live, axis=0, return_inverse=True)
    for index, pattern in enumerate(patterns):
        rows = np.flatnonzero(group.ravel() == index)
        spans[rows] = _row_spans(logs[np.ix_(rows, np.flatnonzero(pattern))], minimum_layers)[1]
    return spans


def _row_spans(logs: FloatArray, minimum_layers: int) -> tuple[FloatArray, FloatArray]:
    """Return the span of each row and the part of it that is supported, each of shape ``[rows]``."""
    count = logs.shape[1]
    if count < 2:
        return np.full(len(logs), np.nan), np.full(len(logs), np.nan)
    size = 1 if count < minimum_layers else max(1, count // 8)
    first, last = logs[:, :size], logs[:, -size:]
    low, high = np.median(first, axis=1), np.median(last, axis=1)
    span = low - high
    shrinking = np.minimum(0.0, np.maximum(span, first.max(axis=1) - high))
    growing = np.maximum(0.0, np.minimum(span, low - last.max(axis=1)))
    support = np.where(span < 0.0, shrinking, growing)
    return span, np.where(np.abs(support) >= _SUPPORT * np.abs(span), span, support)


def theil_sen_gain(delta: FloatArray) -> float:
    """Return the factor by which delta changes per layer on its way to the input.

    The median slope of log10 delta over all pairs of layers, so that up to 29 % of outlying layers change nothing.

    Args:
        delta: L2 norms at layer outputs in execution order, shape ``[layers]``; exact zeros and non-finite entries keep
            their place and are left out.

    Returns:
        The factor, > 0: 0.24 for a deep sigmoid net, 1 for a healthy one; NaN below two layers.

    Example:
        >>> import numpy as np
        >>> round(theil_sen_gain(0.5 ** np.arange(8.0, 0.0, -1.0)), 6)
        0.5

    Source: Theil (1950), Sen (1968), "Estimates of the regression coefficient based on Kendall's tau", JASA 63.
    """
    usable = np.flatnonzero(np.isfinite(delta) & (delta > 0.0))
    if usable.size < 2:
        return math.nan
    if usable.size > _MOST_SLOPES:
        usable = usable[np.linspace(0, usable.size - 1, _MOST_SLOPES).round().astype(np.intp)]
    logs = np.log10(delta[usable])
    low, high = np.triu_indices(usable.size, k=1)
    slope = float(np.median((logs[high] - logs[low]) / (usable[high] - usable[low])))
    return power(-slope)


def power(decades: float) -> float:
    """Return 10 to the power of ``decades``, kept within the range of double precision."""
    return float(10.0 ** min(300.0, max(-300.0, decades)))


def _logs(delta: FloatArray) -> FloatArray:
    return np.log10(delta[np.isfinite(delta) & (delta > 0.0)])
