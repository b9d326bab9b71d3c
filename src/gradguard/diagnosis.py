"""Findings to a Diagnosis: what was seen, what is wrong, and a verdict in one sentence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._attribution import layer_gains, single_sigmas
from gradguard.detectors._block_profile import block_profile
from gradguard.detectors._depth import TRUNK_ROLES, power, trunk, weight_layers
from gradguard.detectors._loss import loss_progress
from gradguard.detectors._numbers import column, signal
from gradguard.detectors._updates import median_ratios
from gradguard.detectors.dead_units import unit_shares
from gradguard.detectors.depth import observed_spans
from gradguard.detectors.temporal import time_profiles
from gradguard.findings import Cause, Diagnosis, Finding, LayerProfile, RunSummary, Severity, Unobserved
from gradguard.history import History
from gradguard.linking import link_findings
from gradguard.records import FloatArray, StepRecord

__all__ = ["diagnose"]

_CAUSES = {
    Cause.WEIGHT_SCALE: "the scale of the weights",
    Cause.NORMALIZATION: "the normalization layers",
    Cause.GATES: "the gates",
    Cause.DEAD_UNITS: "dead units",
    Cause.SATURATION: "saturated units",
    Cause.LEARNING_RATE: "the learning rate",
    Cause.DATA: "the input data",
    Cause.PRECISION: "numeric precision",
    Cause.LOSS: "the loss function",
    Cause.OPERATION: "a numerically unsafe operation",
}


def diagnose(
    history: History,
    findings: Sequence[Finding],
    *,
    unobserved: Sequence[Unobserved] = (),
    overhead: float = math.nan,
    batches: int = 0,
    steps: int = 0,
    config: GuardConfig | None = None,
) -> Diagnosis:
    """Turn findings into a verdict.

    Args:
        history: What was observed, of all optimizers.
        findings: What the detectors say about it, in any order.
        unobserved: What could not be measured, and why.
        overhead: Share of wall time spent observing, 0 to 1, NaN where unknown.
        batches: Backward passes seen.
        steps: Optimizer steps taken, over all optimizers.
        config: Thresholds; defaults otherwise.

    Returns:
        The diagnosis. Its findings stand root cause first, each followed by what it explains; what has cleared comes
        last. It is ``sufficient`` where every optimizer that stepped was observed ``minimum_observations`` times (a
        check: once) with gradients, at least some of them at the outputs of layers.
    """
    settings = config if config is not None else GuardConfig()
    linked = link_findings(findings)
    part = _shown_part(history, linked)
    reason = _too_little(history, settings, batches=batches, steps=steps)
    summary = _summary(history, part, settings, overhead=overhead, batches=batches, steps=steps)
    diagnosis = Diagnosis(
        findings=linked,
        verdict="",
        observations=history.observations,
        sufficient=not reason,
        unobserved=tuple(unobserved),
        layers=_profile(part, linked),
        summary=summary,
        time_profiles=time_profiles(history, linked),
        block_profile=block_profile(part),
    )
    return replace(diagnosis, verdict=_verdict(diagnosis, history, settings, reason))


def _shown_part(history: History, findings: Sequence[Finding]) -> History:
    """Return the part whose layers and numbers the report shows: that of the primary's optimizer, else the fullest."""
    parts = history.split()
    if len(parts) == 1:
        return parts[0]
    primary = next((f for f in findings if f.standing and f.severity >= Severity.WARNING), None)
    labels = [optimizer.label for optimizer in history.info.optimizers]
    if primary is not None and primary.optimizer in labels:
        index = labels.index(primary.optimizer)
        return next((part for part in parts if part.optimizer == index), parts[0])
    return max(parts, key=lambda part: int(np.isfinite(part.layer("delta_norm")[-1:]).sum()))


