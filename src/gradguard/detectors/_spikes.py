"""Spikes in a positive series, against its own recent past, on a logarithmic scale."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace

import numpy as np

from gradguard.config import GuardConfig
from gradguard.records import FloatArray

__all__ = ["EPISODE", "Spike", "last_spike", "leap", "robust_z", "times_usual"]

_FLOOR = 0.05
"""Smallest scale of the logarithm: below 5 % of scatter a value's distance is measured against this. Source: ours,
algorithms.md, section G4.6."""

_TAIL = 0.95
"""Quantile of the values before it that a spike exceeds ``spike_ratio`` times as well: up to three spikes in a window
hide no fourth one, and a series whose tail reaches as far once in twenty values has no spikes. Ours: batches of one or
two examples and mislabelled ones."""

_NEAR = 5
"""Values just before it whose median a spike exceeds by half; a cheap sieve. Ours."""

_SIEVE = 1.5
"""Times the median of the values just before it that a spike exceeds. Ours."""

_LOOKED_AT = 64
"""Newest candidates looked at: a judgement must cost next to nothing. Ours."""

_BACK = 3
"""Values in a row whose median must be back at the old level. Ours: one low value may be chance."""

_RECENT = 8
"""Values just before a spike whose median is the level to come back to: the window's own lags a falling loss. Ours."""

EPISODE = 16
"""Values after a spike within which the next belongs to it. Ours: what one bad batch stirs up settles soon."""


_LEAP = 100.0
"""Factor of one step by which a batch, and no rate, raises a loss that is then lost. Ours."""

