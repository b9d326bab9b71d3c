"""What an integration needs to log a run: observe on logging steps, and put observations into a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gradguard.detectors._updates import median_ratios
from gradguard.detectors.dead_units import unit_shares
from gradguard.detectors.depth import observed_spans
from gradguard.findings import Severity
from gradguard.history import History

if TYPE_CHECKING:
    from gradguard._cadence import Cadence
    from gradguard.config import GuardConfig
    from gradguard.findings import Finding
    from gradguard.records import FloatArray, StepRecord

__all__ = ["LoggingCadence", "LoggingSteps", "log_values"]

_SEPARATE_OPTIMIZERS = 4
"""Optimizers whose gradient norms get names of their own; with the six other values that makes ten."""


class LoggingSteps:
    """Whether the framework logs the present step, shared by the cadences of all optimizers.

    Attributes:
        now: Whether it does.
    """

    def __init__(self) -> None:
        """Start with a step that is not logged."""
        self.now = False


class LoggingCadence:
    """Another cadence, and every step that the framework logs: then each logged row holds a new observation.

    Example:
        >>> from gradguard._cadence import FixedCadence
        >>> logging = LoggingSteps()
        >>> cadence = LoggingCadence(FixedCadence(every=100), logging)
        >>> cadence.due(7)
        False
        >>> logging.now = True
        >>> cadence.due(7)
        True
    """

    def __init__(self, cadence: Cadence, logging: LoggingSteps) -> None:
        """Make a cadence.

        Args:
            cadence: Decides on the steps that are not logged.
            logging: Says which are.
        """
        self._cadence = cadence
        self._logging = logging

    def due(self, step: int) -> bool:
        """Whether the coming step, counted from 0, is to be observed."""
        return self._logging.now or self._cadence.due(step)

    def observed(self, step: int, cost_s: float) -> None:
        """Learn what observing a step cost, in seconds of host time."""
        self._cadence.observed(step, cost_s)

    def look_closer(self, step: int) -> None:
        """Observe this step, if it is not over, and more densely after it."""
        self._cadence.look_closer(step)


def log_values(
    records: Sequence[StepRecord],
    findings: Sequence[Finding],
    *,
    config: GuardConfig,
    optimizer_count: int,
    overhead: float,
) -> dict[str, float]:
    """Put observations into at most ten numbers.

    ``step`` is the optimizer step that was observed, from 0. Where a row is logged without an observation, because
    training stops there or a step was skipped, Lightning repeats the newest values, and an unchanged ``step`` says so.
    ``grad_norm`` is the total L2 norm before clipping and ``grad_norm_at_step`` the one that the optimizer found. With
    several optimizers there is ``grad_norm_0``, ``grad_norm_1``, ... for the first four instead. The others are the
    worst of all optimizers: ``span_decades`` (depth span, negative where the gradient shrinks towards the input),
    ``update_ratio_log10`` (median over matrices), ``dead_fraction`` (largest of a layer, 0 to 1). ``findings`` counts
    the illnesses that stand, and ``overhead_fraction`` is gradguard's share of wall time, 0 to 1.

    Args:
        records: The new observations, at least one.
        findings: Findings as they stand.
        config: Thresholds.
        optimizer_count: Optimizers that are watched.
        overhead: Share of wall time spent in gradguard, 0 to 1.

    Returns:
        Values by name; unknown ones are NaN.
    """
    values = {"step": float(max(record.step for record in records))}
    if optimizer_count > 1:
        newest = {record.optimizer: record for record in records}
        for index in range(min(optimizer_count, _SEPARATE_OPTIMIZERS)):
            record = newest.get(index)
            values[f"grad_norm_{index}"] = math.nan if record is None else record.scalars.get("grad_norm", math.nan)
    else:
        for name in ("grad_norm", "grad_norm_at_step"):
            values[name] = records[-1].scalars.get(name, math.nan)
    parts = [_alone(record) for record in records]
    values["span_decades"] = _worst([float(observed_spans(part, config)[-1]) for part in parts])
    ratios = [float(median_ratios(part)[-1]) for part in parts]
    values["update_ratio_log10"] = _worst([math.log10(ratio) if ratio > 0.0 else math.nan for ratio in ratios])
    values["dead_fraction"] = _largest([unit_shares(part, "dead_fraction") for part in parts])
    standing = [f for f in findings if f.standing and f.consequence_of is None and f.severity >= Severity.WARNING]
    values["findings"] = float(len(standing))
    values["overhead_fraction"] = overhead
    return values


def _alone(record: StepRecord) -> History:
    history = History()
    history.append(record)
    return history


def _worst(values: Sequence[float]) -> float:
    """Return the known value that is farthest from 0, NaN for none."""
    return max((value for value in values if not math.isnan(value)), key=abs, default=math.nan)


def _largest(shares: Sequence[FloatArray]) -> float:
    known = [float(share) for array in shares for share in array[~np.isnan(array)]]
    return max(known, default=math.nan)
