"""What a report says, in words and in order; how it looks is the affair of console and HTML."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gradguard.findings import Cause, Diagnosis, Evidence, Finding, RunSummary, Severity
from gradguard.report._format import evidence_texts, measured, number, power, seconds, share

__all__ = [
    "SHOW_ALL",
    "Illness",
    "because",
    "block_text",
    "consequence_text",
    "cost_items",
    "headline",
    "illnesses",
    "jacobian_text",
    "others_below",
    "remarks",
    "result_items",
    "status",
    "theory",
    "title",
    "unobserved_texts",
    "when",
    "where",
]

SHOW_ALL = "show_all=True"
"""How to see what is folded, in ``guard.report(...)`` and in ``print_report(...)``."""

_EVIDENCE_SHOWN = 6
"""Pieces of evidence per finding, unless everything is shown. Ours: more are read by nobody."""

_SHOWN_ELSEWHERE = frozenset(
    {
        *("span", "gain_per_layer", "layers", "first_delta", "last_delta", "activation"),
        *("predicted_gain", "sigma_w", "critical_sigma_w", "layers_per_decade", "certain_loss"),
    }
)
"""Evidence that the verdict, the table of layers or the line on theory shows already."""


@dataclass(slots=True)
class Illness:
    """A finding that nothing else explains, and what follows from it."""

    finding: Finding
    consequences: list[Finding] = field(default_factory=list)


def status(diagnosis: Diagnosis) -> str:
    """Return the verdict in one or two words."""
    return {True: "HEALTHY", False: "SICK", None: "NO VERDICT"}[diagnosis.healthy]


def title(summary: RunSummary) -> str:
    """Return what was made: a report on a run, or a check before the first step."""
    return "gradguard check" if summary.kind == "check" else "gradguard"


def illnesses(diagnosis: Diagnosis) -> list[Illness]:
    """Return the standing findings at ``WARNING`` or above that nothing else explains, each with its consequences.

    Each standing finding that another explains stands under exactly one illness, however long the chain between them.
    One whose explanation is not there is an illness of its own: nothing may be lost.
    """
    return _sorted_out(diagnosis)[0]


def remarks(diagnosis: Diagnosis) -> list[Finding]:
    """Return what is neither an illness nor follows from one: notes, and what has cleared."""
    return _sorted_out(diagnosis)[1]


def _sorted_out(diagnosis: Diagnosis) -> tuple[list[Illness], list[Finding]]:
    findings = diagnosis.findings
    roots = [_root(index, findings) for index in range(len(findings))]
    ill = {
        index: Illness(finding)
        for index, finding in enumerate(findings)
        if roots[index] == index and finding.standing and finding.severity >= Severity.WARNING
    }
    notes = []
    for index, finding in enumerate(findings):
        if index in ill:
            continue
        if finding.standing and roots[index] in ill:
            ill[roots[index]].consequences.append(finding)
        else:
            notes.append(finding)
    return list(ill.values()), notes


def _root(index: int, findings: tuple[Finding, ...]) -> int:
    """Return which finding explains this one in the end: itself, where none does."""
    path = [index]
    while (parent := _parent(path[-1], findings)) is not None:
        if parent in path:
            return min(path[path.index(parent) :])
        path.append(parent)
    return path[-1]


def _parent(index: int, findings: tuple[Finding, ...]) -> int | None:
    child = findings[index]
    if child.consequence_of is None:
        return None
    candidates = [
        at
        for at, other in enumerate(findings)
        if at != index and other.standing and other.severity >= Severity.WARNING and other.code == child.consequence_of
    ]
    return min(candidates, key=lambda at: (findings[at].optimizer != child.optimizer, at), default=None)


def others_below(ill: list[Illness]) -> str:
    """Return which further illnesses the report describes; empty where there is one at most."""
    if len(ill) < 2:
        return ""
    names = [f"{item.finding.code} {item.finding.name}" for item in ill[1:]]
    return f"{len(names)} more below: {', '.join(dict.fromkeys(names))}."


def headline(finding: Finding, summary: RunSummary) -> list[str]:
    """Return what stands behind a finding's name: severity, optimizer, time, confidence; of a note without the last."""
    optimizer = f"optimizer {finding.optimizer}" if finding.optimizer else ""
    sure = f"sure {finding.confidence:.2f}" if finding.severity >= Severity.WARNING else ""
    severity = finding.severity.name if finding.standing else ""
    return [item for item in (severity, optimizer, when(finding, summary), sure) if item]


