"""GG401 recurrent-spectral-radius and GG402 spectral-norm-growth: what the weights alone would do. Evidence, mostly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._finding import make_finding
from gradguard.detectors._numbers import names_text
from gradguard.detectors._updates import matrix_ratios, ratio_quantile
from gradguard.detectors.depth import observed_spans
from gradguard.detectors.temporal import find_temporal
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.history import History

__all__ = ["find_norm_growth", "find_recurrent_radius"]

_EXPLAINS = 0.5
"""Share of the measured factor per step, as a logarithm, that a radius must account for to be its reason. Ours."""

_FRACTION_OF_OTHERS = 0.1
"""A matrix that starts below this share of the median one, as zero-initialized branches do, grows from there. Ours."""

_GROWING = 1.1
"""Growth over the last half of the observed steps from which a norm still grows. Ours."""

_GROWTH_STEPS = 100
"""Optimizer steps over which a norm must have been watched. Ours: it is a trend, not the first steps' rearranging."""


def find_recurrent_radius(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find recurrent weights that account for a gradient which vanishes or explodes through time.

    Spoken of only beside GG111 or GG112, whose profile is measured: a radius alone is no illness, and default nets have
    one of 0.6. In a plain RNN the weights are the reason where their spectral radius, on the same side of 1, makes up
    half of the measured factor per step or more. In LSTM and GRU the gates decide what is forgotten; only growth is put
    down to weights there, where a gate's sigma_max times the largest derivative of its nonlinearity exceeds 1.

    It is a remark; a warning where the gradient through time is one and its cause are the weights.

    Args:
        history: Records of one optimizer, oldest first; needs ``spectral_radius`` and ``temporal_span``.
        config: Thresholds.

    Returns:
        At most one finding per GG111 and GG112, for the matrix farthest from 1.

    Source:
        Pascanu, Mikolov, Bengio (2013), "On the difficulty of training recurrent neural networks", ICML, arXiv
        1211.5063, section 2.1: sigma_max < 1/gamma suffices for vanishing, sigma_max > 1/gamma is only necessary for
        exploding, gamma being the largest derivative. That the radius, not the norm, predicts the factor: ours (default
        RNN of 32 units: sigma_max 1.13, radius 0.60, measured factor 0.55; algorithms.md, section E).
    """
    if not any(any(record.matrices.recurrent) for record in history.records):
        return []
    findings = []
    for temporal in find_temporal(history, config):
        if not temporal.standing or "factor_per_step" not in temporal.evidence:
            continue
        found = _gated(history, temporal) if "mean_gate" in temporal.evidence else _plain(history, temporal)
        if found is not None:
            findings.append(found)
    return findings


def find_norm_growth(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find weights whose largest singular value keeps growing.

    It must be ``sigma_growth`` times what it was at the start, have grown over the last half of the steps as well, and
    have been watched for 100 steps. It is a remark; a warning where the gradient explodes through depth by then and the
    update ratio does not explain it.

    Args:
        history: Records of one optimizer, oldest first; needs ``sigma_max``.
        config: Thresholds.

    Returns:
        At most one finding, for the matrix that has grown most; the others stand in ``layers``.

    Source: ours, see ``sigma_growth``; the bound: Yoshida, Miyato (2017), arXiv 1705.10941.
    """
    steps, sigma = history.steps, history.matrix("sigma_max")
    if len(history) < config.minimum_observations or not sigma.size or steps[-1] - steps[0] < _GROWTH_STEPS:
        return []
    known = np.where(np.isfinite(sigma), sigma, 0.0)
    first = known[:2].max(axis=0)  # power iteration begins a few per cent short
    floor = _FRACTION_OF_OTHERS * float(np.median(first[first > 0.0])) if (first > 0.0).any() else 0.0
    start = np.maximum(first, floor)
    half = known[np.searchsorted(steps, (steps[0] + steps[-1]) / 2.0)]
    grown = (start > 0.0) & (known[-1] > config.sigma_growth * start) & (known[-1] > _GROWING * half)
    if not grown.any():
        return []
    rows = sorted(np.flatnonzero(grown), key=lambda row: -known[-1, row] / start[row])
    worst = int(rows[0])
    beyond = np.flatnonzero(known[:, worst] > config.sigma_growth * start[worst])
    names = history.matrices.names
    now = float(known[-1, worst])
    text = f"The largest singular value of {names_text((names[worst],))} has grown from {start[worst]:.3g} to {now:.3g}"
    text += " and grows on" + (f"; so have {len(rows) - 1} more." if len(rows) > 1 else ".")
    return [
        make_finding(
            "GG402",
            _growth_severity(history, config),
            text,
            step=int(steps[beyond[0]]),
            last_step=int(steps[-1]),
            layer=history.matrices.layers[worst] or names[worst],
            layers=tuple(names[row] for row in rows),
            cause=Cause.WEIGHT_SCALE,
            confidence=0.5,
            evidence={
                "sigma_max": Evidence(value=now, note="largest singular value, from below"),
                "sigma_max_first": Evidence(value=float(start[worst]), note="at the first observations"),
                "growth": Evidence(
                    value=now / float(start[worst]), unit="ratio", note=f"a remark beyond {config.sigma_growth:g}"
                ),
            },
        )
    ]


def _growth_severity(history: History, config: GuardConfig) -> Severity:
    spans = observed_spans(history, config)
    known = spans[~np.isnan(spans)]
    explodes = known.size > 0 and float(known[-1]) > config.span_warning
    ratio = float(ratio_quantile(matrix_ratios(history), 0.5)[-1])
    fast = ratio > config.update_ratio_high  # then the rate is the reason, and GG501 says so
    return Severity.WARNING if explodes and not fast else Severity.INFO


def _plain(history: History, temporal: Finding) -> Finding | None:
    """Judge the matrix of a plain RNN whose radius lies farthest from 1, on the side of the measured factor."""
    factor = _log(temporal.evidence["factor_per_step"].value)
    rows = _rows(history, temporal)
    radii = history.matrix("spectral_radius")[-1]
    explaining = [row for row in rows if _log(radii[row]) * factor > 0.0]
    if not explaining:
        return None
    row = max(explaining, key=lambda row: abs(_log(radii[row])))
    if abs(_log(radii[row])) < _EXPLAINS * abs(factor):
        return None
    radius, sigma = float(radii[row]), float(history.matrix("sigma_max")[-1, row])
    name, verb = history.matrices.names[row], "shrink" if factor < 0.0 else "enlarge"
    text = (
        f"The recurrent weights {names_text((name,))} {verb} the state: spectral radius {radius:.2f}; "
        f"the gradient through time was measured to change by {math.exp(factor):.2g} per step."
    )
    evidence = {
        "spectral_radius": Evidence(value=radius, note="1 would keep the state's size"),
        "sigma_max": Evidence(value=sigma, note=_pascanu(sigma, history.matrices.derivative_bounds[row])),
    }
    return _finding(history, temporal, [row], text, evidence)


def _gated(history: History, temporal: Finding) -> Finding | None:
    """Judge the gates of an LSTM or GRU, where the gradient grows and the weights were found to be the cause."""
    if temporal.code != "GG112" or temporal.cause is not Cause.WEIGHT_SCALE:
        return None
    sigma, bounds = history.matrix("sigma_max")[-1], history.matrices.derivative_bounds
    rows = [row for row in _rows(history, temporal) if sigma[row] * bounds[row] > 1.0]
    if not rows:
        return None
    rows.sort(key=lambda row: -sigma[row] * bounds[row])
    name, largest = history.matrices.names[rows[0]], float(sigma[rows[0]])
    text = (
        f"The recurrent weights {names_text((name,))} can enlarge the state: sigma_max {largest:.2f} times the largest "
        f"derivative of its gate, {bounds[rows[0]]:g}, is above 1."
    )
    evidence = {
        f"sigma_max {_part(history.matrices.names[row])}": Evidence(
            value=float(sigma[row]), note=_pascanu(float(sigma[row]), bounds[row])
        )
        for row in rows
    }
    return _finding(history, temporal, rows, text, evidence)


def _pascanu(sigma: float, bound: float) -> str:
    """Say what a largest singular value proves."""
    limit = 1.0 / bound
    if sigma < limit:
        return f"below {limit:g}: sufficient for vanishing, whatever the data"
    return f"above {limit:g}: necessary for exploding, not sufficient; vanishing is not certain"


def _finding(
    history: History, temporal: Finding, rows: Sequence[int], text: str, evidence: dict[str, Evidence]
) -> Finding:
    agrees = temporal.severity >= Severity.WARNING and temporal.cause is Cause.WEIGHT_SCALE
    return make_finding(
        "GG401",
        Severity.WARNING if agrees else Severity.INFO,
        text,
        step=temporal.step,
        last_step=temporal.last_step,
        layer=temporal.layer,
        layers=tuple(history.matrices.names[row] for row in rows),
        cause=Cause.WEIGHT_SCALE,
        confidence=temporal.confidence,
        evidence={**evidence, "factor_per_step": temporal.evidence["factor_per_step"]},
    )


def _rows(history: History, temporal: Finding) -> list[int]:
    """Return the recurrent matrices of the module that a finding is about."""
    table = history.matrices
    return [
        row
        for row, (layer, recurrent) in enumerate(zip(table.layers, table.recurrent, strict=True))
        if recurrent and layer == (temporal.layer or "")
    ]


def _log(value: object) -> float:
    number = float(value) if isinstance(value, int | float) else math.nan
    return math.log(number) if number > 0.0 else 0.0


def _part(name: str) -> str:
    return name.partition("[")[2].rstrip("]") or name
