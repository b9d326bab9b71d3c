"""GG104 no-gradient: trainable, and nothing arrives. Detached, unused, or cut off by an operation of slope zero."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._absent import find_absent, share_of
from gradguard.detectors._depth import TRUNK_ROLES
from gradguard.detectors._episodes import BoolArray, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import Trend, loss_progress
from gradguard.detectors._numbers import names_text, signal
from gradguard.detectors._zeros import ZeroOwner, Zeros, zero_pattern
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History

__all__ = ["find_missing_gradients"]

_SETTLING_STEPS = 5
"""Optimizer steps after which zero-initialized branches must have come alive. Source: architecture.md, section 3;
ours."""

_BRANCH_PATIENCE = 4
"""Observations for which a branch must stay at zero. Ours: steps 5, 10, 20 and 50 by default; a branch that begins at
zero comes alive with the first update."""

_FEWEST_LOSSES = 10
"""Losses of exactly zero in a row, from the first on, that are no coincidence. Ours: a net whose first weights tell two
classes apart with certainty, one example per batch, gave two."""


def find_missing_gradients(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find trainable parameters at which no gradient arrives.

    What is absent (``.grad`` is ``None``) splits by what its module did. It ran before everything that a gradient
    reached, and nothing came back: the trunk is cut, a warning, an error from half of the trainable entries on. It ran
    beside the trunk, or took no part in the forward pass: unused, INFO below ``unused_fraction`` of the trainable
    entries. Exact zeros count where no dead or saturated layer, no underflow and no zero-initialized module owns them.

    What ran must recur for ``growth_patience`` observations, what did not run for six. A gradient that used to come
    must stay away for longer; if its module does not even run any more, that is a matter of routing, and INFO. A check
    before the first step speaks after one look. Where *no* gradient was read in a run, it was read at the wrong moment:
    that is no finding, and the diagnosis says so; unless it is one of several optimizers, and a gradient did pass other
    layers in its steps.

    Args:
        history: Records of one optimizer, oldest first; needs ``absent``, ``grad_norm``, ``delta_norm``.
        config: Thresholds.

    Source: ours (pitfalls.md, R5 and R27; architecture.md, section 3, "Exact zeros have owners").
    """
    if not len(history):
        return []
    if _nothing_arrived(history):
        return [_independent_loss(history)] if history.info.preflight else _idle_optimizer(history, config)
    findings = [*find_absent(history, config), *_zeros(history, config)]
    return sorted(findings, key=lambda finding: -finding.severity)


def _nothing_arrived(history: History) -> bool:
    gradient = history.parameter("grad_norm")
    due = history.parameter("absent") == 1.0
    return bool(np.isnan(gradient).all() and due.any())


def _independent_loss(history: History) -> Finding:
    names = history.parameters.names
    return make_finding(
        "GG104",
        Severity.ERROR,
        f"No gradient reaches any of the {len(names)} parameters: the loss does not depend on them.",
        step=0,
        last_step=0,
        layers=names,
        cause=Cause.WIRING,
        confidence=0.95,
        evidence={"parameters": Evidence(value=len(names), unit="parameters")},
    )


def _idle_optimizer(history: History, config: GuardConfig) -> list[Finding]:
    """One of several optimizers steps again and again without a gradient, while a backward pass runs elsewhere.

    Elsewhere: through layers that others train. So it was not read at the wrong moment; what this optimizer holds is
    cut off from the loss, as a generator is whose output was detached.
    """
    delta = history.layer("delta_norm")
    at_step = history.scalar("grad_norm_at_step")
    mask = np.asarray((delta > 0.0).any(axis=1) & ~(at_step > 0.0), dtype=np.bool_)
    episode = last_episode(mask, patience=config.growth_patience)
    if len(history.info.optimizers) < 2 or episode is None or not episode.standing:
        return []
    rows = np.flatnonzero((history.parameter("absent") == 1.0).any(axis=0))
    names = tuple(dict.fromkeys(history.parameters.names[int(row)] for row in rows))
    steps = history.steps.astype(np.int64)
    last = history.parameters.layers[int(rows[-1])]
    return [
        make_finding(
            "GG104",
            Severity.ERROR,
            f"None of the {len(names)} parameters of this optimizer gets a gradient, while the backward pass runs "
            f"through other layers: what leaves {names_text((last,))} is cut off from its loss.",
            step=int(steps[episode.first]),
            last_step=int(steps[episode.last]),
            layer=last,
            layers=names,
            cause=Cause.WIRING,
            confidence=0.9,
            evidence={"parameters": Evidence(value=len(names), unit="parameters")},
        )
    ]


