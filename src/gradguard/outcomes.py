"""What a trial of cures found: every candidate's run, the ranking, and what to take."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gradguard.findings import Diagnosis, Prescription, to_plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

__all__ = ["TrialResult", "TrialRun"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRun:
    """One candidate, or the untreated copy, in a trial.

    Attributes:
        remedy: Name of the remedy; empty for the untreated copy.
        loss: Mean loss over the last steps of its run, over the seeds; inf where it diverged.
        steps: Optimizer steps that each seed was given.
        seeds: Seeds it ran under.
        outcome: ``"untreated"``, ``"best"``, ``"helps"``, ``"no effect"``, ``"worse"``, ``"diverged"``, ``"dropped"``
            (behind the others after a few steps) or ``"not possible"``.
        why: Reason in words, where the outcome needs one.
        level: How much it changes, from 0 (learning rate, clipping) to 5 (another kind of cell).
        healthy: Whether a check of the treated copy found nothing; ``None`` where nobody looked.
    """

    remedy: str
    loss: float
    steps: int
    seeds: int
    outcome: str
    why: str = ""
    level: int = 0
    healthy: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """The outcome of a trial; the model that it was run for is as it was.

    Attributes:
        best: What to apply, with its measured effect; ``None`` where nothing helps, or nothing is wrong.
        ranking: Candidates that ran to the end, best first, each with its effect.
        control: The untreated copy.
        runs: Every candidate, in the order of the ranking, those dropped and those not possible last.
        diagnosis: The verdict with the measured effects in its prescriptions, ``None`` where there was none.
        cost_s: Seconds that the trial took.
        cost_steps: Optimizer steps that it took, over all copies.
        run_steps: Steps of the run that it is for, 0 where unknown.
        interrupted: Whether it was stopped before its end.
        note: What a reader should know beside the numbers; may be empty.
    """

    best: Prescription | None
    ranking: tuple[Prescription, ...]
    control: TrialRun
    runs: tuple[TrialRun, ...] = ()
    diagnosis: Diagnosis | None = None
    cost_s: float = 0.0
    cost_steps: int = 0
    run_steps: int = 0
    interrupted: bool = False
    note: str = ""

    @property
    def share(self) -> float:
        """Steps of the trial over steps of the run that it is for, >= 0; NaN where those are unknown."""
        return self.cost_steps / self.run_steps if self.run_steps > 0 else math.nan

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON-ready data; non-finite numbers become strings, as in :meth:`Diagnosis.to_dict`."""
        return {**{f.name: to_plain(getattr(self, f.name)) for f in fields(self)}, "share": to_plain(self.share)}

    def to_json(self, *, indent: int | None = 2) -> str:
        """Return the result as a JSON text."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from gradguard.report.trial import render_trial

        yield from render_trial(self, options)
