"""A candidate of a trial, and where its loss is going."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gradguard._race import Lane
from gradguard.findings import Prescription
from gradguard.remedies.catalogue import Remedy

__all__ = ["Entrant", "projected"]

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
    def result(self) -> float:
        """Mean result over the seeds."""
        return math.inf if not self.lanes else sum(lane.result for lane in self.lanes) / len(self.lanes)


def projected(lane: Lane, rung: int) -> float:
    """Return where a loss is going: it falls by the same factor again, at most by half, or rises by twice as much."""
    early, late = lane.halves(rung)
    if 0.0 < late < early:
        return late * max(_MOST, late / early)
    return late - _OUTLOOK * (early - late)