def _zeros(history: History, config: GuardConfig) -> list[Finding]:
    if not (history.layer("delta_norm") == 0.0).any():
        return _zero_parameters(history, config)
    patterns = [zero_pattern(record) for record in history.records]
    found = (
        _cut_off(history, config, patterns),
        _zero_everywhere(history, config, patterns),
        _dead_branch(history, config, patterns),
    )
    return [finding for finding in found if finding is not None]


def _mask(patterns: list[Zeros], *owners: ZeroOwner) -> BoolArray:
    return np.array([pattern.owner in owners for pattern in patterns], dtype=np.bool_)


def _settled(history: History) -> BoolArray:
    """Return the observations at which zero-initialized branches must have come alive; a check has only the first."""
    if history.info.preflight:
        return np.ones(len(history), dtype=np.bool_)
    settled: BoolArray = history.steps >= _SETTLING_STEPS
    return settled


def _cut_off(history: History, config: GuardConfig, patterns: list[Zeros]) -> Finding | None:
    """Zeros from the input up to a layer that nothing explains: an operation with derivative zero stands there."""
    owners = (ZeroOwner.CUT_OFF,) if history.info.preflight else (ZeroOwner.CUT_OFF, ZeroOwner.BRANCH)
    mask = _mask(patterns, *owners)
    episode = last_episode(
        mask & _settled(history), holds=mask, patience=1 if history.info.preflight else config.growth_patience
    )
    if episode is None:
        return None
    record, zeros = history.records[episode.last], patterns[episode.last]
    names = tuple(record.layers.names[row] for row in zeros.rows)
    row = zeros.border if zeros.border is not None else zeros.rows[-1]
    border = record.layers.names[row]
    where = "in" if signal(record, at="input_delta")[row] == 0.0 else "before"
    where = "behind" if row in zeros.rows else where
    steps = history.steps.astype(np.int64)
    return make_finding(
        "GG104",
        Severity.ERROR if episode.standing else Severity.INFO,
        f"The gradient is cut off {where} {names_text((border,))}: it is exactly zero at all {len(names)} layers from "
        f"the input up to {names_text(names[-1:])}.",
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        resolved_step=None if episode.resolved is None else int(steps[episode.resolved]),
        layer=border,
        layers=names,
        cause=Cause.WIRING,
        confidence=0.85,
        evidence={
            "zero_layers": Evidence(value=len(names), unit="layers"),
            "last_finite_delta": Evidence(value=_next_delta(history, episode.last, zeros), unit="L2 norm", note=border),
        },
        ruled_out=(
            RuledOut(cause=Cause.DEAD_UNITS, reason="no layer at the cut has all its units inactive"),
            RuledOut(cause=Cause.PRECISION, reason="the gradient does not decay towards the cut"),
        ),
    )


def _next_delta(history: History, index: int, zeros: Zeros) -> float:
    """Return the gradient at the first live row behind a prefix of zeros."""
    record = history.records[index]
    delta = signal(record)
    after = (row for row in range(max(zeros.rows) + 1, len(record.layers)) if record.layers.roles[row] in TRUNK_ROLES)
    return next((float(delta[row]) for row in after if delta[row] > 0.0), math.nan)


