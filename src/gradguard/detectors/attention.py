"""GG701 attention-entropy-collapse and GG702 attention-logit-growth: a softmax over keys that takes one of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._episodes import BoolArray, Episode, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import LossProgress, loss_progress
from gradguard.detectors._numbers import names_text, percent
from gradguard.findings import Cause, Evidence, Finding, RuledOut, Severity
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["find_entropy_collapse", "find_logit_growth"]

_HYSTERESIS = 2.0
"""Factor by which entropy must rise above, or logits fall below, their limit for an episode to be over. Ours."""

_GROWN = 3.0
"""Times its first value that the largest logit must reach to have grown. Ours: what was large from the start is a
matter of initialization."""

_FAR_BEYOND = 10.0
"""Times ``attention_logit`` that is a warning even where the loss falls: 1000 by default. Source: Kimi Team (2025),
arXiv 2507.20534, section 2.1, whose unstable runs went beyond 1000; bfloat16 rounds such numbers to steps of 4 to 8."""

_LEARNT = 0.5
"""Share of ln(classes) below which a classifier's first losses show that it was trained before. As in ``_loss``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ill:
    """One layer whose attention is ill.

    Attributes:
        row: Index of the layer.
        episode: Since when, until when.
        initial: Whether it was so before the first step.
        first: Value when the layer was first observed.
        last: Value when it was last observed.
    """

    row: int
    episode: Episode
    initial: bool
    first: float
    last: float


