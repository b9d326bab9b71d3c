"""Detectors: from a History to Findings. Pure functions of numbers; no torch.

Each rule, or family of rules that share their numbers, has a file. A detector says how many observations it needs and
is silent below that. To add one, write a function with the signature of :class:`Detector` and put it into
:data:`DEFAULT_DETECTORS`, or pass it as an argument; nothing registers itself on import.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from gradguard.config import GuardConfig
from gradguard.detectors._exclusions import with_exclusions
from gradguard.detectors._sizes import with_sizes
from gradguard.detectors.attention import find_entropy_collapse, find_logit_growth
from gradguard.detectors.clipping import find_clipping
from gradguard.detectors.dead_units import find_dead_units
from gradguard.detectors.depth import find_depth
from gradguard.detectors.divergence import find_divergence
from gradguard.detectors.epsilon import find_epsilon_limited, find_update_rms_spike
from gradguard.detectors.initialization import find_poor_initialization
from gradguard.detectors.learning_rate import find_learning_rate
from gradguard.detectors.no_gradient import find_missing_gradients
from gradguard.detectors.no_update import find_no_update
from gradguard.detectors.non_finite import find_non_finite
from gradguard.detectors.precision import find_loss_scale_collapse, find_lost_updates, find_underflow
from gradguard.detectors.saturated_units import find_saturated_units
from gradguard.detectors.spectral import find_norm_growth, find_recurrent_radius
from gradguard.detectors.spike import find_spike
from gradguard.detectors.temporal import find_temporal
from gradguard.findings import Finding
from gradguard.history import History

__all__ = [
    "DEFAULT_DETECTORS",
    "Detector",
    "find_clipping",
    "find_dead_units",
    "find_depth",
    "find_divergence",
    "find_entropy_collapse",
    "find_epsilon_limited",
    "find_learning_rate",
    "find_logit_growth",
    "find_loss_scale_collapse",
    "find_lost_updates",
    "find_missing_gradients",
    "find_no_update",
    "find_non_finite",
    "find_norm_growth",
    "find_poor_initialization",
    "find_recurrent_radius",
    "find_saturated_units",
    "find_spike",
    "find_temporal",
    "find_underflow",
    "find_update_rms_spike",
    "run_detectors",
]


class Detector(Protocol):
    """Judges the history of one optimizer. Pure: the same history gives the same findings, and nothing is changed."""

    def __call__(self, history: History, config: GuardConfig, /) -> Sequence[Finding]:
        """Return what is wrong, empty when all is well or too little was observed to say."""
        ...


DEFAULT_DETECTORS: tuple[Detector, ...] = (
    find_non_finite,
    find_temporal,
    find_depth,
    find_missing_gradients,
    find_dead_units,
    find_saturated_units,
    find_learning_rate,
    find_no_update,
    find_spike,
    find_underflow,
    find_lost_updates,
    find_loss_scale_collapse,
    find_poor_initialization,
    find_recurrent_radius,
    find_norm_growth,
    find_epsilon_limited,
    find_divergence,
    find_clipping,
    find_update_rms_spike,
    find_entropy_collapse,
    find_logit_growth,
)
"""Every detector of the catalogue, in the order in which they run."""


def run_detectors(
    history: History, config: GuardConfig, detectors: Sequence[Detector] = DEFAULT_DETECTORS
) -> list[Finding]:
    """Judge a history, each optimizer's part by itself.

    Args:
        history: Records of a run or a check, oldest first, of one or several optimizers.
        config: Thresholds, and the rules to apply.
        detectors: What to apply, in order.

    Returns:
        The findings of rules that ``config`` wants, in the order of optimizers and detectors; where there are several
        optimizers each finding names its own.
    """
    parts = history.split()
    findings: list[Finding] = []
    for part in parts:
        label = _label(part) if len(parts) > 1 else ""
        for detector in detectors:
            wanted = (finding for finding in detector(part, config) if config.wants(finding.code))
            found = [with_sizes(part, with_exclusions(part, config, finding)) for finding in wanted]
            findings.extend(replace(finding, optimizer=label) if label else finding for finding in found)
    return findings


def _label(part: History) -> str:
    optimizers = part.info.optimizers
    if part.optimizer < len(optimizers):
        info = optimizers[part.optimizer]
        return info.label or f"{info.name} {part.optimizer}"
    return f"optimizer {part.optimizer}"
