"""GG505 loss-divergence: the loss has left the level it had reached, and does not return."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._finding import make_finding
from gradguard.findings import Evidence, Finding, Severity
from gradguard.history import History

__all__ = ["find_divergence"]

_MINIMUM = 40
"""Losses needed. Ours: a level of 8 of them, a rise, and 16 that stay there."""

_LASTING = 16
"""Losses for which it must stay away. Ours: a spike is back within a few."""

_LEVEL = 8
"""Losses whose median is a level. Ours."""

_NOISE = 4.0
"""Robust standard deviations by which nine of the last ten losses exceed the level. Ours."""

_LEARNT = 0.25
"""Share of its first value by which a loss must have fallen for its progress to be the measure. Ours: what counts as a
clear change elsewhere."""

_RETURNING = 0.8
"""Share of its rise that is left when a loss is on its way back: the last eight against the eight before. Ours."""


def find_divergence(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find a loss that has left its level for good.

    The level is the lowest median of eight losses in a row. The last 16 must have given back ``divergence_share`` of
    the progress made from the start, have risen by the level's own size, lie out of its noise, and not be falling. A
    loss that had made no progress must have doubled. A warning; an error where it is now twice what it began with.

    Nothing is said of runs with several optimizers, whose losses are played against each other, nor where the loss is
    not finite: GG201 to GG204 tell that.

    Args:
        history: Records of one optimizer, oldest first; needs 40 losses.
        config: Thresholds.

    Source: ours. A loss that is scaled by a positive factor gets the same verdict.
    """
    steps, losses = history.losses
    if history.info.preflight or len(history.info.optimizers) > 1 or losses.size < _MINIMUM:
        return []
    if not np.isfinite(losses[-_LASTING:]).all():
        return []
    finite = np.isfinite(losses)
    values, at = losses[finite], steps[finite].astype(np.int64)
    recent = values[-_LASTING:]
    now, start = float(np.median(recent)), float(np.median(values[:3]))
    if values.size < _MINIMUM or now <= float(np.median(values[:-_LASTING])):
        return []
    levels = np.median(np.lib.stride_tricks.sliding_window_view(values, _LEVEL), axis=1)
    lowest = int(np.argmin(levels))
    level = float(levels[lowest])
    around = values[max(0, lowest - _LEVEL) : lowest + 2 * _LEVEL]
    noise = 1.4826 * float(np.median(np.abs(around - np.median(around))))
    progress = start - level
    needed = max(config.divergence_share * progress, abs(level))
    if progress < _LEARNT * abs(start):
        needed = max(abs(level), abs(start))
    low = float(np.quantile(recent, 0.1))
    if now - level < needed or low - level < max(_NOISE * noise, 0.5 * needed) or needed <= 0.0:
        return []
    if float(np.median(recent[-_LEVEL:])) - level < _RETURNING * (float(np.median(recent[:-_LEVEL])) - level):
        return []
    left = int(np.flatnonzero(levels <= level + 0.5 * needed)[-1]) + _LEVEL
    onset = min(left, values.size - 1)
    return [
        make_finding(
            "GG505",
            Severity.ERROR if now > start + abs(start) else Severity.WARNING,
            f"The loss has diverged: it left its level of {level:.3g} at about step {at[onset]}, is now {now:.3g}, "
            "and does not return.",
            step=int(at[onset]),
            last_step=int(at[-1]),
            confidence=min(0.95, 0.7 + 0.005 * (values.size - onset)),
            evidence={
                "level": Evidence(value=level, note="lowest median of eight losses in a row"),
                "loss": Evidence(value=now, note="median of the last 16"),
                "first_loss": Evidence(value=start, note="median of the first 3"),
                "noise": Evidence(value=noise, note="robust standard deviation at the level"),
                "steps_away": Evidence(value=int(at[-1] - at[onset]), unit="steps"),
            },
        )
    ]