def when(finding: Finding, summary: RunSummary) -> str:
    """Return since when a finding stands, or from when to when it stood."""
    if summary.kind == "check":
        return "before the first step"
    if finding.resolved_step is not None:
        return f"from step {finding.step}, cleared at step {finding.resolved_step}"
    if finding.last_step > finding.step:
        return f"since step {finding.step}, still there at {finding.last_step}"
    return f"since step {finding.step}"


def where(finding: Finding, *, show_all: bool = False) -> str:
    """Return the place of a finding in words; with ``show_all`` every name."""
    names = finding.layers
    if not names:
        return finding.layer or "the whole run"
    if len(names) <= 3:
        return ", ".join(names)
    span = f"{names[0]} to {names[-1]} ({len(names)} in all)"
    if "culprit_gain" in finding.evidence and finding.layer is not None:
        span = f"{finding.layer}, the largest loss or gain among {span}"
    elif (pace := _pace(finding.evidence.get("gain_per_layer"))) is not None:
        span = f"{span}, evenly: {pace:.2f} decades per layer"
    elif finding.layer not in (None, names[0], names[-1]):
        span = f"{finding.layer}, among {span}"
    return f"{span}; {', '.join(names)}" if show_all else span


def _pace(gain: Evidence | None) -> float | None:
    if gain is None or isinstance(gain.value, str) or not 0.0 < gain.value < math.inf:
        return None
    return abs(math.log10(gain.value))


def because(finding: Finding, *, show_all: bool = False) -> tuple[str, str]:
    """Return the cause, and the evidence for it (which may be empty)."""
    cause = "not known" if finding.cause is Cause.UNKNOWN else finding.cause.value
    shown = {name: item for name, item in finding.evidence.items() if show_all or name not in _SHOWN_ELSEWHERE}
    return cause, "; ".join(evidence_texts(shown)[: None if show_all else _EVIDENCE_SHOWN])


def theory(finding: Finding) -> str:
    """Return what mean-field theory makes of the reader's own numbers; empty where it says nothing of this finding."""
    predicted, measured_gain = _value(finding, "predicted_gain"), _value(finding, "gain_per_layer")
    weights, slope = _value(finding, "sigma_w"), _value(finding, "derivative_mean")
    if math.isnan(predicted + measured_gain + weights):
        return ""
    kind = finding.evidence.get("activation")
    name = f"{kind.value}'s slope" if kind is not None else "the activation's slope"
    made_of = f"weights of scale {weights:.3g}" + ("" if math.isnan(slope) else f" times {name} of {slope:.3g}")
    text = f"{made_of} should pass {predicted:.3g} per layer, and {measured_gain:.3g} was measured"
    per_decade = _value(finding, "layers_per_decade")
    if per_decade < math.inf:
        text += f": a factor of 10 every {per_decade:.2g} layers"
    certain = _value(finding, "certain_loss")
    if certain < -1.0:
        text += (
            f"; the largest singular values and derivatives prove a loss of {-certain:.1f} decades, whatever the data"
        )
    wished = _value(finding, "critical_sigma_w")
    if not math.isnan(wished):
        return f"{text}; a scale of {wished:.3g} would keep the gradient's size"
    return text if math.isnan(slope) else f"{text}; no usual scale of weights makes up for such a slope"


def _value(finding: Finding, name: str) -> float:
    item = finding.evidence.get(name)
    return math.nan if item is None or isinstance(item.value, str) else float(item.value)


def consequence_text(finding: Finding, root: Finding, summary: RunSummary) -> str:
    """Return what follows from an illness; since when, if it came later."""
    name = f"{finding.code} {finding.name}"
    if finding.optimizer != root.optimizer and finding.optimizer:
        name += f" (optimizer {finding.optimizer})"
    if finding.step != root.step and summary.kind != "check":
        name += f" since step {finding.step}"
    return f"{name}: {finding.message}"


