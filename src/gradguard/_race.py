"""Training copies of a model side by side: same batches, same random numbers, the hopeless ones dropped early."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradguard._passes import scalar_loss
from gradguard._untouched import FAILURES, cuda_devices
from gradguard.detectors._loss import CHANCE_BAND
from gradguard.detectors._numbers import median_with_error
from gradguard.monitors.losses import is_cross_entropy

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = [
    "DRAW",
    "LAST",
    "SURE",
    "Batches",
    "Lane",
    "Race",
    "paired_gain",
    "steps_to",
]

LAST = 8
"""Losses at the end of a trial whose median is its result. Source: ours, algorithms.md, section K; the median, since
one batch that weighs ten thousand times the others is the whole mean."""

SURE = 2.0
"""Standard errors by which losses must differ. Ours: one in twenty by chance."""

_ALL_OF = 5
"""Steps of which all tell the same by more than chance. Source: sign test, one in 32."""

_FEWEST = 4
"""Losses below which nothing is said of a fall. Ours: two medians of two."""

_BLOWN_UP = 100.0
"""Times the first loss of the untreated copy above which a copy has diverged, even where it is finite. Ours."""

DRAW = 104729
"""Seed of the weights that a cure draws, beside the copy's own."""

_IN_A_ROW = 2
"""Losses in a row above that: one alone is an outlier in the data, which a good cure survives. Ours."""


