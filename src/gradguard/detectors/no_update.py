"""GG503 no-update: a gradient arrives and the weight never moves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._episodes import BoolArray
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import Trend, loss_progress
from gradguard.detectors._numbers import names_text, percent
from gradguard.detectors.learning_rate import find_too_low
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.history import History

__all__ = ["find_no_update"]

_MOST = 0.5
"""Share of the trainable entries from which standing still is an error. Ours: most of the model does not learn."""

_WHY = {
    "not in the optimizer": "no optimizer holds {them}",
    "learning rate 0": "the learning rate of {their} parameter group is 0",
    "no entry changes": "the optimizer's step changes none of {their} entries",
}


def find_no_update(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find parameters that get a gradient and never move, and say which of three reasons holds.

    No watched optimizer holds them (and their norm is the same at every observation, so that nobody else moves them);
    the learning rate of their group has been 0 from the start; or the step changes none of their entries. Each must
    hold at every observation so far, at least three; for the last one the loss must not be falling, as a converged run
    has updates below rounding. A check before the first step knows the optimizer and speaks of the first reason after
    one look. A loss that has clearly fallen makes it INFO where it may be meant: a rate of 0, or half of the entries
    and more left out of the optimizer, as in feature extraction without freezing. A smaller part looks forgotten.

    Args:
        history: Records of one optimizer, oldest first; needs ``in_optimizer``, ``grad_norm``, ``weight_norm``, ``lr``,
            ``moved_fraction``.
        config: Thresholds; ``update_patience`` is the minimum of observations.

    Returns:
        At most one finding per reason.

    Source: ours (pitfalls.md, R5).
    """
    if not len(history):
        return []
    preflight = history.info.preflight
    if not preflight and len(history) < config.update_patience:
        return []
    due = _due(history)
    groups = {"not in the optimizer": due & _outside(history)}
    if not preflight:
        inside = due & _always(history.parameter("in_optimizer") == 1.0)
        idle_rate = inside & _always(history.parameter("lr") == 0.0)
        groups["learning rate 0"] = idle_rate
        groups["no entry changes"] = inside & ~idle_rate & _never_moves(history, config)
    return [
        _finding(history, reason, [int(i) for i in np.flatnonzero(mask)])
        for reason, mask in groups.items()
        if mask.any() and not (reason == "no entry changes" and not _stuck(history, config))
    ]


def _due(history: History) -> BoolArray:
    """Return the trainable parameters at which a finite gradient other than zero arrives, shape ``[parameters]``."""
    gradient = history.parameter("grad_norm")
    arrives = (np.isfinite(gradient) & (gradient > 0.0)).any(axis=0)
    return arrives & _always(history.parameter("trainable") == 1.0)


def _always(mask: BoolArray) -> BoolArray:
    return np.asarray(mask.all(axis=0), dtype=np.bool_)


def _outside(history: History) -> BoolArray:
    """Return what no watched optimizer holds and nobody moves, shape ``[parameters]``."""
    if not history.info.optimizers:
        return np.zeros(len(history.parameters), dtype=np.bool_)
    norms = history.parameter("weight_norm")
    still = np.asarray(norms == norms[:1], dtype=np.bool_)
    return _always(history.parameter("in_optimizer") == 0.0) & _always(still)


def _never_moves(history: History, config: GuardConfig) -> BoolArray:
    moved = history.parameter("moved_fraction")
    known = ~np.isnan(moved)
    enough = known.sum(axis=0) >= config.update_patience
    result: BoolArray = enough & ((moved == 0.0) | ~known).all(axis=0)
    return result


def _stuck(history: History, config: GuardConfig) -> bool:
    """Whether the loss is known not to fall, or nobody records it, and no rate that is too low for all explains it."""
    trend = loss_progress(history).trend
    if history.losses[1].size and trend not in {Trend.FLAT, Trend.RISEN}:
        return False
    return find_too_low(history, config) is None


def _finding(history: History, reason: str, rows: list[int]) -> Finding:
    table = history.parameters
    names = tuple(table.names[row] for row in rows)
    trainable = history.parameter("trainable")[-1] == 1.0
    sizes = np.array(table.sizes, dtype=np.float64)
    share = float(sizes[rows].sum() / sizes[trainable].sum())
    on_purpose = reason == "learning rate 0" or share >= _MOST
    if on_purpose and loss_progress(history).trend is Trend.FALLEN:
        severity = Severity.INFO
    else:
        severity = Severity.ERROR if share >= _MOST else Severity.WARNING
    one = len(names) == 1
    why = _WHY[reason].format(them="it" if one else "them", their="its" if one else "their")
    steps = history.steps.astype(np.int64)
    return make_finding(
        "GG503",
        severity,
        f"{names_text(names)} {'gets' if one else 'get'} a gradient and never {'moves' if one else 'move'}: {why} "
        f"({percent(share)} of the trainable entries).",
        step=int(steps[0]),
        last_step=int(steps[-1]),
        layer=names[0],
        layers=names,
        cause={"not in the optimizer": Cause.WIRING, "learning rate 0": Cause.LEARNING_RATE}.get(
            reason, Cause.PRECISION
        ),
        confidence=0.9 if reason != "no entry changes" else 0.7,
        evidence={
            "share": Evidence(value=share, unit="fraction", note="of the trainable entries"),
            "parameters": Evidence(value=len(names), unit="parameters"),
            "reason": Evidence(value=reason),
            "observations": Evidence(value=len(history), unit="observations"),
        },
    )
