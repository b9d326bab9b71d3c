"""Prescriptions: for each finding and cause the cures to try, best first, as data. Nothing here acts.

Each comes with a reason, lines to paste, what to expect of it, and a source. The lines use ``model``, ``optimizer``,
``batch`` and the names of a usual training loop; where the library can apply a cure they do what it does. Nobody has
tried them yet: ``effect`` is ``None`` until a trial measures it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from gradguard.findings import Diagnosis, Finding, LayerProfile, Prescription, Severity
from gradguard.prescriptions._choice import CURES, RESERVES
from gradguard.prescriptions._suited import activation_of, suited
from gradguard.prescriptions._texts import REMEDIES

__all__ = [
    "plain_prescription",
    "prescribe",
    "prescriptions_for",
    "reserves_for",
    "with_factor",
    "with_rate",
]

_RATE_FACTORS = (1e-4, 0.5, 2.0, 1e4)
"""Smallest and largest factor by which to lower, and to raise, a learning rate at once. Ours."""

_TO_CLIP = 1.0
"""Norm to clip at against spikes, over the usual one. Source: Pascanu et al. (2013), arXiv 1211.5063, section 3.2: the
average norm; half to ten times it work. Ours: of 17 runs with outliers in their data trained to their ends 15 come
within 0.02 of the best of half, once and twice the usual norm; twice costs regressions up to 0.18 of the variance."""

_TO_CUT_SPIKES = 2.0
"""Norm, over the usual or the largest one, above which there are only spikes. Source: ours, the rule GG103."""


def prescribe(diagnosis: Diagnosis) -> Diagnosis:
    """Return the diagnosis with prescriptions for every standing finding that no other explains.

    What follows from another finding goes away with it, and what has cleared needs no cure: they get none.

    Args:
        diagnosis: A verdict without prescriptions.
    """
    findings = (replace(f, prescriptions=prescriptions_for(f, diagnosis.layers)) for f in diagnosis.findings)
    return replace(diagnosis, findings=tuple(findings))


def prescriptions_for(finding: Finding, layers: Sequence[LayerProfile] = ()) -> tuple[Prescription, ...]:
    """Return the cures to try for one finding, best first; empty for what has cleared or follows from another.

    Args:
        finding: A finding with its cause and evidence.
        layers: The model's layers, by which cures are chosen that suit its kind; may be empty where unknown.
    """
    if not finding.standing or finding.consequence_of is not None:
        return ()
    names = CURES.get((finding.code, finding.cause), CURES.get((finding.code, None), ()))
    return tuple(_fill(name, finding) for name in suited(names, finding, layers))


def reserves_for(finding: Finding, layers: Sequence[LayerProfile] = ()) -> tuple[Prescription, ...]:
    """Return cures of layers in general that suit the model, the least invasive first.

    Args:
        finding: What they are for.
        layers: The model's layers; may be empty where unknown.
    """
    return tuple(_fill(name, finding) for name in suited(RESERVES, finding, layers))


def plain_prescription(name: str) -> Prescription:
    """Return a cure by name, without a finding that asks for it.

    Args:
        name: Name of the remedy, for instance ``"layer-norm"``.

    Raises:
        ValueError: If there is no such remedy.
    """
    if name not in REMEDIES:
        near = get_close_matches(name, REMEDIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no remedy {name!r}{hint} Known: {', '.join(sorted(REMEDIES))}")
    nothing = Finding(code="", name="", family="", severity=Severity.INFO, message="", step=0, last_step=0)
    return _fill(name, nothing)


def with_factor(prescription: Prescription, factor: float) -> Prescription:
    """Return a prescription of another learning rate with another factor, in its arguments and in its code.

    Args:
        prescription: ``"lower-learning-rate"`` or ``"higher-learning-rate"``.
        factor: Above 0.
    """
    factor = _rounded(factor, 2)
    code = REMEDIES[prescription.remedy].code.format(factor=f"{factor:.2g}")
    return replace(prescription, arguments={**prescription.arguments, "factor": factor}, code=code)


def with_rate(prescription: Prescription, factor: float) -> Prescription:
    """Return a prescription together with another learning rate: in its arguments, in its reason and in its code.

    Args:
        prescription: Of anything; one of a learning rate gets another factor.
        factor: Above 0.
    """
    if "factor" in prescription.arguments:
        return with_factor(prescription, factor * float(prescription.arguments["factor"]))
    factor = _rounded(factor, 2)
    why = "overshoot" if factor < 1.0 else "are far too short"
    change = REMEDIES["lower-learning-rate"].code.format(factor=f"{factor:.2g}")
    return replace(
        prescription,
        arguments={**prescription.arguments, "lr_factor": factor},
        reason=f"{prescription.reason} At {factor:.2g} times the learning rate: at the run's own its steps {why}.",
        code=f"{prescription.code}\n{change}",
    )


def _fill(name: str, finding: Finding) -> Prescription:
    remedy = REMEDIES[name]
    arguments = _arguments(name, finding)
    values = {
        "layer": finding.layer or "the model's output",
        "parameter": next(iter(finding.layers), ""),
        "activation": activation_of(finding),
        "factor": f"{arguments.get('factor', 1.0):.2g}",
        "norm": f"{_clip_norm(name, finding):.3g}",
        "steps": f"{_time_steps(finding)}",
        "times": f"{_apart(finding):.3g}",
    }
    return Prescription(
        remedy=name,
        reason=remedy.reason.format(**values),
        code=remedy.code.format(**values),
        expected=remedy.expected.format(**values),
        reference=remedy.reference,
        arguments=arguments,
    )


def _arguments(name: str, finding: Finding) -> dict[str, Any]:
    """Return the arguments with which the remedy is applied, the same as those written in its code."""
    if name in {"lower-learning-rate", "higher-learning-rate"}:
        return {"factor": _rounded(_factor(name, finding), 2)}
    if name == "clip-norm":
        return {"max_norm": _clip_norm(name, finding)}
    if name in {"chrono-initialization", "gated-cell", "lstm"}:
        return {"max_time": _time_steps(finding)}
    if name in {"freeze", "add-to-optimizer"}:
        return {"parameters": finding.layers}
    return {}


def _rounded(value: float, digits: int) -> float:
    return float(f"{value:.{digits}g}")


def _time_steps(finding: Finding) -> int:
    """Return the time steps that were looked at, 100 where that is not known; at least 3, for ln U(1, T - 1)."""
    known = finding.evidence.get("time_steps")
    return max(3, int(known.value)) if known is not None else 100


def _apart(finding: Finding) -> float:
    """Return how many times the rate of most weights the highest one is, 10 where that is not known."""
    rates = [finding.evidence.get(name) for name in ("highest_lr", "usual_lr")]
    highest, usual = (float(rate.value) if rate is not None else math.nan for rate in rates)
    return highest / usual if usual > 0.0 else 10.0


def _clip_norm(name: str, finding: Finding) -> float:
    """Return the threshold to clip at: by the usual norm, or the largest where a threshold is never reached; else 1."""
    usual = finding.evidence.get("largest_norm" if name == "lower-clip-norm" else "usual_norm")
    value = finding.evidence.get("value")
    if usual is None and value is not None and value.note == "gradient norm":
        usual = finding.evidence.get("usual")
    times = _TO_CLIP if name == "clip-norm" else _TO_CUT_SPIKES
    norm = times * float(usual.value) if usual is not None else 1.0
    return _rounded(norm, 3) if 0.0 < norm < math.inf else 1.0


def _factor(name: str, finding: Finding) -> float:
    """Return the factor for the learning rate that would bring the update ratio near 1e-3, within bounds."""
    low, less, more, high = _RATE_FACTORS
    ratio = finding.evidence.get("update_ratio")
    known = ratio is not None and isinstance(ratio.value, float) and math.isfinite(ratio.value) and ratio.value > 0.0
    if name == "higher-learning-rate":
        wanted = 1e-3 / float(ratio.value) if ratio is not None and known else 10.0
        return min(high, max(more, wanted))
    wanted = 1e-3 / float(ratio.value) if ratio is not None and known else 0.1
    return max(low, min(less, wanted))
