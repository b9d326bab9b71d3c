"""A candidate of a trial, and where its loss is going."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gradguard._race import Lane
from gradguard.findings import Prescription
from gradguard.remedies.catalogue import Remedy

__all__ = ["Entrant", "projected"]

_OUTLOOK = 2.0
"""Halves of the steps so far by which a fall is projected. Ours."""


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
    """Return where a loss would be after as many steps again, and twice as many."""
    early, late = lane.halves(rung)
    return late - _OUTLOOK * (early - late)
