"""What was checked and ruled out: causes that the numbers exclude, each with the number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._depth import trunk, weight_layers
from gradguard.detectors._numbers import parameter_column, signal
from gradguard.detectors._reasons import active_units, usual_input, usual_rate
from gradguard.detectors._zeros import ZeroOwner, zero_pattern
from gradguard.detectors.depth import observed_spans
from gradguard.findings import Cause, Finding, RuledOut, Severity
from gradguard.history import History
from gradguard.records import StepRecord

__all__ = ["with_exclusions"]

_FLOAT32 = 2.0**-23
"""Rounding unit of float32. Source: IEEE 754-2019."""

_OWN_STORY = ("GG2",)
"""Non-finite numbers spoil every other measurement: their rules state what they excluded."""


@dataclass(frozen=True, slots=True)
class _Case:
    """A finding and the observation at which it began."""

    history: History
    config: GuardConfig
    finding: Finding
    index: int

    @property
    def record(self) -> StepRecord:
        return self.history.records[self.index]


def with_exclusions(history: History, config: GuardConfig, finding: Finding) -> Finding:
    """Return a finding with every cause that the numbers exclude, beside those that its rule has stated.

    Looked at is the observation at which it began, or the last one before. A cause is excluded only by a measurement:
    what was not observed excludes nothing. Notes (INFO) stay as they are.

    Args:
        history: Records of one optimizer.
        config: Thresholds.
        finding: One that a detector made of them.

    Source: ours (architecture.md, section 2, "Primary, cause, evidence").
    """
    if finding.severity < Severity.WARNING or finding.code.startswith(_OWN_STORY) or not len(history):
        return finding
    steps = history.steps.astype(np.int64)
    index = max(0, int(np.searchsorted(steps, finding.step, side="right")) - 1)
    case = _Case(history, config, finding, index)
    stated = {item.cause for item in finding.ruled_out} | {finding.cause}
    added = tuple(
        RuledOut(cause=cause, reason=reason)
        for cause, check in _CHECKS.items()
        if cause not in stated and (reason := check(case))
    )
    return replace(finding, ruled_out=(*finding.ruled_out, *added)) if added else finding


def _learning_rate(case: _Case) -> str:
    if case.finding.family in {"learning_rate", "no_update", "clipping"}:
        return ""
    if case.finding.step == 0 and case.record.step == 0 and case.finding.family != "divergence":
        return "there at step 0, before any update"
    return usual_rate(case.history, case.config, case.index)


def _precision(case: _Case) -> str:
    units = parameter_column(case.record, "rounding_unit")
    known = units[~np.isnan(units)]
    if not known.size or known.max() > _FLOAT32 or zero_pattern(case.record).owner is not ZeroOwner.NOBODY:
        return ""
    if (parameter_column(case.record, "underflow_fraction") > 0.0).any():
        return ""
    return "weights in float32, and no layer's gradient is zero"


def _weight_scale(case: _Case) -> str:
    if case.finding.code in {"GG101", "GG102", "GG403"}:
        return ""
    span = float(observed_spans(case.history, case.config)[case.index])
    layers = len(weight_layers(case.record.layers, trunk(case.record.layers, signal(case.record))))
    if math.isnan(span) or abs(span) > case.config.span_info:
        return ""
    return f"the gradient keeps its size over {layers} layers ({abs(span):.1f} decades)"


def _wiring(case: _Case) -> str:
    if case.finding.family in {"no_gradient", "no_update"}:
        return ""
    absent, held = parameter_column(case.record, "absent"), parameter_column(case.record, "in_optimizer")
    trainable = parameter_column(case.record, "trainable") == 1.0
    if not trainable.any() or (absent[trainable] != 0.0).any() or (held[trainable] != 1.0).any():
        return ""
    return "every trainable parameter has a gradient" + (" and an optimizer" if case.history.info.optimizers else "")


_CHECKS: dict[Cause, Callable[[_Case], str]] = {
    Cause.LEARNING_RATE: _learning_rate,
    Cause.DATA: lambda case: usual_input(case.record),
    Cause.PRECISION: _precision,
    Cause.DEAD_UNITS: lambda case: active_units(case.record, case.config),
    Cause.WEIGHT_SCALE: _weight_scale,
    Cause.WIRING: _wiring,
}
