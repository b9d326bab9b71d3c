"""GG601 clipping-never-engages and GG602 clipping-dominates, from the norm before and at the step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gradguard.config import GuardConfig
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import loss_progress
from gradguard.detectors._numbers import percent
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.history import History

__all__ = ["find_clipping"]

_OBSERVATIONS = 20
"""Observations from which the share of cut steps is told. Ours: half of them, within 11 %."""

_STEPS = 200
"""Steps that they cover before a threshold never reached is told. Source: ours, algorithms.md, section B2."""

_FEW = 5
"""Observations, all of them cut to a tenth, from which a loss that does not fall is laid to clipping. Ours."""

_HARD = 0.1
"""Median share of the norm left below which steps are next to nothing. Ours: the rate is then a tenth of what it
says."""

_CUT = 0.99
"""Share of the norm left below which a step was cut. Ours: rounding leaves 1 - 1e-6."""


def find_clipping(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find clipping that cuts most steps, or none.

    Most: more than ``clip_fraction`` of at least 20 observations. INFO, and under Adam-like optimizers always so, as
    they divide a constant factor away. A warning with an optimizer known not to be adaptive, at five observations
    already, where the usual step keeps a tenth of its norm or less and the loss is known not to fall.

    None: the caller's threshold is known, and none of at least 20 observations over 200 steps reached it. INFO. Equal
    norms alone do not tell a threshold that is never reached from no clipping at all, so nothing is said of them.

    Args:
        history: Records of one optimizer, oldest first; needs ``grad_norm`` read before clipping, and
            ``grad_norm_at_step``.
        config: Thresholds.

    Source: labels by share: ours, algorithms.md, section B3.
    """
    before, at_step = history.scalar("grad_norm"), history.scalar("grad_norm_at_step")
    known = (
        np.isfinite(before) & np.isfinite(at_step) & (before > 0.0) & (history.scalar("read_before_clipping") == 1.0)
    )
    if history.info.preflight or not known.any():
        return []
    kept = at_step[known] / before[known]
    steps = history.steps.astype(np.int64)[known]
    cut = kept < _CUT
    if not cut.any():
        return _never(history, float(before[known].max()), steps, kept.size)
    share, left = float(cut.mean()), float(np.median(kept))
    optimizers = history.info.optimizers
    plain = history.optimizer < len(optimizers) and not optimizers[history.optimizer].adaptive
    loss = loss_progress(history)
    harmful = plain and kept.size >= _FEW and bool(cut.all()) and left < _HARD and loss.stuck
    if not harmful and (kept.size < _OBSERVATIONS or share <= config.clip_fraction):
        return []
    effect = "the loss does not fall" if harmful else "the learning rate no longer sets the size of the steps"
    if not plain:
        effect = "an adaptive optimizer divides a constant factor away"
    usual = float(np.median(before[known]))
    return [
        make_finding(
            "GG602",
            Severity.WARNING if harmful else Severity.INFO,
            f"Clipping cuts {percent(share)} of the steps, to {left:.2g} of their norm (median); {effect}.",
            step=int(steps[np.flatnonzero(cut)[0]]),
            last_step=int(steps[-1]),
            cause=Cause.LEARNING_RATE,
            confidence=0.85 if harmful else 0.7,
            evidence={
                "cut_share": Evidence(value=share, unit="fraction", note="of the observed steps"),
                "norm_left": Evidence(value=left, unit="ratio", note="norm at the step over norm before clipping"),
                "usual_norm": Evidence(value=usual, unit="L2 norm", note="median before clipping"),
                "observations": Evidence(value=kept.size, unit="observations"),
                "loss_trend": Evidence(value=str(loss.trend)),
            },
        )
    ]


def _never(history: History, largest: float, steps: NDArray[np.int64], count: int) -> list[Finding]:
    limit = history.info.clip_norm
    if not np.isfinite(limit) or largest >= limit or count < _OBSERVATIONS or steps[-1] - steps[0] < _STEPS:
        return []
    return [
        make_finding(
            "GG601",
            Severity.INFO,
            f"Clipping at {limit:.3g} has cut no step: the largest norm seen is {largest:.3g}.",
            step=int(steps[0]),
            last_step=int(steps[-1]),
            cause=Cause.LEARNING_RATE,
            confidence=0.8,
            evidence={
                "threshold": Evidence(value=limit, unit="L2 norm"),
                "largest_norm": Evidence(value=largest, unit="L2 norm"),
                "observations": Evidence(value=count, unit="observations"),
            },
        )
    ]
