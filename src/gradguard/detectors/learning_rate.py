"""GG501 learning-rate-too-high and GG502 learning-rate-too-low, by the ratio of update to weight."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gradguard.config import GuardConfig
from gradguard.detectors._direction import distant_cosines, kept_direction, steps_kept
from gradguard.detectors._episodes import BoolArray, Episode, last_episode
from gradguard.detectors._finding import make_finding
from gradguard.detectors._loss import (
    BLOW_UP,
    LossProgress,
    Trend,
    from_batch_to_batch,
    has_settled,
    judge_losses,
    loss_growth,
    loss_progress,
    still_at_chance,
    was_learnt,
)
from gradguard.detectors._numbers import power_of_ten
from gradguard.detectors._spikes import leap
from gradguard.detectors._updates import comparable, leading_ratios, matrix_ratios, median_ratios, ratio_quantile
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = ["find_learning_rate", "find_too_low"]

_TARGET = 1e-3
"""Update-to-weight ratio to aim for. Source: Karpathy, CS231n notes, "Neural networks part 3"."""

_BLOWN_SHARE = 0.1
"""Share of ``update_ratio_high`` that is too much where the loss grew tenfold and overflowed. Source: Karpathy, CS231n
notes: a ratio above 1e-2 is too fast; the outcome confirms it."""

_AT_CHANCE_SHARE = 10.0**-0.5
"""Share of ``update_ratio_high`` that is too much for a classifier still at chance after 100 steps. Ours: half a
decade; small recurrent nets that stand still in good health show 10^-1.8 under Adam, one thrown to chance by its
schedule 10^-1.4."""

_FAST_QUARTER = 0.75
"""Quantile that must lie below ``update_ratio_low``: while a quarter of the matrices move, the rate is not too low.
Ours: discriminative rates and thawed layers leave most of a healthy net standing still."""

_AT_CHANCE = 50.0
"""Times ``update_ratio_low`` below which a classifier that has stayed at chance for 100 steps is too slow. Ours:
healthy nets fall to 10^-5.9 only once they have converged, and at a usual rate a plateau at chance shows 10^-3; rates
of a thousandth of the usual one show 10^-4.7 to 10^-4.5."""

_SAME_WAY = 200.0
"""Times ``update_ratio_low`` below which the median ratio is too low where gradients of different batches keep pointing
the same way. Ours: 10^-3.8 to 10^-5.2 in runs at a thousandth of the usual rate; of 440 healthy runs of the clinic only
one has less than 10^-3.2 before it has learnt, and its gradient turns."""

_SAME_BATCH = 50.0
"""The same where the loss shows no noise, as with one batch for the whole run. Ours: gradients of a single batch turn
slowly at the best of rates; nets on a plateau show 10^-3.8 then, fine-tuned ones 10^-3.6."""

_NO_NOISE = 3e-4
"""Noise of a loss, as a share of its size, below which it is always the same batch. Ours: 4e-5 and less with a single
batch, 9e-4 and more with batches of 16 to 64, of text at the loss of chance."""

_LONG = 100
"""Steps after which the direction of the gradient says something. Ours: as for the loss of chance."""

_DOUBLED = 2.0
"""Growth of a weight's norm that makes its rate too high by itself. Ours: a ratio of update to weight of 0.1 needs
seven steps in one direction for it."""

_REPLACED = 1.0
"""Ratio of update to weight from which nothing is left of the weights that were there. Ours: such a step throws every
matrix away; where the loss then leaps as well, what follows is a net that begins anew at the wrong scale."""

_LEAPT = 2.0
"""Times its first value that a loss must have reached after such a step. Ours."""

_FEW_STEPS = 5
"""Steps within which it must have grown so. Ours: the gaps of the dense start."""

_DECAYED = 0.1
"""Share of its peak below which a rate counts as the end of a schedule. Ours."""


def find_learning_rate(history: History, config: GuardConfig) -> Sequence[Finding]:
    """Find a learning rate that is too high or too low for the weights it moves.

    Too high: the median ratio over matrices stays above ``update_ratio_high`` for ``update_patience`` consecutive
    observations *and* the loss is known not to fall, or erupted and never got below where it began; one observation is
    enough where numbers then cease to be finite, and within the first steps where a step replaces the weights and
    doubles the loss. Of a classifier that is still at chance after 100 steps a third of the ratio is too much. It
    stands until the loss falls, as the ratio drops by itself once the weights have grown.

    Too low: three quarters of the matrices stay below ``update_ratio_low`` for ``update_patience`` consecutive
    observations up to the last, the loss is flat, and neither warm-up, nor the end of a schedule, nor convergence
    explains it. Of a classifier that is still at chance after 100 steps 50 times that is too low, even where its loss
    creeps down. Where the gradient keeps its direction over 50 steps or more of a run of 100, 200 times that is too low
    for the median matrix (50 times where the loss has no noise), unless the loss has settled or is that of a net that
    has learnt.

    Vectors, embeddings and what began at zero are left out. Nothing is said in a check before the first step.

    Args:
        history: Records of one optimizer, oldest first; needs ``update_ratio``, and losses.
        config: Thresholds.

    Source: Karpathy, CS231n notes, for the ratio; gates: ours (algorithms.md, section F7).
    """
    if not len(history) or history.info.preflight:
        return []
    found = [_too_high(history, config), find_too_low(history, config)]
    return [finding for finding in found if finding is not None]


def _too_high(history: History, config: GuardConfig) -> Finding | None:
    medians = median_ratios(history)
    known = ~np.isnan(medians)
    limit = config.update_ratio_high
    if not ((medians > _BLOWN_SHARE * limit) | _weights_grow(history)).any():
        return None
    losses, loss = history.losses[1], loss_progress(history)
    at = leap(losses)
    if at is not None and judge_losses(losses[:at], classes=history.info.classes).trend is Trend.FALLEN:
        return None  # it learnt at this rate until one bad batch came: GG103
    blown = bool(losses.size and not np.isfinite(losses[-1])) or not np.isfinite(_last_weights(history)).all()
    if blown and loss_growth(losses) > BLOW_UP:
        limit *= _BLOWN_SHARE
    elif loss.stuck and still_at_chance(history):
        limit *= _AT_CHANCE_SHARE
    thrown = _thrown(history, medians, losses)
    at_once = blown or thrown or (loss.stuck and _units_lost(history, config))
    above = medians > limit
    if at_once:
        above |= _weights_grow(history) & known
    episode = last_episode(above, known=known, patience=1 if at_once else config.update_patience)
    erupted = (loss.erupted or thrown) and loss.trend is not Trend.FALLEN
    if episode is None or not (loss.stuck or blown or erupted):
        return None
    steps = history.steps.astype(np.int64)
    ratio = float(np.nanmax(medians[: episode.last + 1]))
    rose = blown or erupted or loss.erupted or loss.trend is Trend.RISEN
    outcome = "the numbers ceased to be finite" if blown else ("the loss rose" if rose else "the loss does not fall")
    return make_finding(
        "GG501",
        Severity.ERROR if rose else Severity.WARNING,
        f"The learning rate is too high: a step changes the weights by {ratio:.2g} of their size (median over "
        f"matrices; about {_TARGET:g} is usual), and {outcome}.",
        step=int(steps[episode.first]),
        last_step=int(steps[-1]),
        cause=Cause.LEARNING_RATE,
        confidence=min(0.9, 0.6 + 0.1 * min(episode.count, 3))
        if rose
        else min(0.85, 0.5 + 0.1 * min(episode.count, 3)),
        evidence=_evidence(history, episode, ratio, loss, note=f"above {limit:g}"),
    )


def _thrown(history: History, medians: FloatArray, losses: FloatArray) -> bool:
    """Whether one of the first steps replaced the weights, and the loss leapt with it."""
    early = losses[: _FEW_STEPS + 1]
    early = early[np.isfinite(early)]
    replaced = (medians > _REPLACED) & (history.steps <= _FEW_STEPS)
    return bool(replaced.any() and early.size and early.max() > _LEAPT * abs(float(early[0])))


def _weights_grow(history: History) -> BoolArray:
    """Return the observations after which half of the matrices doubled within a few steps, shape ``[observations]``.

    The steps between two observations are not seen, what they did to the weights is.
    """
    norms = np.where(comparable(history), history.parameter("weight_norm"), np.nan)
    result = np.zeros(len(history), dtype=np.bool_)
    if len(history) < 2:
        return result
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        growth = ratio_quantile(norms[1:] / norms[:-1], 0.5)
    result[:-1] = (growth > _DOUBLED) & (np.diff(history.steps) <= _FEW_STEPS)
    return result


def _units_lost(history: History, config: GuardConfig) -> bool:
    """Whether units that were at work when first observed lie dead or at their ends now: steps may have thrown them."""
    return any(
        bool(((shares[-1] >= config.dead_fraction_error) & (shares[0] < config.dead_fraction_warning)).any())
        for shares in map(history.layer, ("inactive_fraction", "input_inactive_fraction", "saturated_fraction"))
    )


def find_too_low(history: History, config: GuardConfig) -> Finding | None:
    """Find a learning rate that is above 0 and too low; see :func:`find_learning_rate`.

    Args:
        history: Records of one optimizer, oldest first.
        config: Thresholds.
    """
    if not len(history):
        return None
    return _hardly_moves(history, config) or _points_the_same_way(history, config)


def _hardly_moves(history: History, config: GuardConfig) -> Finding | None:
    loss = loss_progress(history)
    if loss.learnt:
        return None
    at_chance = still_at_chance(history)
    if loss.trend is not Trend.FLAT and not (at_chance and loss.trend is Trend.FALLING):
        return None
    ratios = np.where(history.parameter("lr") == 0.0, np.nan, matrix_ratios(history))
    fastest = ratio_quantile(ratios, _FAST_QUARTER)
    known = ~np.isnan(fastest)
    limit = config.update_ratio_low * (_AT_CHANCE if at_chance else 1.0)
    mask = fastest < limit
    episode = last_episode(mask, known=known, patience=config.update_patience)
    if episode is None or not episode.standing or _is_scheduled(history, episode):
        return None
    ratio = float(np.median(fastest[episode.first : episode.last + 1][mask[episode.first : episode.last + 1]]))
    by = f"by {power_of_ten(ratio)} of their size" if ratio > 0.0 else "not at all"
    return _too_low(
        history,
        episode,
        f"a step changes the weights {by} (upper quartile over matrices; about {power_of_ten(_TARGET)} is usual), and "
        f"the loss {'does not fall' if loss.stuck else 'has not left chance'}.",
        _evidence(history, episode, ratio, loss, note=f"below {limit:g}"),
    )


def _too_low(history: History, episode: Episode, message: str, evidence: dict[str, Evidence]) -> Finding:
    steps = history.steps.astype(np.int64)
    return make_finding(
        "GG502",
        Severity.WARNING,
        f"The learning rate is too low: {message}",
        step=int(steps[episode.first]),
        last_step=int(steps[episode.last]),
        cause=Cause.LEARNING_RATE,
        confidence=min(0.85, 0.5 + 0.1 * min(episode.count, 3)),
        evidence=evidence,
    )


def _points_the_same_way(history: History, config: GuardConfig) -> Finding | None:
    """Find steps that could be many times as long, as the gradient at their end is the one from which they began."""
    loss, losses = loss_progress(history), history.losses[1]
    episode = kept_direction(history)
    if episode is None or loss.trend in {Trend.RISEN, Trend.UNKNOWN} or was_learnt(history) or has_settled(losses):
        return None
    if history.steps[-1] - history.steps[0] < _LONG or _is_scheduled(history, episode):
        return None
    limit = config.update_ratio_low * (_SAME_WAY if from_batch_to_batch(losses) > _NO_NOISE else _SAME_BATCH)
    ratios = leading_ratios(history)[episode.first : episode.last + 1]
    ratio = float(np.nanmedian(ratios)) if np.isfinite(ratios).any() else np.nan
    if not 0.0 < ratio < limit:
        return None
    cosine = float(np.nanmedian(distant_cosines(history)[episode.first : episode.last + 1]))
    return _too_low(
        history,
        episode,
        f"a step changes the weights by {power_of_ten(ratio)} of their size (median over matrices; about "
        f"{power_of_ten(_TARGET)} is usual), and the gradient has kept its direction over "
        f"{steps_kept(history, episode)} steps (cosine {cosine:.2f} from one observation to the next).",
        {
            **_evidence(history, episode, ratio, loss, note=f"below {limit:g}"),
            "gradient_cosine": Evidence(
                value=cosine, unit="ratio", note="between gradients 10 steps apart or more, 1 is the same way"
            ),
        },
    )


def _last_weights(history: History) -> FloatArray:
    weights = history.parameter("weight_norm")[-1]
    known: FloatArray = weights[~np.isnan(weights)]
    return known


def _is_scheduled(history: History, episode: Episode) -> bool:
    """Whether the rate is still rising (warm-up), or is what a schedule left of a higher one."""
    rates = history.scalar("lr")
    window = rates[episode.first : episode.last + 1]
    window = window[np.isfinite(window)]
    if not window.size:
        return False
    peak = float(np.nanmax(rates))
    return bool(window[-1] > 1.01 * window[0]) or bool(window[-1] < _DECAYED * peak)


def _evidence(
    history: History, episode: Episode, ratio: float, loss: LossProgress, *, note: str
) -> dict[str, Evidence]:
    evidence = {
        "update_ratio": Evidence(value=ratio, unit="ratio", note=f"update/weight, {note}"),
        "observations": Evidence(value=episode.count, unit="observations", note="consecutive"),
        "loss_trend": Evidence(value=str(loss.trend)),
    }
    rate = history.scalar("lr")[episode.last]
    if np.isfinite(rate) and rate > 0.0:
        evidence["lr"] = Evidence(value=float(rate), note="learning rate")
    if np.isfinite(rate) and rate > 0.0 and ratio > 0.0:
        evidence["suggested_lr"] = Evidence(
            value=float(rate) * _TARGET / ratio, note=f"would give a ratio of about {_TARGET:g}"
        )
    return evidence
