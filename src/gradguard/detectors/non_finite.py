"""GG201 to GG204, non-finite numbers: from the input, the forward pass, the backward pass, or the parameters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._episodes import BoolArray
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import BLOW_UP, loss_growth
from gradguard.detectors._numbers import column, is_bad
from gradguard.detectors._operation import in_words, later_origin, operation_evidence, origin_at, refine
from gradguard.detectors._origin import (
    BACKWARD,
    FORWARD,
    INPUT,
    PARAMETER,
    Origin,
    bad_gradients,
    bad_parameters,
    locate,
)
from gradguard.detectors._updates import ratio_before
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History
from gradguard.records import FloatArray, NonFiniteOrigin, StepRecord

__all__ = ["find_non_finite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Onset:
    """When numbers stopped being finite.

    Attributes:
        index: First observation that shows it, ``None`` where only losses do.
        step: First optimizer step at which anything was not finite.
        resolved_step: First step after which everything was finite again, ``None`` while it stands.
        last_step: Last step at which it was seen.
        loss_step: Step of the first non-finite loss, ``None`` for none.
    """

    index: int | None
    step: int
    last_step: int
    resolved_step: int | None
    loss_step: int | None


def find_non_finite(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find NaN and infinity, and where they come from.

    The first observation that shows them decides, in this order: a parameter, a layer's input, a layer's output, the
    loss, a gradient. Later ones are what follows; only parameters that become non-finite afterwards are reported as
    well. The losses, known at every step, date the beginning between observations. One observation is enough. Steps
    that a loss scaler skipped do not count, nor do norms whose squares overflowed, nor infinities that reach neither
    the loss nor a gradient (an attention mask). Where that very step was searched operation by operation
    (``history.origins``), what the search found goes before what the observation alone would say.

    Args:
        history: Records of one optimizer, oldest first.
        config: Thresholds; ``update_ratio_high`` tells whether the learning rate is a cause.

    Returns:
        The origin, and GG204 where parameters followed. ERROR while it stands, INFO once everything is finite again.

    Source: the ladder of pitfalls.md, section 4; ours.
    """
    onset = _onset(history)
    if onset is None:
        return []
    found = origin_at(history.origins, onset.step)
    if onset.index is None:
        return [_loss_only(history, config, onset, found)]
    record = history.records[onset.index]
    origin = locate(history, onset.index, loss_bad=_loss_bad(history, record))
    if found is not None:
        origin = refine(history, record, origin, found)
    findings = [_origin_finding(history, config, onset, record, origin, found)]
    if origin.code != PARAMETER:
        findings.extend(_parameters_afterwards(history, onset))
    return findings


def _onset(history: History) -> _Onset | None:
    records = history.steps
    skipped = history.scalar("skipped") == 1.0
    steps, losses = history.losses
    usable = ~np.isin(steps, records[skipped])
    steps, lost = steps[usable], ~np.isfinite(losses[usable])
    ill = _shows(history, steps[lost]) & ~skipped
    searched = np.array([origin.step for origin in history.origins], dtype=np.float64)
    searched = searched[~np.isin(searched, records[skipped])]
    if not ill.any() and not lost.any() and not searched.size:
        return None
    bad = np.concatenate([steps[lost], records[ill], searched])
    fine = np.concatenate([steps[~lost], records[~ill & ~skipped]])
    after = fine[fine > bad.max()]
    return _Onset(
        index=int(np.argmax(ill)) if ill.any() else None,
        step=int(bad.min()),
        last_step=int(bad.max()),
        resolved_step=int(after.min()) if after.size else None,
        loss_step=int(steps[lost].min()) if lost.any() else None,
    )


