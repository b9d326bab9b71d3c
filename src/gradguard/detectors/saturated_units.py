"""GG302 saturated-units: sigmoid or tanh units at their flat ends, where that costs the gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._attribution import deviations_before
from gradguard.detectors._depth import TRUNK_ROLES
from gradguard.detectors._episodes import BoolArray, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import LossProgress, Trend, loss_progress
from gradguard.detectors._numbers import names_text, percent
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["FAR_INPUT", "find_saturated_units"]

_PASSED = 0.2
"""Measured gain across the activation, as a share of its largest derivative, below which saturation costs the gradient.
Ours: a healthy sigmoid passes 0.85, a tanh at twice the usual weight gain 0.6; with 95 % of the units at the ends it is
    0.2."""

_CUT = 0.02
"""The same below which what lies before is cut off. Ours: a tenth of what saturated layers pass that still learn."""

_FIRST_SATURATED = 0.25
"""Share of saturated units before any training, from which first weights are at fault. Ours: of 140 healthy runs with
sigmoid or tanh none begins above 0.02 in a layer that passes less than 0.45, but one on raw features with one example
per batch; 28 trained nets whose run begins anew have at most 0.19, two that were trained for long on jumps 0.5."""

_FIRST_PASSED = 0.3
"""The gain across the activation, as above, below which that costs the gradient. Ours: twelve small sick regressions
begin at 0.15 to 0.29, and end at half to nine tenths of what their twins explain."""

_FIRST_SCALE = 6.0
"""Root mean square of the weights before tanh, times the root of fan-in, from which they are no trained ones; twice
that before sigmoids, whose ends lie twice as far. Ours: trained on jumps for thousands of steps they come to 4.9, and
to 8.3 before sigmoids; the sick ones have 8 to 40."""

_SIGMOID_BOUND = 0.25
"""Largest derivative of a sigmoid."""

FAR_INPUT = 10.0
"""Largest entry of the input from which data, not weights, saturate the first layers. Ours: standardized data stay
below 10."""


def find_saturated_units(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find layers whose units are saturated *and* pass next to no gradient.

    Trained tanh and sigmoid nets hold saturated units in good health: that alone is no finding. Needed are more than
    ``saturated_fraction`` saturated units, a measured gain across the activation below a fifth of its largest
    derivative, both for ``update_patience`` consecutive observations, and a loss that is known not to fall. A layer
    that was so at step 0, behind weights far larger than trained ones, is held to milder limits: a quarter of its
    units, and a gain below 0.3. While the loss is not known yet it is a warning where it was so at step 0, and INFO
    else. A loss that falls makes it no finding, unless next to nothing passes a layer at all: then what falls is the
    work of the layers behind it. An output activation, with no layer after it, is left out: it is meant to reach its
    ends. A check before the first step speaks after one look. Tanh and sigmoid that code calls as functions right
    before a layer count as well, in the row of that layer, by their derivatives alone.

    Args:
        history: Records of one optimizer, oldest first; needs ``saturated_fraction`` and ``delta_norm``.
        config: Thresholds.

    Returns:
        At most one finding; its ``layer`` is the first saturated layer in forward order.

    Source: share of units: SageMaker Debugger, SaturatedActivation. The cost in gradient is ours.
    """
    if not len(history):
        return []
    saturated, passed = _saturated(history), _passed(history)
    inner = _before_a_layer(history)
    ill = (saturated > config.saturated_fraction) & (passed < _PASSED)
    if history.steps[0] == 0:
        from_the_start = (saturated > _FIRST_SATURATED) & (passed < _FIRST_PASSED)
        if from_the_start[0].any():
            ill |= from_the_start & from_the_start[0] & _too_large(history)
    ill &= inner
    known = np.asarray(np.isfinite(saturated).any(axis=1), dtype=np.bool_)
    patience = 1 if history.info.preflight else config.update_patience
    episodes = {
        row: last_episode(ill[:, row], known=known, patience=patience) for row in np.flatnonzero(ill.any(axis=0))
    }
    rows = [int(row) for row, episode in episodes.items() if episode is not None and episode.standing]
    if not rows:
        return []
    loss = loss_progress(history)
    first = min(episode.first for row, episode in episodes.items() if episode is not None and int(row) in rows)
    last = int(np.flatnonzero(known)[-1])
    severity = _severity(history, loss, first, cut=bool((passed[last][rows] < _CUT).any()))
    return [] if severity is None else [_finding(history, rows, first, saturated[last], passed[last], severity)]