class Batches:
    """The first batches of an iterable, kept so that every copy gets the same; begins anew when they run out."""

    def __init__(self, source: Any, count: int) -> None:
        """Take up to ``count`` batches.

        Args:
            source: Any iterable of batches; a DataLoader is iterated once.
            count: Batches to keep, at least 1.

        Raises:
            TypeError: If it cannot be iterated.
            ValueError: If it is empty.
        """
        if isinstance(source, (str, bytes, dict, torch.Tensor)) or not hasattr(source, "__iter__"):
            raise TypeError(
                f"batches must be an iterable of batches, for instance a DataLoader or a list, got "
                f"{type(source).__name__}; for one batch pass [batch]"
            )
        self._kept: list[Any] = []
        for batch in source:
            self._kept.append(batch)
            if len(self._kept) >= count:
                break
        if not self._kept:
            raise ValueError("batches is empty: a trial needs at least one batch to train on")

    def __len__(self) -> int:
        return len(self._kept)

    def at(self, step: int, seed: int) -> Any:
        """Return the batch of a step; each seed begins elsewhere."""
        return self._kept[(step + seed * max(1, len(self._kept) // 2)) % len(self._kept)]


@dataclass(slots=True, eq=False)
class Lane:
    """One copy in training.

    Attributes:
        name: What is tried on it; empty for the untreated copy.
        seed: Which seed it runs under, from 0.
        model: The copy.
        optimizer: Its optimizer.
        losses: Loss of each step so far.
        fault: Why it was stopped; empty while it runs.
        found: After how many steps it was checked last, and what that found; ``None`` before.
        ratios: Median ratio of update to weight over matrices, of each step; ``None`` where it is not measured.
        gains: What each step gained on its own batch as a share of what the gradient promised, 1 for steps that are
            small enough and below 0 where the loss rose; ``None`` where it is not measured.
        gain: Median of those measured last, NaN for none.
        beyond: By how much its loss in evaluation mode lies above its result, at least 0; see ``_measuring``.
        measured: Steps after which it was measured last, -1 before; likewise.
        looked: Losses on the batches to come, as far as it is trained now, where batches are too small for the last few
            steps to tell; likewise.
        devices: CUDA devices of the copy, whose generators a step moves.
    """

    name: str
    seed: int
    model: nn.Module
    optimizer: Optimizer
    losses: list[float] = field(default_factory=list)
    fault: str = ""
    found: tuple[int, dict[str, float]] | None = None
    ratios: list[float] | None = None
    gains: list[float] | None = None
    gain: float = math.nan
    beyond: float = 0.0
    measured: int = -1
    looked: list[float] = field(default_factory=list)
    devices: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.devices = cuda_devices(self.model)

    def end_measuring(self) -> None:
        """Keep the median of the gains measured, and measure no more."""
        known = [gain for gain in self.gains or () if not math.isnan(gain)]
        self.gain, self.gains = float(np.median(known)) if known else math.nan, None

    def halves(self, until: int) -> tuple[float, float]:
        """Return the median loss of the first and of the second half of the steps up to one, NaN for none."""
        losses = self.losses[:until]
        if not losses:
            return math.nan, math.nan
        middle = max(1, len(losses) // 2)
        return float(np.median(losses[:middle])), float(np.median(losses[middle:] or losses))

    def falls(self, until: int, *, share: float) -> bool:
        """Whether the loss falls by more than a share of itself, and more than batches differ, in the steps up to one.

        Args:
            until: Steps to look at.
            share: Of the median of the first half.
        """
        losses = np.array([loss for loss in self.losses[:until] if math.isfinite(loss)])
        if self.fault or losses.size < _FEWEST:
            return False
        middle = losses.size // 2
        (before, doubt), (after, more) = median_with_error(losses[:middle]), median_with_error(losses[middle:])
        return before - after > max(share * abs(before), SURE * math.hypot(doubt, more))

    @property
    def result(self) -> float:
        """Median of the last losses, or the loss in evaluation mode; inf where the copy has failed or not begun."""
        if self.fault or not self.losses:
            return math.inf
        last = float(np.mean(self.looked)) if self.looked else float(np.median(self.losses[-LAST:]))
        return last + self.beyond


class Race:
    """Trains lanes by the step, each under its own random numbers; the caller's are left as they are."""

    def __init__(self, batches: Batches, compute_loss: Callable[[Any, Any], Any], *, base_seed: int) -> None:
        """Prepare to train.

        Args:
            batches: What to train on.
            compute_loss: Called as ``compute_loss(model, batch)``; returns a scalar loss or a mapping with ``"loss"``.
            base_seed: From which the random numbers of each step are derived.
        """
        self._batches, self.kept = batches, len(batches)
        self.compute_loss = compute_loss
        self._base_seed = base_seed
        self.steps_taken = 0
        self.limit = self.deadline = math.inf
        self._chance: float | None = None

    @property
    def chance(self) -> float:
        """ln(classes) where the first loss was the cross-entropy of an untrained classifier, else NaN."""
        return math.nan if self._chance is None else self._chance

    @property
    def batch(self) -> Any:
        """The first batch, for remedies and checks that run the model once."""
        return self._batches.at(0, 0)

    def set_limit(self, untreated: Lane, others: Sequence[float] = ()) -> None:
        """Derive from the untreated copy's first loss where divergence begins.

        Args:
            untreated: The copy, after its first step.
            others: Losses of other batches before that step, where batches are small: that of one example may be zero.
        """
        first = max((abs(loss) for loss in (*untreated.losses[:1], *others)), default=math.nan)
        self.limit = _BLOWN_UP * max(first, 1e-6) if math.isfinite(first) else math.inf

    def advance(self, lane: Lane, until: int) -> None:
        """Train one lane up to a step; a fault of the copy stops it and nothing else."""
        while len(lane.losses) < until and not lane.fault:
            step = len(lane.losses)
            try:
                value = self._take_step(lane, step)
            except FAILURES as error:
                lane.fault = f"{type(error).__name__}: {error}"
                return
            self.steps_taken += 1
            lane.losses.append(value)
            lane.looked = []
            if not math.isfinite(value) or all(abs(loss) > self.limit for loss in lane.losses[-_IN_A_ROW:]):
                lane.fault = "diverged"

    def losses_ahead(self, model: nn.Module, lane: Lane, count: int) -> list[float]:
        """Return the losses of a model on the batches to come of a lane, without a step; fewer where one fails.

        Fewer as well once the deadline has passed.

        Args:
            model: What to run, in the mode that it is in; its buffers may change.
            lane: Whose batches and random numbers.
            count: How many.
        """
        begin, losses = len(lane.losses), []
        with contextlib.suppress(*FAILURES), torch.random.fork_rng(devices=lane.devices), torch.enable_grad():
            self._seed(lane, begin)
            for step in range(begin, begin + count):
                if time.perf_counter() > self.deadline:
                    break
                loss = scalar_loss(self.compute_loss(model, self._batches.at(step, lane.seed)))
                losses.append(float(loss.detach()))
        return losses

    def _take_step(self, lane: Lane, step: int) -> float:
        batch = self._batches.at(step, lane.seed)
        with torch.random.fork_rng(devices=lane.devices), torch.enable_grad():
            self._seed(lane, step)
            lane.optimizer.zero_grad()
            loss = scalar_loss(self.compute_loss(lane.model, batch))
            if self._chance is None:
                self._chance = _chance(lane.model, loss)
            loss.backward()
            if lane.gains is not None:
                promised = _step_and_promise(lane)
                self._seed(lane, step)
                gained = float(loss.detach()) - float(scalar_loss(self.compute_loss(lane.model, batch)).detach())
                lane.gains.append(gained / promised if promised > 0.0 else math.nan)
            elif lane.ratios is not None:
                lane.ratios.append(_step_and_measure(lane))
            else:
                lane.optimizer.step()
        return float(loss.detach())

    def _seed(self, lane: Lane, step: int) -> None:
        torch.manual_seed(self._base_seed + 7919 * lane.seed + step)


def _step_and_measure(lane: Lane) -> float:
    """Take the optimizer's step; return the median ratio of update to weight over matrices, NaN for none."""
    matrices = [parameter for parameter in lane.model.parameters() if parameter.requires_grad and parameter.ndim >= 2]
    before = [matrix.detach().clone() for matrix in matrices]
    lane.optimizer.step()
    moved = [((new.detach() - old).norm(), old.norm()) for old, new in zip(before, matrices, strict=True)]
    ratios = [step / norm for step, norm in moved if float(norm) > 0.0]
    return float(torch.stack(ratios).median()) if ratios else math.nan


def _step_and_promise(lane: Lane) -> float:
    """Take the optimizer's step; return by how much the loss would fall if it were linear in the weights."""
    held = [parameter for parameter in lane.model.parameters() if parameter.grad is not None]
    before = [(parameter.detach().clone(), parameter.grad.clone()) for parameter in held if parameter.grad is not None]
    lane.optimizer.step()
    moved = zip(before, held, strict=True)
    return sum(float(((old - new.detach()) * gradient.conj()).sum().real) for (old, gradient), new in moved)


def _chance(model: nn.Module, loss: torch.Tensor) -> float:
    """Return the loss of guessing where this one is the cross-entropy of an untrained classifier, else NaN."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear or linear[-1].out_features < 2 or not is_cross_entropy(loss):
        return math.nan
    chance = math.log(linear[-1].out_features)
    return chance if float(loss.detach()) > CHANCE_BAND[0] * chance else math.nan


def steps_to(rung: int, lanes: Sequence[Lane], *, seeds: int) -> int:
    """Return the steps that copies have to take to come to one, and then again under every further seed."""
    going = [lane for lane in lanes if not lane.fault]
    return sum(max(0, rung - len(lane.losses)) for lane in going) + (seeds - 1) * rung * len(going)


def paired_gain(untreated: Sequence[Lane], treated: Sequence[Lane]) -> tuple[float, float]:
    """Return by how much treated copies end below the untreated ones, step by step, and the error of that median.

    Where they end below in all of eight steps or more but one, or in all of five or more, there is no doubt, however
    wildly an untreated copy swings (sign test: one in 28, one in 32).
    An untreated copy that has diverged counts as its last finite losses, none as infinite gain.

    Args:
        untreated: One lane per seed.
        treated: One lane per seed, in the same order.
    """
    differences: list[float] = []
    looked: list[float] = []
    for control, lane in zip(untreated, treated, strict=True):
        if lane.fault:
            return -math.inf, 0.0
        if lane.looked and len(lane.looked) == len(control.looked):
            looked += (np.subtract(control.looked, lane.looked) - lane.beyond).tolist()
            continue
        mine = lane.losses[-LAST:]
        others = [loss for loss in control.losses if math.isfinite(loss)][-len(mine) :]
        if control.fault:
            others = [max(others, default=math.inf)] * len(mine)
        last = mine[len(mine) - len(others) :]
        differences.extend(other - own - lane.beyond for other, own in zip(others, last, strict=True))
    if looked and not differences:
        return float(np.mean(looked)), float(np.std(looked, ddof=1)) / math.sqrt(len(looked))
    if not differences:
        return -math.inf, 0.0
    alike = len(differences) >= LAST and sorted(differences)[1] > 0.0
    alike |= len(differences) >= _ALL_OF and min(differences) > 0.0
    if alike or not np.isfinite(differences).all():
        return float(np.median(differences)), 0.0
    return median_with_error(np.array(differences))