def _shows(history: History, lost_steps: FloatArray) -> BoolArray:
    """Return which observations hold a non-finite parameter, gradient or loss: what matters, wherever it came from."""
    weights = is_bad(history.parameter("weight_norm"), history.parameter("weight_max_abs"))
    gradients = is_bad(history.parameter("grad_norm"), history.parameter("grad_max_abs"))
    own_loss = np.array(
        [not math.isfinite(record.scalars.get("loss", 0.0)) for record in history.records], dtype=np.bool_
    )
    return weights.any(axis=1) | gradients.any(axis=1) | np.isin(history.steps, lost_steps) | own_loss


def _loss_bad(history: History, record: StepRecord) -> bool | None:
    """Whether the loss of an observation is not finite; ``None`` where it is not known."""
    steps, losses = history.losses
    own = losses[steps == record.step]
    if not own.size and "loss" not in record.scalars:
        return None
    return bool((~np.isfinite(own)).any()) or not math.isfinite(record.scalars.get("loss", 0.0))


def _origin_finding(
    history: History,
    config: GuardConfig,
    onset: _Onset,
    record: StepRecord,
    origin: Origin,
    found: NonFiniteOrigin | None,
) -> Finding:
    cause, evidence, confidence = origin.cause, _evidence(history, onset, record), origin.confidence
    if found is not None:
        evidence.update(operation_evidence(found))
    unseen_start = origin.code == PARAMETER and record.step > 0
    driven = _driven_by_rate(history, config, onset)
    if driven and cause is not Cause.DATA:
        cause, evidence, confidence = Cause.LEARNING_RATE, {**evidence, **driven}, min(confidence, 0.8)
    elif unseen_start:
        cause, confidence = Cause.UNKNOWN, 0.5
    return _finding(
        origin.code,
        onset,
        _message(onset, origin, found) + ("" if found is not None else _later(history, onset)),
        layer=origin.layer,
        layers=origin.layers,
        cause=cause,
        confidence=confidence,
        evidence=evidence,
        ruled_out=_ruled_out(history, record, origin, driven=bool(driven)),
    )


def _later(history: History, onset: _Onset) -> str:
    """Return what a search of later steps saw, where the first one was not searched."""
    later = later_origin(history.origins, onset.step)
    if later is None:
        return ""
    return f" Step {later.step} was searched: {refine(history, None, None, later).where}.{in_words(later)}"


def _message(onset: _Onset, origin: Origin, found: NonFiniteOrigin | None) -> str:
    kind = {INPUT: "enter at", FORWARD: "appear first in", BACKWARD: "appear first in", PARAMETER: "stand in"}[
        origin.code
    ]
    text = f"NaN or infinity {kind} {origin.where}, at step {onset.step}."
    if found is not None:
        text += in_words(found)
    elif origin.code == PARAMETER and onset.loss_step == onset.step and onset.step > 0:
        text += " The loss was the first to show it; the layers were not being observed then."
    if onset.resolved_step is not None:
        text += f" From step {onset.resolved_step} on everything is finite again."
    return text


def _evidence(history: History, onset: _Onset, record: StepRecord) -> dict[str, Evidence]:
    gradients, parameters = bad_gradients(record), bad_parameters(record)
    evidence = {
        "gradients": Evidence(
            value=int(gradients.sum()), unit="parameters", note=f"non-finite gradient, of {len(gradients)}"
        ),
        "parameters": Evidence(
            value=int(parameters.sum()), unit="parameters", note=f"non-finite weight, of {len(parameters)}"
        ),
        "observed_step": Evidence(value=record.step, unit="steps", note="first observation that shows it"),
    }
    if onset.loss_step is not None:
        evidence["loss_step"] = Evidence(value=onset.loss_step, unit="steps", note="first non-finite loss")
    finite = [r for r in history.records[: onset.index] if r.step < onset.step]
    if finite:
        evidence["last_finite_step"] = Evidence(value=finite[-1].step, unit="steps", note="last healthy observation")
    return evidence