def _too_little(history: History, config: GuardConfig, *, batches: int, steps: int) -> str:
    """Return why nothing can be said, empty where enough was observed."""
    preflight = history.info.preflight
    if not len(history):
        return _nothing_observed(preflight=preflight, batches=batches, steps=steps)
    read = [int((~np.isnan(part.parameter("grad_norm"))).any(axis=1).sum()) for part in history.split() if len(part)]
    if max(read) == 0:
        return (
            f"{len(history)} observations, and no parameter had a gradient at any of them. They were read "
            "too early or too "
            "late: call guard.record(loss=loss) after backward() and before zero_grad()."
        )
    needed = 1 if preflight else config.minimum_observations
    if min(read) < needed:
        made = f"{min(read)} observation{'s' if min(read) != 1 else ''} with gradients, over {steps} optimizer steps"
        return f"{made}: at least {needed} are needed to call a run healthy."
    if not (~np.isnan(history.layer("delta_norm"))).any():
        return (
            "Gradients of parameters were read, none at the output of a layer: enough to find non-finite numbers and "
            "missing updates, not to call the gradient flow healthy."
        )
    return ""


def _nothing_observed(*, preflight: bool, batches: int, steps: int) -> str:
    if preflight:
        return "The check read no gradient."
    if steps:
        return (
            f"{steps} optimizer steps seen, and no gradient at any of them. Call guard.record(loss=loss) "
            "after backward() and before zero_grad()."
        )
    if batches:
        passes = f"{batches} backward pass{'es' if batches != 1 else ''}"
        return (
            f"0 optimizer steps seen after {passes}. Pass the optimizer that updates this model to "
            "gradguard.watch, or call guard.step() after each update."
        )
    return "Nothing was observed: no backward pass and no optimizer step was seen."


def _verdict(diagnosis: Diagnosis, history: History, config: GuardConfig, reason: str) -> str:
    primary = diagnosis.primary
    if primary is not None:
        return primary.message + _cause_text(primary)
    if reason:
        return reason
    summary = diagnosis.summary
    seen = f"{summary.steps} steps, {diagnosis.observations} observed."
    if history.info.preflight:
        seen = "One forward and one backward pass."
    if math.isnan(summary.span_decades):
        return f"{seen} Gradients arrive and are finite. Nothing to do."
    limit = f"{abs(summary.span_decades):.1f} decades; {config.span_warning:g} would worry us"
    depth = f" through {summary.layer_count} layers" if summary.layer_count else ""
    return f"{seen} The gradient keeps its size{depth} ({limit}). Nothing to do."


def _cause_text(finding: Finding) -> str:
    if finding.code in {"GG501", "GG502"}:
        return ""
    activation = finding.evidence.get("activation")
    if finding.cause is Cause.ACTIVATION_DERIVATIVE:
        return f" Cause: {activation.value} derivatives." if activation else " Cause: the activation's derivative."
    return f" Cause: {_CAUSES[finding.cause]}." if finding.cause in _CAUSES else ""


def _profile(part: History, findings: Sequence[Finding]) -> tuple[LayerProfile, ...]:
    """Return the layers as the newest observation that saw gradients has them."""
    record = _newest(part)
    if record is None:
        return ()
    table, delta = record.layers, signal(record)
    rows = [int(row) for row in trunk(table, delta)]
    gains = {row: power(math.log10(delta[before]) - math.log10(delta[row])) for before, row in itertools.pairwise(rows)}
    marks = _marks(record, findings)
    active = _active_fractions(record)
    forward = column(record, "forward_rms")
    predicted = {gain.row: gain.predicted for gain in layer_gains(record, np.array(rows, dtype=np.intp))}
    sigma = single_sigmas(record)
    return tuple(
        LayerProfile(
            name=name,
            kind=table.kinds[row],
            role=table.roles[row],
            delta_norm=float(delta[row]),
            gain=gains.get(row, math.nan),
            forward_rms=float(forward[row]),
            active_fraction=float(active[row]),
            predicted_gain=predicted.get(row, math.nan),
            sigma=sigma.get(name, math.nan),
            trunk=table.roles[row] in TRUNK_ROLES,
            mark=marks.get(name, ""),
        )
        for row, name in enumerate(table.names)
    )