def _severity(history: History, loss: LossProgress, first: int, *, cut: bool) -> Severity | None:
    """Return how much it matters, ``None`` where the loss says that it does not."""
    if loss.stuck or history.info.preflight:
        return Severity.WARNING
    if loss.trend is Trend.UNKNOWN:
        return Severity.WARNING if history.steps[first] == 0 else Severity.INFO
    if cut and not loss.learnt:
        return Severity.WARNING if loss.trend is Trend.FALLING else Severity.INFO
    return None


def _passed(history: History) -> FloatArray:
    """Return the gain across each activation over its largest derivative, shape ``[observations, layers]``."""
    delta, given = history.layer("delta_norm"), history.layer("input_delta_norm")
    bounds = np.array(history.layers.derivative_bounds, dtype=np.float64)
    usable = np.isfinite(delta) & np.isfinite(given) & (delta > 0.0)
    with np.errstate(over="ignore"):
        measured = np.where(usable, given, np.nan) / np.where(usable, delta, 1.0)
    slope = history.layer("derivative_mean")
    by_modules = np.where(np.isnan(measured), slope, measured) / bounds[None, :]
    return np.where(np.isnan(by_modules), history.layer("input_derivative_share"), by_modules)


def _saturated(history: History) -> FloatArray:
    """Return the share of saturated units, of activations and of functions before layers."""
    by_modules = history.layer("saturated_fraction")
    return np.where(np.isnan(by_modules), history.layer("input_saturated_share"), by_modules)


def _too_large(history: History) -> BoolArray:
    """Return by activation whether the weights before it are larger at first than training makes them.

    A layer that did not run at the first step has no first weights.
    """
    first = history.records[0]
    known = dict(zip(first.layers.names, deviations_before(first), strict=True))
    scales = np.array([known.get(name, math.nan) for name in history.layers.names], dtype=np.float64)
    bounds = np.array(history.layers.derivative_bounds, dtype=np.float64)
    found: BoolArray = scales > np.where(bounds > _SIGMOID_BOUND, _FIRST_SCALE, 2.0 * _FIRST_SCALE)
    return found


def _before_a_layer(history: History) -> BoolArray:
    roles = history.layers.roles
    last = max((row for row, role in enumerate(roles) if role in TRUNK_ROLES), default=-1)
    result: BoolArray = (np.arange(len(roles)) < last) | (np.array(roles) == "affine")
    return result


def _finding(
    history: History, rows: list[int], first: int, saturated: FloatArray, passed: FloatArray, severity: Severity
) -> Finding:
    steps = history.steps.astype(np.int64)
    names = tuple(history.layers.names[row] for row in rows)
    worst = rows[int(np.nanargmax(saturated[rows]))]
    preflight = history.info.preflight
    given = history.layer("input_max_abs")[first]
    known = given[np.isfinite(given)]
    largest = float(known[0]) if known.size else math.nan
    by_data = largest > FAR_INPUT
    bound = history.layers.derivative_bounds[worst]
    place = "before" if math.isnan(bound) else "of"  # a layer's own row: a function made its input
    return make_finding(
        "GG302",
        severity,
        f"{percent(float(saturated[worst]))} of the units {place} {names_text((history.layers.names[worst],))} are "
        f"saturated, and the gradient passes with {percent(float(passed[worst]))} of the largest derivative.",
        step=int(steps[first]),
        last_step=int(steps[-1]),
        layer=names[0],
        layers=names,
        cause=Cause.DATA if by_data else Cause.WEIGHT_SCALE,
        confidence=0.6 if preflight else 0.75,
        evidence={
            "saturated_fraction": Evidence(
                value=float(saturated[worst]), unit="fraction", note=history.layers.names[worst]
            ),
            "activation_gain": Evidence(
                value=float(passed[worst]) * (1.0 if math.isnan(bound) else bound),
                unit="ratio",
                note="of the largest derivative, of a function"
                if math.isnan(bound)
                else f"{history.layers.types[worst]}: at most {bound:.3g}",
            ),
            "input_max_abs": Evidence(value=largest, note="largest entry of the first layer's input"),
        },
        ruled_out=() if by_data or math.isnan(largest) else (_data_ruled_out(largest),),
    )


def _data_ruled_out(largest: float) -> RuledOut:
    return RuledOut(cause=Cause.DATA, reason=f"largest entry of the input {largest:.2g}")
