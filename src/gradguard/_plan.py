"""How long a trial trains what: from many candidates for a few steps to few candidates for many."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

__all__ = ["LOOK", "SHARE", "Plan", "make_plan"]

SHARE = 0.25
"""Share of the run's steps that a trial may take. Source: ours, algorithms.md, section K."""

_FINALISTS = 3
"""Candidates that are trained to the end. Source: ours, algorithms.md, section K."""

_SIZES = ((80, 2, 3), (60, 2, 3), (40, 2, 3), (40, 1, 3), (24, 1, 3), (16, 1, 3), (16, 1, 2), (12, 1, 2), (10, 1, 2))
"""Steps to the end, seeds of the finalists and finalists, largest first. Source: ours, algorithms.md, section K: 40
steps pick within 0.03 of the best accuracy in 14 of 14 cases, 20 steps in 12."""

_USUAL = 2
"""Which of these where nobody says how long the run is."""

_OVERTIME = ((20, 4), (40, 3), (80, 3), (160, 0))
"""Steps to go on to, and candidates left then, where a short plan ends with no loss that tells. Source: ours,
algorithms.md, section K: 40 steps tell where 20 mislead; narrow nets of 16 layers stand still for 50."""

LOOK = 6
"""Last steps over whose median it is measured whether steps overshoot. Ours: 3 tell as well, with more noise."""

_EASING = 40
"""Steps after which a cure at its own rate is compared with the same at lower ones. Ours: in 428 sick runs trained to
their ends 22 rates are lowered so; 5 more runs are cured, none fewer, and one of the 22 ends clearly worse."""

_TO_EASE = 3
"""Runs of that length that it takes at most: two at lower rates, and less than one for winner and untreated copy
to go on."""

_LONG = 1000
"""Steps from which on a run has more than hundreds, and a quarter of it is all that a trial may take."""

_CHECKPOINTS = (0.2, 0.5)
"""Shares of the length at which candidates are compared and the hopeless are dropped. Source: ours, algorithms.md,
section K: 8 and 20 of 40 steps."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The stages of a race.

    Attributes:
        rungs: Steps by which candidates are compared, ascending; the last is the whole length.
        keep: Candidates left after each rung but the last.
        seeds: Seeds that the finalists, and the untreated copy, run under.
        overtime: Steps to go on to where no loss tells a cure from nothing by then, and candidates left after each; 0
            leaves all.
        easing: Steps to which to go on where the winner's learning rate turns out too high; 0 never to look.
        budget: Steps over all copies at which nobody goes on to overtime; infinite for runs of hundreds of steps.
    """

    rungs: tuple[int, ...]
    keep: tuple[int, ...]
    seeds: int
    overtime: tuple[tuple[int, int], ...] = ()
    easing: int = 0
    budget: float = math.inf

    @property
    def length(self) -> int:
        """Steps of a whole run."""
        return self.rungs[-1]

    @property
    def longest(self) -> int:
        """Steps that a race may go on to."""
        return max((rung for rung, _ in self.overtime), default=self.length)

    @property
    def before_last(self) -> int:
        """Steps by which candidates are compared last before the end; all of them where there is one rung."""
        return self.rungs[-2] if len(self.rungs) > 1 else self.rungs[-1]

    def cost(self, candidates: int) -> int:
        """Return the optimizer steps that it takes at most, without overtime, over all copies, untreated ones too."""
        running, done, steps = candidates, 0, 0
        for rung, left in zip(self.rungs, (*self.keep, 0), strict=True):
            steps += running * (rung - done)
            running, done = min(running, left) if left else running, rung
        return steps + self.length + (self.seeds - 1) * (running + 1) * self.length


def make_plan(candidates: int, *, searched: int = 0, run_steps: int | None = None, steps: int | None = None) -> Plan:
    """Return the most thorough plan that costs at most a quarter of the run; for a short run the smallest there is.

    Args:
        candidates: How many there are, at least 0.
        searched: Learning rates among them, whose search costs about as much again as a candidate.
        run_steps: Steps of the run that the trial is for, at least 1; ``None`` where unknown.
        steps: Length that the user asks for, at least 1; ``None`` to choose.

    Example:
        >>> make_plan(6, run_steps=10_000).rungs, make_plan(6, run_steps=240).rungs
        ((16, 40, 80), (2, 6, 12))
    """
    plans = [_plan(candidates, *size) for size in _SIZES]
    if steps is not None:
        plans = [_plan(candidates, steps, seeds, _FINALISTS) for seeds in (2, 1)]
    easing = _EASING if steps is None else 0
    if run_steps is None:
        return plans[0] if steps is not None else replace(plans[_USUAL], easing=easing)
    chosen = next((plan for plan in plans if plan.cost(candidates + searched) <= SHARE * run_steps), plans[-1])
    room = run_steps < _LONG or chosen.cost(candidates) + _TO_EASE * max(easing, chosen.length) <= SHARE * run_steps
    return replace(
        chosen,
        overtime=tuple((rung, keep) for rung, keep in _OVERTIME if chosen.length < rung <= run_steps),
        easing=easing if room and easing <= run_steps else 0,
        budget=math.inf if run_steps < _LONG else SHARE * run_steps,
    )


def _plan(candidates: int, length: int, seeds: int, finalists: int) -> Plan:
    half = max(_FINALISTS, math.ceil(candidates / 2))
    rungs = tuple(dict.fromkeys((*(max(1, round(share * length)) for share in _CHECKPOINTS), length)))
    return Plan(rungs, (half, finalists)[-(len(rungs) - 1) :] if len(rungs) > 1 else (), seeds)
