"""GG211 half-precision-underflow, GG212 update-lost-to-rounding and GG213 loss-scale-collapse."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._episodes import BoolArray, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import LossProgress, Trend, loss_progress
from gradguard.detectors._numbers import names_text, percent
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["find_loss_scale_collapse", "find_lost_updates", "find_underflow"]

_PATIENCE = 3
"""Consecutive observations. Ours: as for the update ratio."""

_HALF = 1e-4
"""Rounding unit above which a type is half precision: float16 has 2^-10, bfloat16 2^-7, float32 2^-23."""

_NEARLY_ALL = 0.9
"""Share of entries that float16 rounds away which is told before the loss is known. Ours: nets that lose half of them
often learn all the same."""

_MOST_LOST = 0.9
"""Share of lost updates that is a warning even where the loss falls: a tenth of the weights learn. Ours."""

_ATTEMPTS = 20
"""Steps tried before the share of skipped ones says something. Ours: 5 % of 20 is one."""

_SKIPS = 5
"""Skipped steps from which their share counts. Ours: a scaler that searches skips a few."""

_IN_A_ROW = 20
"""Skipped steps in a row from which no scale helps: 2^16, where PyTorch's scaler begins, is then below 1. Ours."""


def find_underflow(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find gradients that float16 rounds to zero, over most of the model.

    Counted are sampled entries of tensors whose gradient float16 computed and that lie wholly below its normal range,
    and tensors of zeros beside them; alone, zeros have other owners. It must hold at the last three observations that
    say anything, and the loss must not have clearly fallen: a converged run has gradients as small. A check before the
    first step speaks after one look: a larger scale of the loss has shown which zeros are float16's.

    Args:
        history: Records of one optimizer, oldest first; needs ``underflow_fraction``.
        config: Thresholds.

    Source: float16: IEEE 754-2019; Micikevicius et al. (2018), "Mixed Precision Training", ICLR, arXiv 1710.03740.
    """
    shares = history.parameter("underflow_fraction")
    if not np.isfinite(shares).any():
        return _all_rounded_away(history)
    sizes = np.array(history.parameters.sizes, dtype=np.float64)
    norms = history.parameter("grad_norm")
    due = (history.parameter("trainable") == 1.0) & ~np.isnan(norms)
    lost = np.where(np.isfinite(shares), shares, np.where(norms == 0.0, 1.0, 0.0)) * due
    known = np.asarray(np.isfinite(shares).any(axis=1), dtype=np.bool_)
    total = (lost * sizes).sum(axis=1) / np.maximum(1.0, (due * sizes).sum(axis=1))
    edge = (np.where(np.isfinite(shares), shares, 0.0) > 0.0).any(axis=1)
    patience = 1 if history.info.preflight else _PATIENCE
    episode = last_episode((total >= config.underflow_fraction) & edge, known=known, patience=patience)
    loss = loss_progress(history)
    early = loss.trend is Trend.UNKNOWN and history.losses[1].size > 0 and not history.info.preflight
    if episode is None or not episode.standing or loss.trend is Trend.FALLEN:
        return []
    if early and total[episode.last] < _NEARLY_ALL:  # adaptive optimizers learn from what is left: let the loss speak
        return []
    rows = [int(row) for row in np.flatnonzero(lost[episode.last] >= config.underflow_fraction)]
    names = tuple(dict.fromkeys(history.parameters.layers[row] for row in rows))
    scale = history.scalar("loss_scale")[episode.last]
    steps = history.steps.astype(np.int64)
    share = float(total[episode.last])
    how, note = "are 0 or have at most three bits left", "below 8 x 2^-24"
    if history.info.preflight:
        how, note = "are 0 and would not be with a larger loss", "0, and not where the loss is scaled up"
    return [
        make_finding(
            "GG211",
            Severity.WARNING,
            f"float16 rounds gradients away: {percent(share)} of the entries {how}, in {names_text(names)}.",
            step=int(steps[episode.first]),
            last_step=int(steps[episode.last]),
            layer=names[0] if names else None,
            layers=names,
            cause=Cause.PRECISION,
            confidence=min(0.95, 0.6 + 0.35 * share),
            evidence={
                "share": Evidence(value=share, unit="fraction", note=f"of the trainable entries, {note}"),
                "loss_scale": Evidence(value=float(scale), note="1 without a loss scaler"),
                "observations": Evidence(value=episode.count, unit="observations", note="consecutive"),
                "loss_trend": Evidence(value=str(loss.trend)),
            },
        )
    ]


def _all_rounded_away(history: History) -> list[Finding]:
    """Tell of gradients that are all zero where float16 computed them without a scaler: nothing is left to measure."""
    if history.info.preflight or len(history) < 2:
        return []
    delta = history.layer("delta_norm")
    known = ~np.isnan(delta)
    zero = known.any(axis=1) & ((delta == 0.0) | ~known).all(axis=1)
    plain = (history.scalar("float16") == 1.0) & ~(history.scalar("loss_scale") > 1.0)
    loss = loss_progress(history)
    if not (zero & plain).all() or loss.trend is Trend.FALLEN:
        return []
    steps = history.steps.astype(np.int64)
    names = tuple(history.layers.names[int(row)] for row in np.flatnonzero(known.any(axis=0)))
    return [
        make_finding(
            "GG211",
            Severity.ERROR,
            f"float16 rounds every gradient away: it is exactly zero at all {len(names)} layers, computed in float16 "
            "without a loss scaler.",
            step=int(steps[0]),
            last_step=int(steps[-1]),
            layer=names[0] if names else None,
            layers=names,
            cause=Cause.PRECISION,
            confidence=0.8,
            evidence={
                "zero_layers": Evidence(value=len(names), unit="layers"),
                "loss_scale": Evidence(value=1.0, note="1 without a loss scaler"),
                "observations": Evidence(value=len(history), unit="observations"),
            },
        )
    ]


def find_lost_updates(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find weights stored in half precision that most updates leave as they are, bit by bit.

    Counted are sampled entries with a gradient other than zero, in matrices of a half-precision type whose rate is
    above 0. It must hold at the last three observations. A loss that has clearly fallen makes it INFO, unless nine
    tenths of the updates are lost; a classifier that has learnt is left alone.

    Args:
        history: Records of one optimizer, oldest first; needs ``moved_fraction`` and ``rounding_unit``.
        config: Thresholds.

    Source: Zamirai et al. (2020), "Revisiting BFloat16 Training", arXiv 2010.06192.
    """
    unit = history.parameter("rounding_unit")
    moved = history.parameter("moved_fraction")
    matrices = np.array([dims >= 2 for dims in history.parameters.dims], dtype=np.bool_)
    counted = (unit > _HALF) & np.isfinite(moved) & ~(history.parameter("lr") == 0.0) & matrices
    if history.info.preflight or not counted.any():
        return []
    lost = _mean(1.0 - moved, counted, np.array(history.parameters.sizes, dtype=np.float64))
    known = ~np.isnan(lost)
    episode = last_episode(lost >= config.lost_update_fraction, known=known, patience=_PATIENCE)
    loss = loss_progress(history)
    if episode is None or not episode.standing or loss.learnt:
        return []
    share = float(np.median(lost[episode.first : episode.last + 1][known[episode.first : episode.last + 1]]))
    rows = np.flatnonzero(counted[episode.last])
    names = tuple(dict.fromkeys(history.parameters.layers[int(row)] for row in rows))
    worst = int(rows[np.argmin(moved[episode.last][rows])])
    coarse = float(np.nanmax(np.where(counted[episode.last], unit[episode.last], np.nan)))
    steps = history.steps.astype(np.int64)
    excused = loss.trend is Trend.FALLEN and share < _MOST_LOST
    return [
        make_finding(
            "GG212",
            Severity.INFO if excused else Severity.WARNING,
            f"Rounding swallows the updates: a step leaves {percent(share)} of the weights with a gradient as they are "
            f"(their type has steps of {coarse:.2g} of a weight).",
            step=int(steps[episode.first]),
            last_step=int(steps[episode.last]),
            layer=history.parameters.layers[worst],
            layers=names,
            cause=Cause.PRECISION,
            confidence=0.9 if not excused else 0.6,
            evidence={
                "lost": Evidence(value=share, unit="fraction", note="of the entries with a gradient"),
                "rounding_unit": Evidence(value=coarse, unit="ratio", note="2^-7 bfloat16, 2^-10 float16"),
                "observations": Evidence(value=episode.count, unit="observations", note="consecutive"),
                "loss_trend": Evidence(value=str(loss.trend)),
            },
        )
    ]


def _mean(values: FloatArray, counted: BoolArray, sizes: FloatArray) -> FloatArray:
    """Return the mean per observation, weighted by size, NaN where nothing counts; shape ``[observations]``."""
    weights = np.where(counted, sizes, 0.0)
    total = weights.sum(axis=1)
    sums = (np.where(counted, values, 0.0) * weights).sum(axis=1)
    return np.where(total > 0.0, sums / np.maximum(total, 1.0), np.nan)


def find_loss_scale_collapse(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find a loss scaler that skips steps again and again.

    An error where it has skipped 20 steps in a row up to now: whatever the scale, something overflows. A warning where
    more than ``skipped_fraction`` of the steps tried since the first clean one were skipped, at least five of 20.
    The search for a scale before the first clean step is normal, whatever it takes.

    Args:
        history: Records of one optimizer, oldest first; needs the scaler, passed as ``scaler=``, and recorded losses.
        config: Thresholds.

    Source: limits ours; scaler: PyTorch documentation, Automatic Mixed Precision, gradient scaling.
    """
    info = history.info
    if info.preflight or not np.isfinite(info.loss_scale) or history.optimizer > 0:
        return []
    steps, _ = history.losses
    taken = int(steps[-1]) if steps.size else 0
    tried = taken + info.skipped_steps
    share = info.skipped_steps / tried if tried else 0.0
    stuck = info.skipped_in_a_row >= _IN_A_ROW
    often = tried >= _ATTEMPTS and info.skipped_steps >= _SKIPS and share > config.skipped_fraction
    if not (stuck or often):
        return []
    loss = loss_progress(history)
    what = (
        f"the last {info.skipped_in_a_row} steps were all skipped"
        if stuck
        else f"{info.skipped_steps} of {tried} steps were skipped ({percent(share)})"
    )
    return [
        make_finding(
            "GG213",
            Severity.ERROR if stuck else Severity.WARNING,
            f"The loss scaler finds no scale that lasts: {what}, and it is now {info.loss_scale:.3g}.",
            step=_first_fall(history) if not stuck else taken,
            last_step=taken,
            cause=Cause.PRECISION,
            confidence=0.95 if stuck else 0.8,
            evidence=_scale_evidence(history, share, loss),
        )
    ]


def _scale_evidence(history: History, share: float, loss: LossProgress) -> dict[str, Evidence]:
    info = history.info
    return {
        "loss_scale": Evidence(value=info.loss_scale, note="of the loss scaler, now"),
        "skipped": Evidence(value=info.skipped_steps, unit="steps", note="since the first clean step"),
        "skipped_share": Evidence(value=share, unit="fraction", note="of the steps tried; 0.0005 is usual"),
        "skipped_in_a_row": Evidence(value=info.skipped_in_a_row, unit="steps", note="up to now"),
        "loss_trend": Evidence(value=str(loss.trend)),
    }


def _first_fall(history: History) -> int:
    """Return the first observed step before which a step had been skipped, the newest one where none was."""
    skipped = history.scalar("skipped_steps")
    steps = history.steps.astype(np.int64)
    seen = np.flatnonzero(skipped > 0.0)
    return int(steps[seen[0]]) if seen.size else (int(history.losses[0][-1]) if history.losses[0].size else 0)
