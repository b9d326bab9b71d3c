"""Why a cause is ruled out, in words with the number: shared by the rules that state it and by the checks for all."""

from __future__ import annotations

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._numbers import column, percent, power_of_ten
from gradguard.detectors._updates import median_ratios
from gradguard.history import History
from gradguard.records import StepRecord

__all__ = ["active_units", "usual_input", "usual_rate"]

_USUAL_INPUT = 100.0
"""Largest input entry of data that need no scaling. Ours: eight-bit images as they come reach 255."""


def usual_rate(history: History, config: GuardConfig, index: int) -> str:
    """Return that the update-to-weight ratio of an observation lies within its limits, empty where it does not.

    Args:
        history: Records of one optimizer.
        config: Thresholds.
        index: The observation.
    """
    ratio = float(median_ratios(history)[index])
    within = config.update_ratio_low < ratio < config.update_ratio_high
    return f"update/weight {power_of_ten(ratio)} when it began" if within else ""


def usual_input(record: StepRecord) -> str:
    """Return that the model was given finite numbers of usual size, empty where it was not or nothing is known."""
    given = column(record, "input_max_abs")
    known = given[~np.isnan(given)]
    if not known.size or not np.isfinite(known).all() or not 0.0 < known[0] <= _USUAL_INPUT:
        return ""
    return f"finite, largest entry {known[0]:.2g}"


def active_units(record: StepRecord, config: GuardConfig, *, unknown: str = "") -> str:
    """Return that no layer has many inactive units, empty where one has.

    Args:
        record: The observation.
        config: Thresholds.
        unknown: What to return where no layer has units that can be inactive.
    """
    shares = np.concatenate([column(record, "inactive_fraction"), column(record, "input_inactive_fraction")])
    shares = shares[np.isfinite(shares)]
    if not shares.size:
        return unknown
    if shares.max() >= config.dead_fraction_warning:
        return ""
    return f"at most {percent(float(shares.max()))} of a layer's units inactive"