def result_items(summary: RunSummary) -> list[str]:
    """Return the run's numbers; unknown ones are left out."""
    items = []
    check = summary.kind == "check"
    if not check and not (math.isnan(summary.loss_first) and math.isnan(summary.loss_last)):
        items.append(f"loss {measured(summary.loss_first)} > {measured(summary.loss_last)}")
    if not math.isnan(summary.grad_norm_median):
        text = f"grad norm {measured(summary.grad_norm_median, 2)}"
        if not check and not math.isnan(summary.grad_norm_p5 + summary.grad_norm_p95):
            text += f" (p5 {measured(summary.grad_norm_p5, 2)}, p95 {measured(summary.grad_norm_p95, 2)})"
        items.append(text if check or summary.clip_known else f"{text} at the step (before clipping: not known)")
    if math.isfinite(summary.update_ratio_log10):
        items.append(f"update/weight {power(summary.update_ratio_log10)}")
    if summary.dead_fraction > 0.0:
        at = f" ({summary.dead_layer})" if summary.dead_layer else ""
        items.append(f"{'inactive' if check else 'dead'} units at most {number(summary.dead_fraction, 'fraction')}{at}")
    elif summary.dead_fraction == 0.0:
        items.append("no inactive units" if check else "no dead units")
    return items


def block_text(diagnosis: Diagnosis, *, show_all: bool) -> str:
    """Return where a Transformer has its norms, and what its feed-forward gradients do; empty for others.

    It is no illness: a healthy run is told on request only.
    """
    found = diagnosis.block_profile
    if found is None or not (show_all or diagnosis.healthy is False):
        return ""
    where = "before" if found.placement == "pre-LN" else "after"
    usual = {
        "pre-LN": "usual for pre-LN: even, or smaller near the output",
        "post-LN": "usual for post-LN: larger near the output, which is why it needs a warmup",
    }
    first, last = (measured(found.ffn_grad_norm[at], 2) for at in (0, -1))
    return (
        f"{len(found.blocks)} Transformer blocks, {found.placement} (norms {where} the residual additions): "
        f"feed-forward gradient {first} in the first and {last} in the last at step {found.step}, a factor of "
        f"{measured(found.growth, 2)} by trend ({usual[found.placement]})"
    )


def jacobian_text(diagnosis: Diagnosis) -> str:
    """Return how far the Jacobian stretches, and what would be well; empty where it was not measured."""
    found = diagnosis.jacobian
    if found is None:
        return ""
    block = found.name or "the whole net"
    start = "" if found.source == "the input" else f" from {found.source} on"
    low = measured(found.smallest, 2) if found.smallest_certified else f"at most {measured(found.smallest, 2)}"
    high = measured(found.largest, 2) if found.largest_certified else f"at least {measured(found.largest, 2)}"
    text = f"Jacobian of {block}{start}: stretches from {low} to {high}"
    if found.smallest_certified and found.largest_certified:
        text += f" ({found.decades:.1f} decades)"
    text += f", {'' if found.exact else 'about '}{measured(found.rms, 2)} in the root mean square"
    judged = {
        "isometric": "isometric (all between 0.5 and 2)",
        "not isometric": "not isometric (all between 0.5 and 2), which is no fault by itself",
    }
    return f"{text}; {judged.get(found.isometry, 'whether that is isometric (all between 0.5 and 2) is not known')}"


def cost_items(diagnosis: Diagnosis) -> list[str]:
    """Return how much was seen, what it cost, and whether anything was left out."""
    summary, items = diagnosis.summary, []
    if summary.kind == "check":
        items.append("one forward and one backward pass, before the first step")
    else:
        seen = f"{summary.steps} steps, {diagnosis.observations} observed"
        if seen not in diagnosis.verdict:
            items.append(seen)
        if math.isfinite(summary.overhead_fraction):
            spent = f" ({seconds(summary.overhead_s)})" if math.isfinite(summary.overhead_s) else ""
            items.append(f"overhead {_percent(summary.overhead_fraction)} of time{spent}")
    if not diagnosis.unobserved:
        items.append("nothing unobserved")
    return items


def _percent(value: float) -> str:
    return f"{100.0 * value:.1f} %" if value >= 0.0005 else ("0 %" if value <= 0.0 else f"below {share(0.001)}")


def unobserved_texts(diagnosis: Diagnosis) -> list[str]:
    """Return what could not be measured, and why."""
    return [f"not observed: {note.what}: {note.why}" for note in diagnosis.unobserved]
