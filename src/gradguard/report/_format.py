"""Numbers and names in the form in which people read them."""

from __future__ import annotations

import math

from gradguard.findings import Diagnosis, Evidence, Finding, RunSummary, Severity

__all__ = [
    "elide",
    "evidence_text",
    "footer_lines",
    "illnesses",
    "number",
    "power",
    "remarks",
    "status",
    "summary_line",
    "when",
    "where",
]

_GENERIC_UNITS = frozenset({"", "ratio", "fraction", "L2 norm"})
"""Units that go without saying: a plain number, or a share that is printed in per cent."""


def number(value: float | str, unit: str = "") -> str:
    """Return a number with at most three significant digits; a fraction in per cent; words as they are.

    Example:
        >>> number(0.213), number(1.23e-14), number(0.213, "fraction"), number(12), number(float("nan"))
        ('0.213', '1.2e-14', '21 %', '12', 'unknown')
    """
    if isinstance(value, str):
        return value
    if math.isnan(value):
        return "unknown"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if unit == "fraction":
        percent = 100.0 * value
        return f"{percent:.0f} %" if percent >= 1.0 or percent == 0.0 else f"{percent:.1g} %"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    if unit == "decades":
        return f"{value:.1f}"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 else f"{value:.1e}"


def power(exponent: float) -> str:
    """Return a power of ten by its exponent.

    Example:
        >>> power(-3.14)
        '10^-3.1'
    """
    return "unknown" if math.isnan(exponent) else f"10^{exponent:.1f}"


def elide(text: str, width: int) -> str:
    """Shorten a text in the middle to at most ``width`` characters.

    Example:
        >>> elide("encoder.layers.11.attention.output.dense", 20)
        'encoder.l...ut.dense'
    """
    if len(text) <= width:
        return text
    if width <= 5:
        return text[:width]
    left = (width - 3 + 1) // 2
    return f"{text[:left]}...{text[len(text) - (width - 3 - left) :]}"


def evidence_text(name: str, evidence: Evidence) -> str:
    """Return one piece of evidence as words: name, number, unit and what to compare it with."""
    text = f"{name.replace('_', ' ')} {number(evidence.value, evidence.unit)}"
    if evidence.unit not in _GENERIC_UNITS and name.rstrip("s") != evidence.unit.rstrip("s"):
        text += f" {evidence.unit}"
    return f"{text} ({evidence.note})" if evidence.note else text


def status(diagnosis: Diagnosis) -> str:
    """Return the verdict in one or two words."""
    return {True: "HEALTHY", False: "SICK", None: "NO VERDICT"}[diagnosis.healthy]


def illnesses(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    """Return the standing findings at ``WARNING`` or above that nothing else explains."""
    return tuple(
        f for f in diagnosis.findings if f.standing and f.severity >= Severity.WARNING and f.consequence_of is None
    )


def remarks(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    """Return what is neither an illness nor follows from one: notes, and what has cleared."""
    ill = {finding.code for finding in illnesses(diagnosis)}
    shown = illnesses(diagnosis)
    return tuple(f for f in diagnosis.findings if f not in shown and not (f.standing and f.consequence_of in ill))


def when(finding: Finding, summary: RunSummary) -> str:
    """Return since when a finding stands, or from when to when it stood; empty for a check."""
    if summary.kind == "check":
        return ""
    if finding.resolved_step is not None:
        return f"from step {finding.step}, cleared at step {finding.resolved_step}"
    if finding.last_step > finding.step:
        return f"since step {finding.step}, still there at {finding.last_step}"
    return f"since step {finding.step}"


def where(finding: Finding) -> str:
    """Return the place of a finding in words."""
    layers = finding.layers
    if finding.layer is not None and "culprit_gain" in finding.evidence and len(layers) > 1:
        return f"{finding.layer}, among {len(layers)} layers from {layers[0]} to {layers[-1]}"
    if len(layers) > 3:
        text = f"{layers[0]} to {layers[-1]} ({len(layers)} in all)"
        uniform = "gain_per_layer" in finding.evidence
        gain = finding.evidence["gain_per_layer"].value if uniform else math.nan
        if uniform and isinstance(gain, (int, float)) and gain > 0.0:
            return f"{text}, evenly: {abs(math.log10(gain)):.2f} decades per layer"
        return text if finding.layer in (None, layers[0], layers[-1]) else f"{finding.layer}; {text}"
    if layers:
        return ", ".join(layers)
    return finding.layer or "the whole run"


def summary_line(summary: RunSummary) -> str:
    """Return the run's numbers in one line; unknown ones are left out."""
    parts = []
    if not math.isnan(summary.loss_first) and not math.isnan(summary.loss_last) and summary.kind != "check":
        parts.append(f"loss {number(summary.loss_first)} > {number(summary.loss_last)}")
    if not math.isnan(summary.grad_norm_median):
        text = f"grad norm {number(summary.grad_norm_median)}"
        if summary.kind != "check":
            text += f" (p5 {number(summary.grad_norm_p5)}, p95 {number(summary.grad_norm_p95)})"
        parts.append(text + ("" if summary.clip_known or summary.kind == "check" else " at the step, after clipping"))
    if not math.isnan(summary.update_ratio_log10):
        parts.append(f"update/weight {power(summary.update_ratio_log10)}")
    if summary.dead_fraction > 0.0:
        parts.append(f"dead units at most {number(summary.dead_fraction, 'fraction')} ({summary.dead_layer})")
    elif summary.dead_fraction == 0.0:
        parts.append("no dead units")
    return "   ".join(parts)


def footer_lines(diagnosis: Diagnosis) -> list[str]:
    """Return how much was seen, what it cost, and what was not observed and why."""
    summary = diagnosis.summary
    if summary.kind == "check":
        parts = ["checked by one forward and one backward pass"]
    else:
        parts = [f"{summary.steps} steps, {diagnosis.observations} observed"]
        if not math.isnan(summary.overhead_fraction):
            spent = "" if math.isnan(summary.overhead_s) else f"{summary.overhead_s:.2g} s, "
            parts.append(f"overhead {spent}{100 * summary.overhead_fraction:.1f} % of time")
    if not diagnosis.unobserved:
        return [" · ".join([*parts, "nothing unobserved"])]
    return [" · ".join(parts), *(f"not observed: {note.what}: {note.why}" for note in diagnosis.unobserved)]
