"""What a finding of training should say of learning rates and of the usual norm: cures take their size from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from gradguard.detectors._numbers import finite_median, usual_rate
from gradguard.findings import Evidence, Finding, Severity
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["with_sizes"]

_OF_STEPS = frozenset({"GG101", "GG102", "GG301", "GG302", "GG402", "GG501", "GG505", "GG701", "GG702"})
"""Illnesses that steps which are too large make."""

_EVENTS = frozenset({"GG103", "GG505", "GG703"})
"""Illnesses that come over a run whose gradient was of usual size until then."""

_APART = 10.0
"""Factor between a group's rate and that of most entries from which it is named. Ours: layer-wise decay, heads and
embeddings in fine-tuning stay below."""

_CLIMBED = 10.0
"""Factor by which the rate has climbed from which that is named. Ours: schedules that only fall never do."""


def with_sizes(history: History, finding: Finding) -> Finding:
    """Return a finding with the learning rates that may have made it, and the gradient's norm before an event.

    Args:
        history: Records of one optimizer.
        finding: One that a detector made of them.

    Source: the usual norm to clip at: Pascanu, Mikolov, Bengio (2013), ICML, section 3.2. Rates: ours; a group
        at a hundred times the rate of the others, and a rate that climbs a thousandfold, are cured by lowering those,
        and by nothing else that a trial can do.
    """
    if finding.severity < Severity.WARNING or finding.step == 0 == finding.last_step:
        return finding
    added = _usual_norm(history, finding.step) if finding.code in _EVENTS else {}
    if finding.code in _OF_STEPS:
        added |= _uneven(history) | _climbed(history)
    return replace(finding, evidence={**finding.evidence, **added}) if added else finding


def _usual_norm(history: History, step: int) -> dict[str, Evidence]:
    usual = finite_median(history.scalar("grad_norm")[history.steps < step])
    return {"usual_norm": Evidence(value=usual, unit="L2 norm", note="median before it")} if usual > 0.0 else {}


def _uneven(history: History) -> dict[str, Evidence]:
    rates = history.parameter("lr")[-1]
    usual = usual_rate(rates, np.array(history.parameters.sizes, dtype=np.float64))
    highest = float(rates[np.isfinite(rates)].max(initial=0.0))
    if not highest >= _APART * usual:
        return {}
    return {
        "highest_lr": Evidence(value=highest, note="learning rate of a group"),
        "usual_lr": Evidence(value=usual, note="learning rate of most weights"),
    }


def _climbed(history: History) -> dict[str, Evidence]:
    rates: FloatArray = history.scalar("lr")
    rates = rates[np.isfinite(rates) & (rates > 0.0)]
    if not rates.size or rates.max() < _CLIMBED * rates[0]:
        return {}
    return {
        "first_lr": Evidence(value=float(rates[0]), note="learning rate at first"),
        "climbed_lr": Evidence(value=float(rates.max()), note="learning rate that it has climbed to"),
    }