def find_entropy_collapse(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find layers whose attention heads take one key each, with logits that keep them there.

    Trained heads are often sharp: that alone is no finding. Needed are an entropy below ``attention_entropy`` in the
    mean over a layer's heads *and* a logit above ``attention_logit``, before the first step or in ``update_patience``
    consecutive observations. It is a warning where it was so before the first step, as an initial attention spreads its
    weight, or where the loss is known not to fall. It is INFO otherwise, and for a classifier that has learnt.

    Args:
        history: Records of one optimizer, oldest first; needs ``attention_entropy`` and ``attention_logit_max``.
        config: Thresholds.

    Returns:
        At most one finding; its ``layer`` is the first such layer in forward order.

    Source: Zhai et al. (2023), arXiv 2303.06296, for the collapse; limits and conditions: ours.
    """
    if not len(history):
        return []
    entropy, logits = history.layer("attention_entropy"), history.layer("attention_logit_max")
    ill = []
    for row in np.flatnonzero(np.isfinite(entropy).any(axis=0)):
        values, largest = entropy[:, row], logits[:, row]
        begins: BoolArray = (values < config.attention_entropy) & (largest > config.attention_logit)
        holds: BoolArray = values < _HYSTERESIS * config.attention_entropy
        found = _episode(history, values, int(row), begins, holds, config)
        if found is not None:
            ill.append(found)
    initial = [one for one in ill if one.initial]
    standing = [one for one in ill if one.episode.standing]
    chosen = [one for one in standing if one.initial] or standing or initial
    return [_collapse(history, chosen)] if chosen else []


def find_logit_growth(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find layers whose largest attention logit has grown beyond ``attention_logit``, and has not receded.

    It must exceed the limit and three times what it was when the layer was first observed, in ``update_patience``
    consecutive observations. It is a warning at ten times the limit, or where the loss is known not to fall, and INFO
    otherwise: logits may grow for long before the loss shows it.

    Args:
        history: Records of one optimizer, oldest first; needs ``attention_logit_max``.
        config: Thresholds.

    Returns:
        At most one finding; its ``layer`` is the one with the largest logit.

    Source: Wortsman et al. (2024), arXiv 2309.14322, section 3.1.1; limit: Kimi Team (2025), arXiv 2507.20534; growth:
        ours.
    """
    if not len(history) or history.info.preflight:
        return []
    logits = history.layer("attention_logit_max")
    ill = []
    for row in np.flatnonzero(np.isfinite(logits).any(axis=0)):
        values = logits[:, row]
        first = float(values[np.isfinite(values)][0])
        begins: BoolArray = values > max(config.attention_logit, _GROWN * first)
        holds: BoolArray = values > config.attention_logit / _HYSTERESIS
        found = _episode(history, values, int(row), begins, holds, config)
        if found is not None and found.episode.standing:
            ill.append(found)
    return [_growth(history, config, ill)] if ill else []


def _episode(
    history: History, values: FloatArray, row: int, begins: BoolArray, holds: BoolArray, config: GuardConfig
) -> _Ill | None:
    known = np.isfinite(values)
    first = int(np.flatnonzero(known)[0])
    initial = bool(begins[first]) and history.records[first].step == 0
    patience = 1 if initial else config.update_patience
    episode = last_episode(begins, holds=holds, known=known, patience=patience)
    if episode is None:
        return None
    seen = values[known]
    return _Ill(
        row=row,
        episode=episode,
        initial=initial and episode.first == first,
        first=float(seen[0]),
        last=float(seen[-1]),
    )


def _collapse(history: History, ill: list[_Ill]) -> Finding:
    steps = history.steps.astype(np.int64)
    loss = loss_progress(history)
    entropy, lowest = history.layer("attention_entropy"), history.layer("attention_entropy_min")
    logits = history.layer("attention_logit_max")
    names = tuple(history.layers.names[one.row] for one in ill)
    worst = min(ill, key=lambda one: entropy[one.episode.last, one.row])
    at = worst.episode.last, worst.row
    initial = any(one.initial for one in ill)
    over = [one.episode.resolved for one in ill]
    resolved = None if any(index is None for index in over) else max(index for index in over if index is not None)
    warns = resolved is None and (initial or loss.stuck) and not (loss.learnt or _was_trained(history))
    since = "before the first step" if initial else f"since step {steps[min(one.episode.first for one in ill)]}"
    return make_finding(
        "GG701",
        Severity.WARNING if warns else Severity.INFO,
        f"The attention of {names_text(names)} takes one key per query {since}: its entropy is "
        f"{percent(float(entropy[at]))} of what equal weights have (mean over heads), with logits up to "
        f"{logits[at]:.3g}.",
        step=int(steps[min(one.episode.first for one in ill)]),
        last_step=int(steps[max(one.episode.last for one in ill)]),
        resolved_step=None if resolved is None else int(steps[resolved]),
        layer=names[0],
        layers=names,
        cause=Cause.WEIGHT_SCALE if initial else Cause.LEARNING_RATE,
        confidence=_confidence(worst, loss, initial=initial, learnt=loss.learnt or _was_trained(history)),
        evidence={
            "attention_entropy": Evidence(
                value=float(entropy[at]), unit="fraction", note=f"{history.layers.names[worst.row]}, mean over heads"
            ),
            "attention_entropy_min": Evidence(value=float(lowest[at]), unit="fraction", note="lowest head"),
            "attention_logit_max": Evidence(value=float(logits[at]), note="a softmax over equal keys has 0"),
            "observations": Evidence(value=worst.episode.count, unit="observations", note="consecutive"),
            "loss_trend": Evidence(value=str(loss.trend)),
        },
        ruled_out=(
            RuledOut(cause=Cause.LEARNING_RATE, reason="it was so before the first step")
            if initial
            else RuledOut(cause=Cause.WEIGHT_SCALE, reason=f"entropy {worst.first:.2g} when first observed"),
        ),
    )


def _growth(history: History, config: GuardConfig, ill: list[_Ill]) -> Finding:
    steps = history.steps.astype(np.int64)
    loss = loss_progress(history)
    worst = max(ill, key=lambda one: one.last)
    first = min(one.episode.first for one in ill)
    layer = history.layers.names[worst.row]
    warns = worst.last > _FAR_BEYOND * config.attention_logit or (loss.stuck and not loss.learnt)
    return make_finding(
        "GG702",
        Severity.WARNING if warns else Severity.INFO,
        f"The attention logits of {layer} grow: the largest was {worst.first:.2g} when first observed and is "
        f"{worst.last:.3g} at step {steps[worst.episode.last]}.",
        step=int(steps[first]),
        last_step=int(steps[max(one.episode.last for one in ill)]),
        layer=layer,
        layers=tuple(history.layers.names[one.row] for one in ill),
        cause=Cause.LEARNING_RATE,
        confidence=_confidence(worst, loss, initial=False, learnt=loss.learnt),
        evidence={
            "attention_logit_max": Evidence(value=worst.last, note=f"above {config.attention_logit:g}"),
            "first_logit_max": Evidence(value=worst.first, note="when first observed"),
            "attention_entropy": Evidence(
                value=float(history.layer("attention_entropy")[worst.episode.last, worst.row]),
                unit="fraction",
                note="1 for equal weights, mean over heads",
            ),
            "observations": Evidence(value=worst.episode.count, unit="observations", note="consecutive"),
            "loss_trend": Evidence(value=str(loss.trend)),
        },
        ruled_out=(RuledOut(cause=Cause.WEIGHT_SCALE, reason=f"largest logit {worst.first:.2g} when first observed"),),
    )


def _confidence(ill: _Ill, loss: LossProgress, *, initial: bool, learnt: bool) -> float:
    if learnt:
        return 0.4
    return 0.85 if initial else 0.8 if loss.stuck else min(0.6, 0.4 + 0.05 * ill.episode.count)


def _was_trained(history: History) -> bool:
    """Whether the first losses are those of a classifier that knows its task already."""
    losses = history.losses[1]
    finite = losses[np.isfinite(losses)][:3]
    classes = history.info.classes
    return bool(classes >= 2 and finite.size and np.median(finite) < _LEARNT * math.log(classes))
