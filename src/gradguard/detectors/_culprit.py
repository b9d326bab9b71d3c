"""Where and why a gradient shrinks or grows on its way through depth."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from gradguard.detectors._attribution import theory_evidence
from gradguard.detectors._depth import TRUNK_ROLES, power
from gradguard.detectors._numbers import column, finite_median, signal
from gradguard.findings import Cause, Evidence
from gradguard.records import StepRecord

__all__ = ["Explanation", "explain_depth"]

_STANDS_OUT = 1.0
"""Decades by which one module's loss must exceed the typical one. Ours: initial weights of one kind of layer differ by
less than 0.3 decades in what they pass."""

_GOOD_SHARE = 0.3
"""Share of the span that one module must lose to be its culprit. Ours: a third of the decades is no longer a uniform
decay."""

_NEIGHBOURS = 3
"""Trunk rows on either side of a module that must show the drop across it: a branch's loss shows in none of them.
Ours."""

_EXPLAINS = 0.25
"""Share of the span that activations (or weights) must lose together to be its cause. Ours."""

_SATURATION = 0.3
"""Mean derivative, as a share of its bound, below which activations are saturated rather than merely flat. Ours: a
sigmoid at initialization passes 0.85 of its bound, a tanh at twice the usual gain 0.6."""

_WEIGHT_GAIN = {
    "ReLU": 1.414,
    "ReLU6": 1.414,
    "LeakyReLU": 1.414,
    "PReLU": 1.414,
    "RReLU": 1.414,
    "Threshold": 1.414,
    "ELU": 1.245,
    "CELU": 1.245,
    "GELU": 1.534,
    "SiLU": 1.677,
    "Mish": 1.6,
    "Hardswish": 1.7,
}
"""Weight gain that keeps the forward variance with an activation, 1/sqrt(E phi(z)^2); 1 for those not named, which are
critical there (tanh) or whose loss no weights should have to make up for (sigmoid, at most 1/4: Glorot and Bengio
2010).
Source: He et al. (2015), arXiv 1502.01852, for ReLU; the others are numeric integrals, algorithms.md, section D."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Why a gradient changes through depth.

    Attributes:
        cause: The cause as far as the numbers tell.
        layer: Dotted name of the culprit, or of the most typical layer of a uniform change; ``None`` if unknown.
        single: Whether that one module stands out.
        evidence: Measured gains by name.
    """

    cause: Cause
    layer: str | None
    single: bool
    evidence: dict[str, Evidence] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Step:
    """What one module does to the gradient on its way back: log10 of output gradient over input gradient."""

    row: int
    role: str
    lost: float


def explain_depth(record: StepRecord, rows: NDArray[np.intp], span: float) -> Explanation:
    """Attribute a depth span to one module, or to what all of them have in common.

    Args:
        record: The observation that shows it.
        rows: Indices of the trunk rows, in execution order.
        span: Its depth span in decades, not 0.

    Source: ours (architecture.md, section 3, "The culprit of a depth finding").
    """
    trunk_rows = [int(i) for i in rows]
    sign = -1.0 if span > 0.0 else 1.0
    steps = _steps(record, trunk_rows[0], trunk_rows[-1])
    evidence = _gains(record, steps, trunk_rows)
    culprit = _stand_out(record, steps, trunk_rows, span, sign)
    if culprit is not None:
        name = record.layers.names[culprit.row]
        evidence["culprit_gain"] = Evidence(
            value=power(-culprit.lost), unit="ratio", note=f"gradient at the input of {name} over that at its output"
        )
        return Explanation(cause=_cause_of_module(record, culprit), layer=name, single=True, evidence=evidence)
    evidence |= theory_evidence(record, rows)
    cause = _common_cause(record, evidence, trunk_rows, span, sign)
    return Explanation(cause=cause, layer=_typical(record, trunk_rows), single=False, evidence=evidence)


def _steps(record: StepRecord, first: int, last: int) -> list[_Step]:
    """Return the loss of every innermost module between two rows; a normalization is added to the layer it follows.

    Behind a normalization the scale of the weights cancels, so the two are one.
    """
    delta, given = signal(record), signal(record, at="input_delta")
    names, roles = record.layers.names, record.layers.roles
    steps: list[_Step] = []
    for row in range(first, last + 1):
        if not (0.0 < delta[row] < math.inf and 0.0 < given[row] < math.inf) or _contains(names, row):
            continue
        step = _Step(row, roles[row], math.log10(delta[row]) - math.log10(given[row]))
        before = steps[-1] if steps else None
        follows = (
            before is not None and before.role == "affine" and math.isclose(delta[before.row], given[row], rel_tol=1e-6)
        )
        if before is not None and follows and roles[row] == "norm":
            steps[-1] = _Step(before.row, before.role, before.lost + step.lost)
        else:
            steps.append(step)
    return steps


def _contains(names: tuple[str, ...], row: int) -> bool:
    prefix = f"{names[row]}." if names[row] else ""
    return any(index != row and name.startswith(prefix) for index, name in enumerate(names))


def _stand_out(record: StepRecord, steps: list[_Step], rows: list[int], span: float, sign: float) -> _Step | None:
    """Return the module that loses (or gains) by far the most, if the trunk beside it shows the same drop."""
    if not steps:
        return None
    worst = max(steps, key=lambda step: sign * step.lost)
    alike = [sign * step.lost for step in steps if step.role == worst.role and step is not worst]
    typical = float(np.median(alike)) if len(alike) >= 2 else 0.0
    lost = sign * worst.lost
    if lost - typical <= _STANDS_OUT or lost < _GOOD_SHARE * abs(span):
        return None
    logs = np.log10(signal(record)[rows])
    before = logs[[i for i, row in enumerate(rows) if row < worst.row]][-_NEIGHBOURS:]
    after = logs[[i for i, row in enumerate(rows) if row >= worst.row]][:_NEIGHBOURS]
    if before.size == 0 or after.size == 0:
        return None
    across = sign * float(np.median(after) - np.median(before))
    return worst if across >= _GOOD_SHARE * lost else None


def _cause_of_module(record: StepRecord, step: _Step) -> Cause:
    if step.role == "activation":
        if column(record, "inactive_fraction")[step.row] > 0.5:
            return Cause.DEAD_UNITS
        return Cause.SATURATION if _is_saturated(record, [step.row]) else Cause.ACTIVATION_DERIVATIVE
    if step.role in {"affine", "recurrent", "embedding", "attention"}:
        return Cause.WEIGHT_SCALE
    return Cause.NORMALIZATION if step.role == "norm" else Cause.UNKNOWN


def _gains(record: StepRecord, steps: list[_Step], rows: list[int]) -> dict[str, Evidence]:
    """Return what activations and weights typically pass: the numbers that tell one from the other."""
    evidence: dict[str, Evidence] = {}
    weights = [power(-step.lost) for step in steps if step.role in {"affine", "recurrent"}]
    if weights:
        evidence["weight_gain"] = Evidence(
            value=float(np.median(weights)), unit="ratio", note="gradient at a layer's input over that at its output"
        )
    activations = [i for i in range(rows[0], rows[-1]) if record.layers.roles[i] == "activation"]
    passed = [power(-step.lost) for step in steps if step.role == "activation"] or _passed_by_code(record, rows)
    slope = finite_median(column(record, "derivative_mean")[activations]) if activations else math.nan
    if not passed and slope > 0.0:
        passed = [slope]
    kind, bound = _activation(record, activations)
    limit = f"{kind}: at most {bound:.3g}" if kind and not math.isnan(bound) else kind
    if passed:
        evidence["activation_gain"] = Evidence(value=float(np.median(passed)), unit="ratio", note=limit)
    if not math.isnan(slope):
        evidence["derivative_mean"] = Evidence(value=slope, unit="ratio", note=limit)
    if kind:
        evidence["activation"] = Evidence(value=kind)
    return evidence


def _passed_by_code(record: StepRecord, rows: list[int]) -> list[float]:
    """Return what lies between one layer's output and the next one's input where activations are plain functions."""
    delta, given = signal(record), signal(record, at="input_delta")
    layers = [row for row in rows if record.layers.roles[row] in {"affine", "recurrent"}]
    return [
        power(math.log10(delta[before]) - math.log10(given[after]))
        for before, after in itertools.pairwise(layers)
        if 0.0 < given[after] < math.inf and 0.0 < delta[before] < math.inf
    ]


def _activation(record: StepRecord, rows: list[int]) -> tuple[str, float]:
    """Return the commonest activation between the rows, and the bound of its derivative."""
    kinds = [record.layers.types[row] for row in rows]
    if not kinds:
        return "", math.nan
    kind = max(dict.fromkeys(kinds), key=kinds.count)
    return kind, record.layers.derivative_bounds[rows[kinds.index(kind)]]


def _common_cause(
    record: StepRecord, evidence: dict[str, Evidence], rows: list[int], span: float, sign: float
) -> Cause:
    """Return whether activations or weights lose more than they should, over all layers of a uniform change."""
    activation, weight = _value(evidence, "activation_gain"), _value(evidence, "weight_gain")
    activations = [i for i in range(rows[0], rows[-1]) if record.layers.roles[i] == "activation"]
    kind, _ = _activation(record, activations)
    layers = sum(record.layers.roles[row] in {"affine", "recurrent"} for row in rows)
    wanted = _WEIGHT_GAIN.get(kind, 1.0)
    if not kind and np.isfinite(column(record, "input_inactive_fraction")[rows]).any():
        wanted = _WEIGHT_GAIN["ReLU"]
    by_activation = -sign * math.log10(activation * wanted) if activation > 0.0 else 0.0
    by_weight = -sign * math.log10(weight / wanted) if weight > 0.0 else 0.0
    most = max(by_activation, by_weight) * max(1, layers - 1)
    if most < _EXPLAINS * abs(span):
        return Cause.UNKNOWN
    if by_weight >= by_activation:
        batch_norm = [row for row in rows if record.layers.types[row].startswith("BatchNorm")]
        return Cause.NORMALIZATION if span > 0.0 and len(batch_norm) >= layers / 2 else Cause.WEIGHT_SCALE
    if span > 0.0:
        return Cause.ACTIVATION_DERIVATIVE
    if kind in _WEIGHT_GAIN and finite_median(column(record, "inactive_fraction")[activations]) > 0.5:
        return Cause.DEAD_UNITS
    return Cause.SATURATION if _is_saturated(record, activations) else Cause.ACTIVATION_DERIVATIVE


def _is_saturated(record: StepRecord, rows: list[int]) -> bool:
    share = column(record, "derivative_mean")[rows] / np.array(record.layers.derivative_bounds)[rows]
    return bool(finite_median(column(record, "saturated_fraction")[rows]) > 0.5 or finite_median(share) < _SATURATION)


def _typical(record: StepRecord, rows: list[int]) -> str | None:
    """Return the layer whose gain is nearest to the median one."""
    layers = [row for row in rows if record.layers.roles[row] in TRUNK_ROLES - {"norm"}] or rows
    logs = np.log10(signal(record)[layers])
    if len(layers) < 2:
        return None
    gains = np.diff(logs)
    apart = np.round(np.abs(gains - np.median(gains)), 6)
    return record.layers.names[layers[1 + int(np.argmin(apart))]]


def _value(evidence: dict[str, Evidence], name: str) -> float:
    value = evidence[name].value if name in evidence else math.nan
    return float(value)
