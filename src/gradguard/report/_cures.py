"""Cures in words: what was tried and what came of it, and what nobody has tried yet."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gradguard.findings import Effect, Finding, Prescription
from gradguard.report._format import measured

__all__ = ["Trials", "TriedCure", "trials", "untried"]

_NO_EFFECT = 0.01
"""Share of the untreated loss below which a difference counts as none. Ours: batches differ by more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TriedCure:
    """A cure with what it did.

    Attributes:
        cure: The prescription.
        rank: Its place, from 1; ``-`` where it does not help.
        loss: The loss it leads to.
        note: ``best``, ``no effect``, ``worse``, ``diverged`` or empty.
    """

    cure: Prescription
    rank: str
    loss: str
    note: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Trials:
    """The cures of a finding that were tried, best first, and how they were tried."""

    head: str
    cures: tuple[TriedCure, ...]

    @property
    def best(self) -> Prescription | None:
        """The cure that helps most, ``None`` where none does."""
        return next((tried.cure for tried in self.cures if tried.note == "best"), None)


def trials(finding: Finding) -> Trials | None:
    """Return what was tried against a finding, ``None`` where nothing was."""
    tried = [(cure, cure.effect) for cure in finding.prescriptions if cure.effect is not None]
    if not tried:
        return None
    tried.sort(key=lambda pair: _order(pair[1]))
    before = {measured(effect.loss_before) for _, effect in tried}
    steps = sorted({effect.steps for _, effect in tried})
    span = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    head = f"tried on a copy, {span} steps each"
    if len(before) == 1:
        head += f"; loss {next(iter(before))} untreated"
    rows = []
    for index, (cure, effect) in enumerate(tried):
        loss = measured(effect.loss_after)
        note = _outcome(effect)
        rows.append(
            TriedCure(
                cure=cure,
                rank="-" if note else str(index + 1),
                loss=loss if len(before) == 1 else f"{measured(effect.loss_before)} > {loss}",
                note=note or ("best" if index == 0 else ""),
            )
        )
    return Trials(head=head, cures=tuple(rows))


def untried(finding: Finding) -> list[Prescription]:
    """Return the cures that nobody has tried, best first."""
    return [cure for cure in finding.prescriptions if cure.effect is None]


def _outcome(effect: Effect) -> str:
    """Return what is wrong with an effect; empty where the cure helps."""
    if not math.isfinite(effect.loss_after):
        return "diverged"
    if not math.isfinite(effect.loss_before):
        return ""
    limit = _NO_EFFECT * abs(effect.loss_before)
    if effect.gain > limit:
        return ""
    return "worse" if effect.gain < -limit else "no effect"


def _order(effect: Effect) -> tuple[bool, float]:
    """Sort by gain, so that cures tried against different losses can be compared; what does not help comes last."""
    after = effect.loss_after if math.isfinite(effect.loss_after) else math.inf
    gain = effect.gain if math.isfinite(effect.gain) else -after
    return bool(_outcome(effect)), -gain
