"""Does the loss fall? A robust answer from the loss series, whatever the loss is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from gradguard.detectors._numbers import median_with_error
from gradguard.history import History
from gradguard.records import FloatArray

__all__ = [
    "BLOW_UP",
    "CHANCE_BAND",
    "LossProgress",
    "Trend",
    "from_batch_to_batch",
    "has_settled",
    "judge_losses",
    "loss_growth",
    "loss_progress",
    "still_at_chance",
    "was_learnt",
]

_MINIMUM_LOSSES = 20
"""Losses needed for a judgement. Ours: two medians of ten."""

_CLEAR_CHANGE = 0.25
"""Share of its size by which a loss must change to have clearly fallen or risen. Ours: a sigmoid net that never learns
falls by 13 % on ten classes, from its first loss of 2.64 to ln 10; a default-initialized 20-layer net that learns late
has fallen by 39 % when its accuracy is .4 (algorithms.md, table G2b)."""

_SMALL_CHANGE = 0.02
"""Share of its size below which a change counts as none, however little noise there is. Ours."""

_SIGNIFICANT = 3.0
"""Standard errors by which two medians must differ. Ours: 1 in 370 for Gaussian noise."""

CHANCE_BAND = (0.75, 1.5)
"""Range around ln(classes) in which a classifier has learnt next to nothing. Ours: at the lower end the true class gets
1.8 times its share with ten classes."""


_LEARNT = 0.5
"""Share of ln(classes) below which a classifier has learnt. Ours: with ten classes the true one then gets 3 times its
share."""

_SCALED_DOWN = 0.01
"""Share of ln(classes) below which a first loss is that of a classifier that has learnt, or was multiplied by a small
number. Ours."""

_QUIET = (3e-4, 0.06)
"""Noise from batch to batch, as a share of the loss, that tells the latter. Ours: at chance it is 0.001 to 0.06 with 16
to 64 examples, in nets that have learnt 0.07 to 1.4; with the same batch each time it is 0, and says nothing."""

_LONG_AT_CHANCE = 100
"""Steps after which a classifier should have left the loss of chance. Ours: a LeNet with sigmoid units, and nets whose
rate is a thousandth of the usual one, are still there after 240; their twins are at half of it after 50."""

_SETTLED = 0.15
"""Share of the fall between the first third of a run and its last one below which the second half of that no longer
counts. Ours: of a loss that decays like exp(-kt), 0.16 at k = 5, when 99 % of the way is done; 0.24 and more in runs
whose rate is a thousandth of the usual one, 0.15 and less in nets that have converged on one batch."""

BLOW_UP = 10.0
"""Factor by which a loss has grown, when it overflows, if steps that were too large drove it. Ours."""


class Trend(StrEnum):
    """What a loss did over a run."""

    FALLEN = "fallen"
    """Clearly below where it began, and not at chance level."""
    FALLING = "falling"
    """Falling beyond its noise, though not clearly fallen yet."""
    FLAT = "flat"
    RISEN = "risen"
    """Clearly above where it began, or no longer finite."""
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class LossProgress:
    """The loss series in a few numbers.

    Attributes:
        trend: What the loss did.
        first: Median of up to the first 3 finite losses, NaN for none.
        last: Median of up to the last 10 finite losses, NaN for none.
        chance: ln(classes) where the loss stays at it, else NaN; of a loss that was scaled down, what it began at.
        learnt: Whether a classifier's loss is below half of ln(classes), as in a resumed or fine-tuned run.
        erupted: Whether it rose to more than ten times its first and its last values on the way.
    """

    trend: Trend
    first: float = math.nan
    last: float = math.nan
    chance: float = math.nan
    learnt: bool = False
    erupted: bool = False

    @property
    def stuck(self) -> bool:
        """Whether the loss is known not to fall."""
        return self.trend in {Trend.FLAT, Trend.RISEN}


def loss_progress(history: History) -> LossProgress:
    """Judge the losses of a run; see :func:`judge_losses`."""
    classes = history.info.classes
    return history.derived(("loss_progress", classes), lambda: judge_losses(history.losses[1], classes=classes))


def still_at_chance(history: History) -> bool:
    """Whether a classifier has been watched for 100 steps and its loss is still that of chance or worse.

    It may creep down, or come down from far above. Said beside something that is wrong as well, as some healthy nets
    stay on a plateau for longer.
    """
    steps, loss, classes = history.steps, loss_progress(history), history.info.classes
    if steps[-1] - steps[0] < _LONG_AT_CHANCE:
        return False
    worse = classes >= 2 and min(loss.first, loss.last) > CHANCE_BAND[1] * math.log(classes)
    return worse or not math.isnan(loss.chance)


def was_learnt(history: History) -> bool:
    """Whether a classifier's loss is below half of that of chance, and was not multiplied by a small number.

    A first loss far below that of chance is taken for a net that has learnt before only where all batches give nearly
    the same loss: an optimum of a single batch. Said where the gradient keeps its direction, which it does not in a net
    that has learnt the batches it sees.
    """
    loss, classes = loss_progress(history), history.info.classes
    level = math.log(classes) if classes >= 2 else math.nan
    small = loss.first < _SCALED_DOWN * level and from_batch_to_batch(history.losses[1]) > _QUIET[0]
    return loss.last < _LEARNT * level and not small


def from_batch_to_batch(losses: FloatArray) -> float:
    """Return the noise from one loss to the next as a share of their size, a steady fall left out; NaN for too few.

    Args:
        losses: Losses, oldest first, shape ``[losses]``.
    """
    finite = losses[np.isfinite(losses)]
    if finite.size < _MINIMUM_LOSSES:
        return math.nan
    with np.errstate(over="ignore", invalid="ignore"):
        bends = np.abs(finite[2:] - 2.0 * finite[1:-1] + finite[:-2])
    return 1.4826 * float(np.median(bends)) / math.sqrt(6.0) / max(abs(float(np.median(finite))), 1e-300)


def has_settled(losses: FloatArray) -> bool:
    """Whether a loss has clearly fallen and hardly falls any more.

    Scale-free, and the same for losses shifted by a constant: what the last third of the run brought is compared with
    what came since the first third.

    Args:
        losses: Losses, oldest first, shape ``[losses]``.

    Source: ours.
    """
    finite = losses[np.isfinite(losses)]
    third = finite.size // 3
    if third < 2:
        return False
    first, middle, last = (median_with_error(part) for part in np.split(finite, (third, 2 * third)))
    fall = _drop(first, last)
    return fall > 0.0 and middle[0] - last[0] < _SETTLED * fall


def judge_losses(losses: FloatArray, *, classes: int = 0) -> LossProgress:
    """Judge a loss series by medians of its parts against its own noise.

    Scale-free: losses multiplied by a positive factor get the same trend. Losses may be negative.

    Args:
        losses: Losses, oldest first, shape ``[losses]``; NaN and infinities allowed.
        classes: Width of the output where the loss may be a cross-entropy, else 0. Chance level is then ln(classes),
            and a loss that came from there or above and ends there has not fallen.

    Returns:
        ``UNKNOWN`` below 20 finite losses, unless the last one is not finite: then ``RISEN``.

    Source:
        Ours. Medians and the median absolute deviation: Hampel (1974), "The influence curve and its role in robust
        estimation", JASA 69.
    """
    finite = losses[np.isfinite(losses)]
    if finite.size == 0:
        return LossProgress(trend=Trend.RISEN if losses.size else Trend.UNKNOWN)
    first, last = float(np.median(finite[:3])), float(np.median(finite[-10:]))
    if not np.isfinite(losses[-1]):
        return LossProgress(trend=Trend.RISEN, first=first, last=last)
    if finite.size < _MINIMUM_LOSSES:
        return LossProgress(trend=Trend.UNKNOWN, first=first, last=last)
    origin, end = abs(float(finite[0])), median_with_error(finite[-10:])
    erupted = bool(finite.max() > BLOW_UP * max(origin, abs(last)))
    start = _start(finite[:3], finite[-finite.size // 3 :])
    size = max(abs(start[0]), abs(end[0]))
    level = math.log(classes) if classes >= 2 else math.nan
    quiet = from_batch_to_batch(finite) > _QUIET[0] and _noise(finite) < _QUIET[1]
    scaled = first < _SCALED_DOWN * level and quiet
    chance = _chance(start[0], end[0], first if scaled else level)
    drop = _drop(start, end)
    if -drop >= _CLEAR_CHANGE * size > 0.0:
        trend = Trend.RISEN
    elif math.isnan(chance) and drop >= _CLEAR_CHANGE * size > 0.0:
        trend = Trend.FALLEN
    elif _is_falling(finite) or (math.isnan(chance) and drop >= _SMALL_CHANGE * size > 0.0):
        trend = Trend.FALLING
    else:
        trend = Trend.FLAT
    learnt = last < _LEARNT * level and not scaled
    return LossProgress(trend=trend, first=first, last=last, chance=chance, learnt=learnt, erupted=erupted)


def loss_growth(losses: FloatArray) -> float:
    """Return by how much a loss had grown when it ceased to be finite, NaN where it did not or too few came before.

    The last finite loss over the median of the first half of those before it. Scale-free.

    Args:
        losses: Losses, oldest first, shape ``[losses]``.
    """
    lost = np.flatnonzero(~np.isfinite(losses))
    before = losses[: lost[0]] if lost.size else losses[:0]
    if before.size < 2:
        return math.nan
    usual = abs(float(np.median(before[: before.size // 2])))
    return float(before[-1]) / usual if usual > 0.0 else math.nan


def _start(early: FloatArray, late: FloatArray) -> tuple[float, float]:
    """Return where the loss began: the first losses, with the noise of the late ones, as three show little of it.

    A loss that leaps up within its first three steps began at its very first value.
    """
    noise = median_with_error(late)[1] * math.sqrt(late.size)
    if early.max() > BLOW_UP * abs(float(early[0])):
        return float(early[0]), noise
    centre, error = median_with_error(early)
    return centre, max(error, noise / math.sqrt(early.size))


def _drop(before: tuple[float, float], after: tuple[float, float]) -> float:
    """Return by how much the loss fell (negative: rose), 0 where the difference is within the noise."""
    change = before[0] - after[0]
    return change if abs(change) > _SIGNIFICANT * math.hypot(before[1], after[1]) else 0.0


def _is_falling(finite: FloatArray) -> bool:
    """Whether the last third lies below the middle one: the first holds the transient that even a sick run has."""
    third = finite.size // 3
    middle, end = median_with_error(finite[third : 2 * third]), median_with_error(finite[2 * third :])
    return _drop(middle, end) > 0.01 * max(abs(middle[0]), abs(end[0]))


def _chance(start: float, end: float, level: float) -> float:
    low, high = CHANCE_BAND
    return level if start >= low * level and low * level <= end <= high * level else math.nan


def _noise(finite: FloatArray) -> float:
    """Return the noise from one loss to the next, as a share of their size."""
    steps = np.abs(np.diff(finite))
    return 1.4826 * float(np.median(steps)) / math.sqrt(2.0) / max(abs(float(np.median(finite))), 1e-300)
