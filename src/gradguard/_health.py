"""What a check finds in the copies of a trial: there where no loss tells, there before the first step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from gradguard._race import Lane, Race
from gradguard._twins import copy_of
from gradguard._untouched import FAILURES
from gradguard.findings import Finding, Severity
from gradguard.preflight import check

__all__ = ["OF_RUNS", "SCREENED", "THROUGH_TIME", "Health", "Illness"]

THROUGH_TIME = frozenset({"GG111", "GG112"})
"""Illnesses of recurrent nets, measured over time steps."""


EVENTS = frozenset({"GG103", "GG402", "GG505", "GG701", "GG702", "GG703"})
"""Illnesses that come over a run that was well until then: spikes, divergence, steps far above the usual ones, weights
and attention logits that grow."""

LATE = 20
"""Step from which on they came late: a trial from the first weights may be over before they show. Ours."""

OF_RUNS = frozenset({"GG103", "GG402", "GG501", "GG502", "GG504", "GG505", "GG702", "GG703"})
"""Illnesses that only a run shows: what it has shown outweighs the few steps in which a copy does well."""

SCREENED = frozenset({"GG101", "GG102", "GG104", "GG301", "GG302", "GG403"})
"""Illnesses that a check before the first step sees, so that a cure which leaves them needs no training."""


@dataclass(frozen=True, slots=True)
class Illness:
    """What a finding says of when something was wrong.

    Attributes:
        code: Of its rule, empty for none.
        onset: First step of it.
        lasted: Last step at which it was seen.
        climbed: Whether the learning rate had climbed by then.
    """

    code: str = ""
    onset: int = 0
    lasted: int = 0
    climbed: bool = False

    @classmethod
    def of(cls, finding: Finding | None) -> Illness:
        """Return that of a finding, or none."""
        if finding is None:
            return cls()
        return cls(finding.code, finding.step, finding.last_step, "climbed_lr" in finding.evidence)

    @property
    def came_late(self) -> bool:
        """Whether it came over a run that was well until then, too late for a trial to show it for certain."""
        return self.code in EVENTS and self.onset >= LATE


class Health:
    """Checks copies of a model for what it is ill with."""

    def __init__(self, model: nn.Module, race: Race, illness: str) -> None:
        """Prepare; nothing is checked yet.

        Args:
            model: The model as it was given.
            race: With the batch and the loss to check with.
            illness: Code of the finding, empty for none.
        """
        self._model = model
        self._race = race
        self._illness = illness
        self._alike = THROUGH_TIME if illness in THROUGH_TIME else {illness}
        self._at_first: dict[str, float] | None = None

    def at_first(self) -> dict[str, float]:
        """Return what a check finds in the model as it was given: decades by code, or 1."""
        if self._at_first is None:
            self._at_first = self._found(copy_of(self._model))
        return self._at_first

    def after(self, lane: Lane) -> dict[str, float]:
        """Return what a check finds in a copy as far as it has been trained; each copy is checked once per length."""
        if lane.found is None or lane.found[0] != len(lane.losses):
            lane.found = len(lane.losses), self._found(lane.model)
        return lane.found[1]

    def stays(self, lane: Lane) -> bool:
        """Whether a check sees this illness, and still finds it in a copy as far as it has been trained."""
        return self._illness in SCREENED and self._illness in self.after(lane)

    def _found(self, model: nn.Module) -> dict[str, float]:
        """Return what a check warns of, and the illness itself however mild it looks there.

        A gradient that vanishes through time in place of one that explodes is no cure: both count as the illness.
        """
        try:
            diagnosis = check(model, self._race.batch, self._race.compute_loss)
        except FAILURES:
            return {}
        found: dict[str, float] = {}
        for item in diagnosis.findings:
            if item.standing and (item.severity >= Severity.WARNING or item.code in self._alike):
                code = self._illness if item.code in self._alike else item.code
                found[code] = max(found.get(code, 0.0), _decades(item))
        return found


def _decades(finding: Finding) -> float:
    """Return the decades of a finding that is measured in them, 1 for any other."""
    spans = (finding.evidence.get(name) for name in ("time_span", "span"))
    values = [abs(float(item.value)) for item in spans if item is not None and isinstance(item.value, float)]
    return next((value for value in values if math.isfinite(value)), 1.0)