def _newest(part: History) -> StepRecord | None:
    """Return the newest observation at which a gradient reached a layer, else the newest with layers, if any."""
    shown = [record for record in reversed(part.records) if len(record.layers)]
    return next((r for r in shown if not np.isnan(signal(r)).all()), shown[0] if shown else None)


def _marks(record: StepRecord, findings: Sequence[Finding]) -> dict[str, str]:
    """Return the code of the first standing finding whose culprit a layer is, by layer."""
    owners = dict(zip(record.parameters.names, record.parameters.layers, strict=True))
    marks: dict[str, str] = {}
    for finding in findings:
        uniform = "gain_per_layer" in finding.evidence and "culprit_gain" not in finding.evidence
        if finding.standing and finding.layer is not None and not uniform:
            marks.setdefault(owners.get(finding.layer, finding.layer), finding.code)
    return marks


def _active_fractions(record: StepRecord) -> FloatArray:
    """Return the share of active units per row; a layer with weights takes that of the activation behind it."""
    own = 1.0 - column(record, "inactive_fraction")
    behind = 1.0 - column(record, "input_inactive_fraction")
    active = own.copy()
    following = math.nan
    for row in range(len(own) - 1, -1, -1):
        role = record.layers.roles[row]
        if role == "activation":
            following = float(own[row])
        elif role in TRUNK_ROLES:
            active[row] = following
            following = float(behind[row]) if role != "norm" else following
    return active


def _summary(
    history: History, part: History, config: GuardConfig, *, overhead: float, batches: int, steps: int
) -> RunSummary:
    loss = loss_progress(history)
    norms = part.scalar("grad_norm")
    norms = norms[np.isfinite(norms)]
    low, middle, high = np.percentile(norms, [5, 50, 95]) if norms.size else (math.nan, math.nan, math.nan)
    spans = observed_spans(part, config) if len(part) else np.array([])
    ratio = _last(median_ratios(part)) if len(part) else math.nan
    share, layer = _dead(part)
    before_clipping = history.scalar("read_before_clipping")
    return RunSummary(
        kind="check" if history.info.preflight else "run",
        steps=steps,
        batches=batches,
        layer_count=_layer_count(part),
        parameter_count=history.info.parameter_count,
        optimizers=tuple(optimizer.name for optimizer in history.info.optimizers),
        loss_first=loss.first,
        loss_last=loss.last,
        grad_norm_median=float(middle),
        grad_norm_p5=float(low),
        grad_norm_p95=float(high),
        update_ratio_log10=math.log10(ratio) if ratio > 0.0 else math.nan,
        span_decades=_last(spans),
        dead_fraction=share,
        dead_layer=layer,
        overhead_fraction=overhead,
        clip_known=not bool((before_clipping == 0.0).any()),
    )


def _last(values: FloatArray) -> float:
    """Return the last known value, NaN for none."""
    known = values[~np.isnan(values)]
    return float(known[-1]) if known.size else math.nan


def _layer_count(part: History) -> int:
    record = _newest(part)
    return 0 if record is None else len(weight_layers(record.layers, trunk(record.layers, signal(record))))


def _dead(part: History) -> tuple[float, str]:
    """Return the largest share of dead units when last known (a check: of inactive ones), and its layer."""
    if not len(part):
        return math.nan, ""
    shares = unit_shares(part, "inactive_fraction" if part.info.preflight else "dead_fraction")
    known = np.flatnonzero(np.isfinite(shares).any(axis=1))
    if not known.size:
        return math.nan, ""
    row = int(np.nanargmax(shares[known[-1]]))
    return float(shares[known[-1], row]), part.layers.names[row]
