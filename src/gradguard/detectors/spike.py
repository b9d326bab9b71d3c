"""GG103 gradient-spike: one step's gradient, or its loss, is far out of line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._finding import make_finding
from gradguard.detectors._numbers import finite_median
from gradguard.detectors._spikes import EPISODE, Spike, last_spike, leap
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["find_spike"]

_FAR = 10.0
"""Times the usual and the first value above which a spike is a warning before anybody knows how it ends. Ours: a batch
that begins anew, or a few mislabelled examples, stay within the level of an untrained model."""

_SEEN_AFTER = 3
"""Values after a loss spike from which it is known whether the loss came back. Ours."""

_SHARE = 0.1
"""Share of the squared gradient that a layer must hold to be named. Ours: the one whose gradient grew most may be
tiny."""

_STRANGE = 3.0
"""Times the usual largest input entry above which the batch itself is out of line. Ours."""

_CUT = 0.99
"""Share of the norm left below which clipping has cut a step. Ours: rounding leaves 1 - 1e-6."""


def find_spike(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find the newest spike of the loss (every step) or of the gradient norm (every observation).

    It is a warning while the loss has not come back to its level, or, until three more steps are known, where it is ten
    times its usual and its first value; so is a gradient of that size at the last observation that no clipping cut. It
    is resolved, and INFO, once the series is back. Where the loss is not finite any more, only a leap of the loss by a
    factor of 100 out of a calm level is told, as the root of what followed.

    Args:
        history: Records of one optimizer, oldest first; needs losses, or ``grad_norm``. Either needs
            ``spike_minimum`` values before the spike.
        config: Thresholds.

    Returns:
        At most one finding, with step and batch; with the layer where the step was observed.

    Source: ours, algorithms.md, section G4.6.
    """
    if history.info.preflight:
        return []
    steps, losses = history.losses
    leapt = _of_leap(history, config, steps, losses)
    if losses.size and not np.isfinite(losses[-1]):
        return [] if leapt is None else [leapt]
    of_loss = _of_loss(history, config, steps, losses)
    if leapt is not None and (of_loss is None or leapt.step < of_loss.step):
        of_loss = leapt
    found = [finding for finding in (of_loss, _of_gradient(history, config)) if finding]
    found.sort(key=lambda finding: (finding.severity, finding.standing, finding.step))
    if len(found) == 2 and 0 <= found[1].step - found[0].step <= EPISODE:  # one event, seen twice
        first, worst = found
        resolved = (
            worst.resolved_step if worst.resolved_step is None else max(first.resolved_step or 0, worst.resolved_step)
        )
        return [replace(first, severity=worst.severity, last_step=worst.last_step, resolved_step=resolved)]
    return found[-1:]


def _of_loss(history: History, config: GuardConfig, steps: FloatArray, losses: FloatArray) -> Finding | None:
    finite = np.isfinite(losses)
    values, at = losses[finite], steps[finite].astype(np.int64)
    spike = last_spike(values, config)
    if spike is None:
        return None
    far = spike.value > _FAR * max(spike.usual, spike.start)
    lasting = spike.back is None and spike.after >= _SEEN_AFTER
    severity = Severity.WARNING if lasting or (far and spike.back is None) else Severity.INFO
    step = int(at[spike.index])
    alone = bool(spike.after and values[spike.index + 1] < 0.5 * spike.value)
    fate = "" if spike.after < _SEEN_AFTER else f" It has not come back in {spike.after} steps."
    if spike.back is not None:
        fate = f" It was back at its level at step {at[spike.back]}."
    return _finding(
        history,
        config,
        spike,
        "loss",
        severity=severity,
        message=f"The loss spiked at step {step}: {spike.value:.3g}, {spike.value / spike.usual:.3g} times its usual "
        f"{spike.usual:.3g}.{fate}",
        step=step,
        resolved_step=None if spike.back is None else int(at[spike.back]),
        last_step=step if spike.back is not None else int(at[-1]),
        cause=Cause.DATA if alone else Cause.UNKNOWN,
    )


def _of_leap(history: History, config: GuardConfig, steps: FloatArray, losses: FloatArray) -> Finding | None:
    """Tell of a leap that the loss went on from, upwards or out of all numbers: the root of what followed."""
    at = leap(losses)
    finding = None if at is None else _of_loss(history, config, steps[: at + 1], losses[: at + 1])
    return None if finding is None else replace(finding, cause=Cause.DATA, last_step=int(steps[-1]))