def _driven_by_rate(history: History, config: GuardConfig, onset: _Onset) -> dict[str, Evidence]:
    """Return the numbers that blame the learning rate: updates too large, or a loss that blew up beforehand."""
    evidence: dict[str, Evidence] = {}
    healthy = [i for i, record in enumerate(history.records) if record.step < onset.step]
    ratio = ratio_before(history, healthy[-1]) if healthy else math.nan
    if ratio > config.update_ratio_high:
        evidence["update_ratio"] = Evidence(
            value=ratio, unit="ratio", note=f"above {config.update_ratio_high:g} before it"
        )
    growth = loss_growth(history.losses[1])
    if growth > BLOW_UP:
        evidence["loss_growth"] = Evidence(
            value=growth, unit="ratio", note="last finite loss over its usual size before"
        )
    return evidence


def _ruled_out(history: History, record: StepRecord, origin: Origin, *, driven: bool) -> tuple[RuledOut, ...]:
    excluded = []
    given = column(record, "input_max_abs")
    if origin.code != INPUT and given.size and math.isfinite(given[0]):
        excluded.append(
            RuledOut(cause=Cause.DATA, reason=f"the first layer's input is finite, largest entry {given[0]:.2g}")
        )
    elif origin.code != INPUT and record.step in history.finite_batches:
        excluded.append(RuledOut(cause=Cause.DATA, reason=f"the batch of step {record.step} is finite"))
    if origin.code != PARAMETER and not driven:
        excluded.append(RuledOut(cause=Cause.CORRUPT_WEIGHTS, reason="every parameter was finite when it appeared"))
    return tuple(excluded)


def _loss_only(history: History, config: GuardConfig, onset: _Onset, found: NonFiniteOrigin | None) -> Finding:
    """Only losses show it, or the search: it came and went, or the run ended, between observations."""
    if found is not None:
        origin = refine(history, None, None, found)
        return _finding(
            origin.code,
            onset,
            _message(onset, origin, found),
            layer=origin.layer,
            layers=origin.layers,
            cause=origin.cause,
            confidence=origin.confidence,
            evidence=dict(operation_evidence(found)),
        )
    driven = _driven_by_rate(history, config, onset)
    message = f"The loss is not finite at step {onset.step}; no observation was made then, so the layer is not known."
    if onset.resolved_step is not None:
        message += f" From step {onset.resolved_step} on it is finite again."
    return _finding(
        FORWARD,
        onset,
        message,
        cause=Cause.LEARNING_RATE if driven else Cause.UNKNOWN,
        confidence=0.6,
        evidence={"loss_step": Evidence(value=onset.step, unit="steps", note="first non-finite loss"), **driven},
    )


def _parameters_afterwards(history: History, onset: _Onset) -> list[Finding]:
    """Report parameters that became non-finite after the origin: by then the weights are lost."""
    later = [i for i, r in enumerate(history.records) if r.step > onset.step and bad_parameters(r).any()]
    if not later:
        return []
    first, last = history.records[later[0]], history.records[later[-1]]
    names = tuple(first.parameters.names[row] for row in np.flatnonzero(bad_parameters(first)))
    clean = [r.step for r in history.records if r.step > last.step]
    after = replace(onset, step=first.step, last_step=last.step, resolved_step=min(clean) if clean else None)
    message = f"NaN or infinity stand in {len(names)} of {len(first.parameters)} parameters since step {first.step}."
    return [
        _finding(
            PARAMETER,
            after,
            message,
            layer=names[0],
            layers=names,
            cause=Cause.CORRUPT_WEIGHTS,
            confidence=0.95,
            evidence={"parameters": Evidence(value=len(names), unit="parameters")},
        )
    ]


def _finding(code: str, onset: _Onset, message: str, **fields: Any) -> Finding:
    return make_finding(
        code,
        Severity.ERROR if onset.resolved_step is None else Severity.INFO,
        message,
        step=onset.step,
        last_step=onset.last_step,
        resolved_step=onset.resolved_step,
        **fields,
    )
