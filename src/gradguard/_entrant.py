"""A candidate of a trial, and where its loss is going."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gradguard._race import Lane
from gradguard.findings import Prescription
from gradguard.remedies.catalogue import Remedy

__all__ = ["NOTICEABLE", "Entrant", "by_promise", "far_behind", "idles", "leads_by_far"]

NOTICEABLE = 0.02
"""Share of the untreated loss by which a cure must lower it. Ours: copies that differ by their random numbers alone end
within 1 %."""

_FAR_AHEAD = 0.75
"""Share of the untreated copy's loss below which a cure stands far ahead of it. Ours: with it, and with those left out
who are far behind another, 60 of 185 sick runs cost 0.03 to 0.1 of a run less, and as many are cured."""

_FAR_BEHIND = 0.5
"""Share of another's loss at which a cure leads it by far before the last rung. Ours: see _FAR_AHEAD."""


_MOST = 0.5
"""Factor by which a loss is taken to fall at best: a net whose first loss is in the hundreds falls tenfold in a few
steps, to where others begin. Ours: of 85 sick runs with every cure trained to its end, projecting by factors instead of
differences picks one that cures in two more."""

_OUTLOOK = 2.0
"""Halves of the steps so far by which a rise is projected, and the fall of a loss that is not positive. Ours."""


@dataclass(slots=True, eq=False)
class Entrant:
    """A candidate and what became of it.

    Attributes:
        prescription: What is tried; its arguments may be refined.
        remedy: What applies it.
        lanes: Its copies, one per seed.
        out: Why it is no longer in the race; empty while it is.
        healthy: Whether a check of the trained copy found the illness gone.
        screened: Whether a check before the first step still found the illness, which no training takes back.
    """

    prescription: Prescription
    remedy: Remedy
    lanes: list[Lane] = field(default_factory=list)
    out: str = ""
    outcome: str = ""
    healthy: bool | None = None
    screened: bool = False

    @property
    def may_come_back(self) -> bool:
        """Whether it was dropped for its losses, and may be let in again."""
        return self.outcome == "dropped" and not self.screened and bool(self.lanes)

    @property
    def result(self) -> float:
        """Mean result over the seeds."""
        return math.inf if not self.lanes else sum(lane.result for lane in self.lanes) / len(self.lanes)


def by_promise(entrants: Sequence[Entrant], control: Lane, rung: int) -> list[Entrant]:
    """Return candidates by where their losses are going after so many steps; those that idle come last."""
    return sorted(entrants, key=lambda item: (idles(item, control, rung), _projected(item.lanes[0], rung)))


def far_behind(entrants: Sequence[Entrant], rung: int) -> list[Entrant]:
    """Return those whose loss is a multiple of that of the best one after so many steps."""
    stand = [(entrant, entrant.lanes[0].halves(rung)[1]) for entrant in entrants]
    best = min((loss for _, loss in stand), default=math.nan)
    return [entrant for entrant, loss in stand if 0.0 < best < _FAR_BEHIND * loss]


def leads_by_far(entrants: Sequence[Entrant], control: Lane, rung: int) -> bool:
    """Whether the best one stands far below the untreated copy after so many steps."""
    best = min((entrant.lanes[0].halves(rung)[1] for entrant in entrants), default=math.inf)
    return 0.0 < best < _FAR_AHEAD * control.halves(rung)[1]


def idles(entrant: Entrant, control: Lane, rung: int) -> bool:
    """Whether a copy neither stands better nor falls faster than the untreated one."""
    if control.fault:
        return False
    early, late = entrant.lanes[0].halves(rung)
    before, after = control.halves(rung)
    tolerance = 0.5 * NOTICEABLE * abs(after)
    return late > after - tolerance and early - late < max(0.0, before - after) + tolerance


def _projected(lane: Lane, rung: int) -> float:
    """Return where a loss is going: it falls by the same factor again, at most by half, or rises by twice as much."""
    early, late = lane.halves(rung)
    if 0.0 < late < early:
        return late * max(_MOST, late / early)
    return late - _OUTLOOK * (early - late)