_CALM = 3.0
"""Times the usual loss that the last one before a leap may be. Ours."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spike:
    """One value out of line.

    Attributes:
        index: Where it stands in the series.
        value: The value.
        usual: Median of the values before it.
        z: Robust standard deviations by which its logarithm exceeds theirs.
        start: Median of the first three values of the series.
        after: Values seen since.
        back: Index of the first value at which the series was back at its level, ``None`` while it is not.
        count: Spikes among the newest candidates, this one included.
    """

    index: int
    value: float
    usual: float
    z: float
    start: float
    after: int
    back: int | None
    count: int


def robust_z(value: float, before: FloatArray) -> float:
    """Return by how many robust standard deviations the logarithm of a value exceeds those before it.

    The median absolute deviation, times 1.4826 to compare with a standard deviation, is at least 0.05 in ln units.

    Args:
        value: A number above 0.
        before: Numbers above 0, shape ``[window]``, at least one.

    Source: Hampel (1974), "The influence curve and its role in robust estimation", JASA 69; the floor is ours.
    """
    logs = np.log(before)
    centre = float(np.median(logs))
    scale = max(1.4826 * float(np.median(np.abs(logs - centre))), _FLOOR)
    return (float(np.log(value)) - centre) / scale


def last_spike(values: FloatArray, config: GuardConfig) -> Spike | None:
    """Return the newest spike of a series, ``None`` where there is none; of several close together the first.

    A spike is above ``spike_ratio`` times the median of the ``spike_window`` values before it, above ``spike_ratio``
    times their 95 % quantile, ``spike_z`` robust standard deviations of the logarithm out of line, and not below the
    level at which the series began: the wobble of a converged run is small against that. A median and a median absolute
    deviation are not moved by earlier spikes, so one does not hide the next.

    Args:
        values: Finite numbers, oldest first, shape ``[values]``. Windows with a number at or below 0 are left out.
        config: Thresholds.

    Source: ours, algorithms.md, section G4.6: 0 to 0.14 false alarms in 1000 steps of log-normal noise of sigma 0.1 to
    0.4 around a falling baseline, by ratio and z alone.
    """
    if values.size <= config.spike_minimum:
        return None
    start = float(np.median(values[:3]))
    found: list[Spike] = []
    for index in _candidates(values, start, config.spike_minimum):
        before = values[max(0, index - config.spike_window) : index]
        value = float(values[index])
        stands_out = _stands_out(value, before, config)
        if stands_out is None:
            continue
        usual, z = stands_out
        after = values[index + 1 :]
        if after.size and _is_growth(after, value):
            continue
        found.append(
            Spike(
                index=index,
                value=value,
                usual=usual,
                z=z,
                start=start,
                after=int(after.size),
                back=_back(after, index, config.spike_ratio * float(np.median(before[-_RECENT:]))),
                count=len(found) + 1,
            )
        )
    return _newest_episode(found)


def times_usual(value: float, before: FloatArray, *, start: float, config: GuardConfig) -> float | None:
    """Return how many times its usual size a newest value is if it is a spike, ``None`` if it is none.

    The rule of :func:`last_spike`, for a value of which nothing is known but what came before it.

    Args:
        value: A finite number.
        before: The newest finite numbers before it, at most ``spike_window``, oldest first.
        start: Median of the first three values of the series.
        config: Thresholds.

    Source: see :func:`last_spike`.
    """
    if before.size < config.spike_minimum or value < start:
        return None
    if value <= _SIEVE * statistics.median(before[-_NEAR:].tolist()):
        return None
    stands_out = _stands_out(value, before, config)
    return None if stands_out is None else value / stands_out[0]


def _stands_out(value: float, before: FloatArray, config: GuardConfig) -> tuple[float, float] | None:
    """Return the usual size and the robust z of a value that lies far above those before it, ``None`` if it does not.

    A window with a number at or below 0 tells nothing.
    """
    if before.min() <= 0.0:
        return None
    usual, tail = float(np.median(before)), float(np.quantile(before, _TAIL))
    if value <= config.spike_ratio * max(usual, tail):
        return None
    z = robust_z(value, before)
    return (usual, z) if z > config.spike_z else None


def leap(values: FloatArray) -> int | None:
    """Return where a loss leapt, in one step, out of a calm level to which it never came back; ``None`` if it did not.

    A leap is a factor of 100 over the median of the eight losses before it, of which the last is calm. Either the loss
    has ceased to be finite since, or no later median of three has been near the old level. A rate that is too high
    raises a loss step by step; one bad batch does this.

    Args:
        values: Losses, oldest first, shape ``[losses]``; NaN and infinities allowed.

    Source: ours.
    """
    finite = np.isfinite(values)
    if values.size <= _RECENT or not finite[:_RECENT].all():
        return None
    end = values.size if finite.all() else int(np.argmin(finite))
    known = values[:end]
    if known.size <= _RECENT:
        return None
    usual = np.median(np.lib.stride_tricks.sliding_window_view(known[:-1], _RECENT), axis=1)
    before, after = known[_RECENT - 1 : -1], known[_RECENT:]
    leaps = np.flatnonzero((usual > 0.0) & (before <= _CALM * usual) & (after > _LEAP * usual))
    for index in leaps:
        position = int(index) + _RECENT
        if _back(known[position + 1 :], position, 2.0 * float(usual[index])) is None:
            return position
    return None


def _newest_episode(found: list[Spike]) -> Spike | None:
    """Return the first of the newest group of spikes, with what is known of the group's end."""
    if not found:
        return None
    first = len(found) - 1
    while first and found[first].index - found[first - 1].index <= EPISODE:
        first -= 1
    group = found[first:]
    over = all(spike.back is not None for spike in group)
    return replace(group[0], back=max(s.back or 0 for s in group) if over else None, count=len(found))


def _candidates(values: FloatArray, start: float, minimum: int) -> list[int]:
    near = np.lib.stride_tricks.sliding_window_view(values[:-1], _NEAR)
    medians = np.median(near, axis=1)
    indices = np.arange(_NEAR, values.size)
    chosen = (values[_NEAR:] >= start) & (values[_NEAR:] > 0.0) & (values[_NEAR:] > _SIEVE * medians)
    picked = indices[chosen & (indices >= minimum)]
    return [int(index) for index in picked[-_LOOKED_AT:]]


def _is_growth(after: FloatArray, value: float) -> bool:
    """Whether the values just after a candidate go on rising."""
    return bool(np.median(after[:_NEAR]) > value)


def _back(after: FloatArray, index: int, limit: float) -> int | None:
    if after.size < _BACK:
        return None
    medians = np.median(np.lib.stride_tricks.sliding_window_view(after, _BACK), axis=1)
    below = np.flatnonzero(medians <= limit)
    return index + 1 + int(below[0]) if below.size else None