def _zero_everywhere(history: History, config: GuardConfig, patterns: list[Zeros]) -> Finding | None:
    """A loss whose derivative is zero from the start; one that has reached its minimum is no illness.

    Nor is one that is itself zero for a few batches, as that of a single example may be.
    """
    mask = _mask(patterns, ZeroOwner.EVERYWHERE)
    losses = history.losses[1]
    if not history.info.preflight and (losses.any() or losses.size < _FEWEST_LOSSES):
        mask &= ~_lossless(history)
    episode = last_episode(mask, patience=1 if history.info.preflight else config.growth_patience)
    if episode is None or episode.first > 0 or loss_progress(history).trend is Trend.FALLEN:
        return None
    steps = history.steps.astype(np.int64)
    return make_finding(
        "GG104",
        Severity.ERROR if episode.standing else Severity.INFO,
        "The loss gives no gradient: it is exactly zero at every layer.",
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        resolved_step=None if episode.resolved is None else int(steps[episode.resolved]),
        layers=tuple(history.records[episode.last].layers.names[row] for row in patterns[episode.last].rows),
        cause=Cause.LOSS,
        confidence=0.8,
        evidence={"zero_layers": Evidence(value=len(patterns[episode.last].rows), unit="layers")},
    )


def _lossless(history: History) -> BoolArray:
    """Return the observations at which the loss itself was exactly zero, shape ``[observations]``."""
    steps, losses = history.losses
    result: BoolArray = np.isin(history.steps, steps[losses == 0.0])
    return result


def _zero_parameters(history: History, config: GuardConfig) -> list[Finding]:
    """Every parameter's gradient is zero and none reached a layer: the loss holds them times zero, and nothing else."""
    norms = history.parameter("grad_norm")
    known = ~np.isnan(norms)
    unseen = np.isnan(history.layer("delta_norm")).all(axis=1)
    mask = np.asarray(known.any(axis=1) & ((norms == 0.0) | ~known).all(axis=1) & unseen, dtype=np.bool_)
    if not mask.any() or not len(history.layers):
        return []
    episode = last_episode(mask, patience=1 if history.info.preflight else config.growth_patience)
    if episode is None or not episode.standing or loss_progress(history).trend is Trend.FALLEN:
        return []
    names = history.parameters.names
    steps = history.steps.astype(np.int64)
    return [
        make_finding(
            "GG104",
            Severity.ERROR,
            f"The gradient of each of {len(names)} parameters is exactly zero, and none reaches the output of a layer: "
            "the loss is cut off from the model.",
            step=int(steps[episode.first]),
            last_step=int(steps[episode.last]),
            layers=names,
            cause=Cause.WIRING,
            confidence=0.9,
            evidence={"parameters": Evidence(value=len(names), unit="parameters")},
        )
    ]


def _dead_branch(history: History, config: GuardConfig, patterns: list[Zeros]) -> Finding | None:
    """Zeros between live layers that outlast the first steps: a branch whose output counts for nothing."""
    if history.info.preflight:
        return None
    mask = _mask(patterns, ZeroOwner.BETWEEN)
    episode = last_episode(mask & _settled(history), holds=mask, patience=_BRANCH_PATIENCE)
    if episode is None or not episode.standing:
        return None
    record = history.records[episode.last]
    names = tuple(record.layers.names[row] for row in patterns[episode.last].rows)
    rows = tuple(i for i, layer in enumerate(history.parameters.layers) if layer in names)
    share = share_of(history, rows, episode.last)
    if _is_dead(history, episode.last, patterns[episode.last]):
        return None
    steps = history.steps.astype(np.int64)
    return make_finding(
        "GG104",
        Severity.WARNING if share >= config.unused_fraction else Severity.INFO,
        f"{names_text(names)} get a gradient of exactly zero while layers before and after learn: the branch counts "
        f"for nothing in the loss.",
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        layer=names[-1],
        layers=names,
        cause=Cause.WIRING,
        confidence=0.6,
        evidence={"share": Evidence(value=share, unit="fraction", note="of the trainable entries")},
    )


def _is_dead(history: History, index: int, zeros: Zeros) -> bool:
    """Whether a fully inactive layer stands among the zeros: then that layer owns them."""
    record = history.records[index]
    inactive = record.layer_values.get("inactive_fraction", np.full(len(record.layers), np.nan))
    functional = record.layer_values.get("input_inactive_fraction", np.full(len(record.layers), np.nan))
    around = list(range(min(zeros.rows), min(max(zeros.rows) + 3, len(record.layers))))
    return bool((inactive[around] == 1.0).any() or (functional[around] == 1.0).any())
