"""Prescriptions: for each finding and cause the cures to try, best first, as data. Nothing here acts.

Each comes with a reason, lines of plain PyTorch to paste, and a source. The lines use ``model``, ``optimizer`` and the
names of a usual training loop. Nobody has tried them yet: ``effect`` is ``None`` until a trial measures it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

from gradguard.findings import Diagnosis, Finding, Prescription, Severity
from gradguard.prescriptions._choice import CURES
from gradguard.prescriptions._texts import REMEDIES

__all__ = ["plain_prescription", "prescribe", "prescriptions_for", "with_factor"]

_RATE_FACTORS = (1e-4, 0.5, 2.0, 1e4)
"""Smallest and largest factor by which to lower, and to raise, a learning rate at once. Ours."""

_ZERO_CENTRED = frozenset({"Tanh", "Softsign", "Hardtanh"})
"""Activations for which Xavier, not He, is the initialization that keeps the variance. Source: Glorot and Bengio
(2010)."""


def prescribe(diagnosis: Diagnosis) -> Diagnosis:
    """Return the diagnosis with prescriptions for every standing finding that no other explains.

    What follows from another finding goes away with it, and what has cleared needs no cure: they get none.

    Args:
        diagnosis: A verdict without prescriptions.
    """
    return replace(
        diagnosis, findings=tuple(replace(f, prescriptions=prescriptions_for(f)) for f in diagnosis.findings)
    )


def prescriptions_for(finding: Finding) -> tuple[Prescription, ...]:
    """Return the cures to try for one finding, best first; empty for what has cleared or follows from another.

    Args:
        finding: A finding with its cause and evidence.
    """
    if not finding.standing or finding.consequence_of is not None:
        return ()
    return tuple(_fill(name, finding) for name in _names(finding))


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
    code = REMEDIES[prescription.remedy].code.format(factor=f"{factor:.2g}")
    return replace(prescription, arguments={**prescription.arguments, "factor": factor}, code=code)


def _names(finding: Finding) -> tuple[str, ...]:
    kind = finding.evidence.get("kind")
    names = CURES.get((finding.code, finding.cause), CURES.get((finding.code, None), ()))
    if finding.code == "GG104" and kind is not None:
        names = ("freeze",) if kind.value == "unused" else ("remove-detach", "freeze-module")
    if not finding.layer:
        names = tuple(name for name in names if name != "freeze-module")
    gate = finding.evidence.get("mean_gate")
    if gate is not None and "forget" not in gate.note:  # a GRU has none
        names = tuple(name for name in names if name != "forget-bias")
    if gate is not None:
        names = tuple(name for name in names if name != "gated-cell")
    elif finding.code == "GG111" and "derivative" in finding.evidence:  # a plain RNN has no gates to open
        names = tuple(name for name in names if name != "chrono-bias")
    if _activation(finding) in _ZERO_CENTRED:
        names = tuple("xavier-initialization" if name == "he-initialization" else name for name in names)
    return names


def _fill(name: str, finding: Finding) -> Prescription:
    remedy = REMEDIES[name]
    factor = _factor(name, finding)
    parameter = next(iter(finding.layers), "")
    values = {
        "layer": finding.layer or "the model's output",
        "parameter": parameter,
        "activation": _activation(finding) if name in {"relu", "layer-norm", "batch-norm"} else "ReLU",
        "factor": f"{factor:.2g}",
        "norm": f"{_usual_norm(finding):.3g}",
        "steps": f"{_time_steps(finding)}",
    }
    return Prescription(
        remedy=name,
        reason=remedy.reason.format(**values),
        code=remedy.code.format(**values),
        reference=remedy.reference,
        arguments=_arguments(name, finding, factor),
    )


def _arguments(name: str, finding: Finding, factor: float) -> dict[str, Any]:
    """Return the arguments with which the remedy could be applied by itself."""
    if name in {"lower-learning-rate", "higher-learning-rate"}:
        return {"factor": factor}
    if name == "clip-norm":
        return {"max_norm": 1.0}
    if name == "chrono-bias":
        return {"steps": _time_steps(finding)}
    if name == "relu":
        return {"activation": _activation(finding)}
    if name in {"freeze", "add-to-optimizer"}:
        return {"parameters": finding.layers}
    return {}


def _time_steps(finding: Finding) -> int:
    """Return the time steps that were looked at, 100 where that is not known; at least 3, for ln U(1, T - 1)."""
    known = finding.evidence.get("time_steps")
    return max(3, int(known.value)) if known is not None else 100


def _usual_norm(finding: Finding) -> float:
    """Return twice the usual norm of the gradient, 1 where it is not known."""
    known = finding.evidence.get("usual_norm", finding.evidence.get("largest_norm"))
    return 2.0 * float(known.value) if known is not None else 1.0


def _activation(finding: Finding) -> str:
    """Return the class name of the activation concerned, ReLU where it is not known."""
    evidence = finding.evidence.get("activation")
    return str(evidence.value) if evidence is not None else "ReLU"


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