def _of_gradient(history: History, config: GuardConfig) -> Finding | None:
    norms = history.scalar("grad_norm")
    known = np.flatnonzero(np.isfinite(norms))
    values = norms[known]
    spike = last_spike(values, config)
    if spike is None:
        return None
    record = history.records[int(known[spike.index])]
    at_step = record.scalars.get("grad_norm_at_step", math.nan)
    cut = at_step < _CUT * spike.value
    far = spike.value > _FAR * max(spike.usual, spike.start)
    steps = history.steps.astype(np.int64)[known]
    back = None if spike.after == 0 else int(steps[spike.index + 1])
    if spike.after and values[spike.index + 1 :].min() > config.spike_ratio * spike.usual:
        back = None
    where = _grown_layer(history, int(known[spike.index]), config)
    place = f", most of all at {where}" if where else ""
    text = f"{spike.value:.3g}, {spike.value / spike.usual:.3g} times its usual {spike.usual:.3g}{place}."
    return _finding(
        history,
        config,
        spike,
        "gradient norm",
        severity=Severity.WARNING if far and back is None and not cut else Severity.INFO,
        message=f"The gradient norm spiked at step {record.step}: {text}" + (" Clipping cut it." if cut else ""),
        step=record.step,
        resolved_step=back,
        last_step=record.step if back is not None else int(steps[-1]),
    )


def _finding(history: History, config: GuardConfig, spike: Spike, series: str, **fields: Any) -> Finding:
    """Make the finding; ``fields`` are those of the finding that the series decides."""
    step = int(fields["step"])
    index = next((i for i, record in enumerate(history.records) if record.step == step), None)
    evidence = {
        "value": Evidence(value=spike.value, note=series),
        "usual": Evidence(value=spike.usual, note=f"median of up to {config.spike_window} values before it"),
        "times_usual": Evidence(value=spike.value / spike.usual, unit="ratio"),
        "z": Evidence(value=spike.z, note="robust standard deviations of the logarithm"),
        "spikes": Evidence(value=spike.count, note="among the newest values far above their neighbours"),
        "batch": Evidence(value=history.records[index].batch if index is not None else step, note="from 0"),
    }
    layer = None
    if index is not None:
        layer = _grown_layer(history, index, config)
        strange = _strange_input(history, index, config)
        if not math.isnan(strange):
            fields["cause"] = Cause.DATA
            evidence["input"] = Evidence(value=strange, unit="ratio", note="largest input entry against its usual")
    return make_finding(
        "GG103",
        **{"cause": Cause.UNKNOWN, **fields},
        layer=layer,
        layers=(layer,) if layer else (),
        confidence=min(0.9, 0.6 + 0.02 * min(15.0, max(0.0, spike.z - 4.0))),
        evidence=evidence,
    )


def _grown_layer(history: History, index: int, config: GuardConfig) -> str | None:
    """Return the layer whose gradient grew most against its own past, among those that hold a share of the whole."""
    norms = history.parameter("grad_norm")
    now = norms[index]
    total = float(np.sqrt(np.nansum(np.where(np.isfinite(now), now, 0.0) ** 2)))
    before = norms[max(0, index - config.spike_window) : index]
    best, where = 0.0, None
    for row in np.flatnonzero(np.isfinite(now) & (now > 0.0) & (now * now >= _SHARE * total * total)):
        usual = finite_median(before[:, row])
        growth = float(now[row]) / usual if usual > 0.0 else 0.0
        if growth > best:
            best, where = growth, history.parameters.layers[int(row)] or history.parameters.names[int(row)]
    return where


def _strange_input(history: History, index: int, config: GuardConfig) -> float:
    """Return by how much the first layer's largest input entry exceeds its usual, NaN where it does not."""
    largest = history.layer("input_max_abs")
    for column in largest.T:
        before = column[max(0, index - config.spike_window) : index]
        usual = finite_median(before)
        if usual > 0.0 and np.isfinite(column[index]):
            ratio = float(column[index]) / usual
            return ratio if ratio > _STRANGE else math.nan
    return math.nan
