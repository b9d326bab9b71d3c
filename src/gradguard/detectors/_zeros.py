"""Exact zeros have owners: who stopped the gradient where it is exactly 0?"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from gradguard.detectors._depth import TRUNK_ROLES, theil_sen_gain
from gradguard.detectors._numbers import column, parameter_column, signal
from gradguard.records import FloatArray, StepRecord

__all__ = ["ZeroOwner", "Zeros", "zero_pattern"]

_SMOOTH_ROWS = 3
"""Live rows needed to say that the gradient decayed on its way to zero. Ours: fewer give no trend."""

_SMOOTH_GAIN = 0.7
"""Gain per layer below which live rows decay. Ours: 0.577 is the weakest decay of torch's default initialization."""

_SMOOTH_DECADES = 2.0
"""Decades that live rows must lose before zeros count as their continuation. Ours: half precision, whose smallest
number is 6e-8, flushes gradients of ordinary size after about as much."""


class ZeroOwner(StrEnum):
    """Why the gradient is exactly zero at some layers."""

    NOBODY = "no zeros"
    BRANCH = "zero-initialized"
    BETWEEN = "between live layers"
    UNDERFLOW = "underflow"
    DEAD = "dead units"
    SATURATED = "saturation"
    CUT_OFF = "cut off"
    EVERYWHERE = "everywhere"


@dataclass(frozen=True, slots=True, kw_only=True)
class Zeros:
    """The exact zeros of one observation.

    Attributes:
        owner: Who made them.
        rows: Trunk rows at which the gradient is exactly zero.
        border: Row at which it was lost: between it and the row before, the gradient becomes zero. ``None`` if unknown.
    """

    owner: ZeroOwner
    rows: tuple[int, ...] = ()
    border: int | None = None


def zero_pattern(record: StepRecord) -> Zeros:
    """Find out who owns the exact zeros of delta in one observation.

    Zeros at every row from the input up to some layer are a prefix. A prefix belongs to dead or saturated units where
    its border shows them, to underflow where most of its parameters are known to have lost their gradient to float16 or
    where the live rows above decay smoothly towards it, to a zero-initialized module where the border's weights are
    exactly zero; else something cut the gradient off. Zeros with live rows above *and* below belong to a branch.

    Source: ours (architecture.md, section 3; algorithms.md, G3).
    """
    delta = signal(record)
    trunk = [i for i, role in enumerate(record.layers.roles) if role in TRUNK_ROLES and not math.isnan(delta[i])]
    zeros = tuple(i for i in trunk if delta[i] == 0.0)
    live = [i for i in trunk if delta[i] > 0.0]
    if not zeros:
        return Zeros(owner=ZeroOwner.NOBODY)
    prefix = tuple(i for i in zeros if not live or i < live[0])
    if not prefix:
        return Zeros(owner=ZeroOwner.BETWEEN, rows=zeros)
    span = range(prefix[-1], live[0] + 1 if live else len(delta))
    stopped = _stopped_by_units(record, span, live[0] if live else None)
    if stopped is not None:
        return Zeros(owner=stopped[0], rows=prefix, border=stopped[1])
    if _lost_to_float16(record, prefix):
        return Zeros(owner=ZeroOwner.UNDERFLOW, rows=prefix, border=live[0] if live else None)
    if not live:
        return Zeros(owner=ZeroOwner.EVERYWHERE, rows=prefix)
    if _decays(delta[live]):
        return Zeros(owner=ZeroOwner.UNDERFLOW, rows=prefix, border=live[0])
    given = signal(record, at="input_delta")
    losing = next((row for row in span if delta[row] > 0.0 and given[row] == 0.0), live[0])
    if math.isnan(given[losing]):  # it is given raw data: another branch, and no part of the way to the zeros
        losing = prefix[-1]
    zero_weighted = _zero_weighted(record)
    owner = ZeroOwner.BRANCH if any(record.layers.names[row] in zero_weighted for row in span) else ZeroOwner.CUT_OFF
    return Zeros(owner=owner, rows=prefix, border=losing)


def _stopped_by_units(record: StepRecord, span: range, first_live: int | None) -> tuple[ZeroOwner, int] | None:
    """Return the dead or saturated layer among the rows at which the gradient becomes zero, if there is one."""
    inactive, slope = column(record, "inactive_fraction"), column(record, "derivative_mean")
    saturated = column(record, "saturated_fraction")
    for row in span:
        if inactive[row] == 1.0:
            return ZeroOwner.DEAD, row
        if saturated[row] == 1.0 or (slope[row] == 0.0 and record.layers.roles[row] == "activation"):
            return ZeroOwner.SATURATED, row
    if first_live is not None and column(record, "input_inactive_fraction")[first_live] == 1.0:
        return ZeroOwner.DEAD, first_live
    return None


def _lost_to_float16(record: StepRecord, rows: tuple[int, ...]) -> bool:
    """Whether most entries at most of these rows' parameters are known to be float16's zeros."""
    names = {record.layers.names[row] for row in rows}
    shares = parameter_column(record, "underflow_fraction")
    own = np.array([layer in names for layer in record.parameters.layers], dtype=np.bool_)
    known = shares[own & np.isfinite(shares)]
    return bool(known.size) and float(np.median(known)) > 0.5


def _decays(live: FloatArray) -> bool:
    if len(live) < _SMOOTH_ROWS:
        return False
    lost = math.log10(float(live.max())) - math.log10(float(live[0]))
    return lost >= _SMOOTH_DECADES and theil_sen_gain(live) <= _SMOOTH_GAIN


def _zero_weighted(record: StepRecord) -> set[str]:
    """Return the modules with a weight (a bias does not count: biases often start at 0) that is exactly zero."""
    norms = parameter_column(record, "weight_norm")
    table = record.parameters
    return {
        layer
        for name, layer, norm in zip(table.names, table.layers, norms, strict=True)
        if norm == 0.0 and not name.rpartition(".")[2].startswith("bias")
    }
