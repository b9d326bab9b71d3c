"""What a guard tells: what it saw, what it makes of it, what to do. It changes nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from gradguard._alerts import is_main_process
from gradguard.findings import Diagnosis, Finding
from gradguard.suggestions import ClipSuggestion, suggest_clip

if TYPE_CHECKING:
    from rich.console import Console
    from torch import nn
    from torch.optim import Optimizer

    from gradguard.actions import Action
    from gradguard.history import History
    from gradguard.observing import Observing
    from gradguard.outcomes import TrialResult
    from gradguard.remedies.live.acting import LiveRemedies
    from gradguard.remedies.live.options import LiveOptions

__all__ = ["Verdicts"]


class Verdicts:
    """The part of a guard that answers questions."""

    _model: nn.Module
    _observing: Observing
    _steps: list[int]
    _batches: int
    _findings: tuple[Finding, ...]
    _live: LiveRemedies | None
    _optimizers: tuple[Optimizer, ...]
    _first_s: float | None
    _last_s: float

    @property
    def history(self) -> History:
        """What was observed so far."""
        self._observing.drain_losses()
        return self._observing.history

    @property
    def overhead(self) -> float:
        """Share of wall time spent in gradguard since the first step, 0 to 1, seen from the host; NaN before that."""
        if self._first_s is None or self._last_s <= self._first_s:
            return math.nan
        return self.overhead_s / (self._last_s - self._first_s)

    @property
    def overhead_s(self) -> float:
        """Seconds spent in gradguard since attaching, seen from the host."""
        return self._observing.overhead_s + (0.0 if self._live is None else self._live.spent_s)

    @property
    def steps(self) -> int:
        """Optimizer steps seen, over all optimizers."""
        return sum(self._steps)

    @property
    def step_counts(self) -> tuple[int, ...]:
        """Optimizer steps seen, by optimizer."""
        return tuple(self._steps)

    @property
    def observations(self) -> int:
        """Observations made so far; asking costs nothing."""
        return self._observing.history.observations

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings as they were judged after the newest observation; :meth:`diagnose` judges anew."""
        return self._findings

    def diagnose(self) -> Diagnosis:
        """Return the verdict on everything observed so far."""
        diagnosis = self._observing.diagnose(steps=self.steps, batches=self._batches, overhead=self.overhead)
        if self._live is None:
            return diagnosis
        summary = replace(diagnosis.summary, overhead_s=self.overhead_s)
        return replace(diagnosis, summary=summary, actions=self._live.summary())

    @property
    def actions(self) -> tuple[Action, ...]:
        """What was done to the run, by step, as ``watch(..., clip=, on_spike=, lr_backoff=)`` asked: the newest 256."""
        return () if self._live is None else self._live.actions()

    @property
    def remedies(self) -> LiveOptions | None:
        """What may be done to the run, ``None`` for nothing."""
        return None if self._live is None else self._live.options

    @property
    def remedy_state(self) -> dict[str, Any]:
        """What :meth:`Guard.resume` needs for the remedies to go on, in plain types; empty where there are none."""
        return {} if self._live is None else self._live.state_dict()

    def label(self, index: int) -> str:
        """What reports call an optimizer; empty where there is only one."""
        if len(self._optimizers) < 2:
            return ""
        return self._observing.labels[index] or f"{type(self._optimizers[index]).__name__} {index}"

    def report(self, console: Console | None = None, *, show_all: bool = False, deep: bool = False) -> Diagnosis:
        """Print a report and return the diagnosis. Of several processes only the first prints.

        Args:
            console: A rich console to print to; standard output otherwise.
            show_all: Print every layer and every finding, not only the interesting ones.
            deep: Compute the spectra of all weights as they are now, exactly or certified, and print them as well:
                0.1 s for a matrix of 1024 x 1024 on two CPU cores, 0.3 s more where it is recurrent.
        """
        from gradguard.report.console import print_report

        diagnosis = self.diagnose()
        if deep:
            diagnosis = replace(diagnosis, spectra=self._observing.exact_spectra())
        if is_main_process():
            print_report(diagnosis, console, show_all=show_all)
        return diagnosis

    def suggest_clip(self, *, optimizer: int = 0) -> ClipSuggestion:
        """Suggest a threshold for clipping by norm from the norms observed so far; ``print`` it or read its fields.

        Raises:
            NothingObservedError: If fewer than 20 finite norms of this optimizer were observed.
        """
        return suggest_clip(self.history, optimizer=optimizer)

    @property
    def clip_norm(self) -> float:
        """Norm above which you clip, as far as you say so (GG601 needs it); NaN where it is not known."""
        return self._observing.clip_norm

    @clip_norm.setter
    def clip_norm(self, norm: float) -> None:
        self._observing.clip_norm = float(norm)

    def trial(
        self,
        batches: Any,
        compute_loss: Callable[[Any, Any], Any],
        make_optimizer: Callable[[Any], Optimizer],
        *,
        model: nn.Module | None = None,
        **options: Any,
    ) -> TrialResult:
        """Try cures for what this run has on copies, and rank them; see :func:`gradguard.trial`.

        Args:
            batches: Iterable of training batches.
            compute_loss: Called as ``compute_loss(model, batch)``.
            make_optimizer: Called with a copy, returns its optimizer.
            model: The model as it was before training, where you can make one: what this run has done to its weights
                would hide what a cure can do. By default the watched model as it is now.
            **options: Further arguments of :func:`gradguard.trial`; ``run_steps`` is the number of steps seen.
        """
        from gradguard.trials import trial

        given = {"diagnosis": self.diagnose(), "run_steps": self.steps or None, **options}
        return trial(self._model if model is None else model, batches, compute_loss, make_optimizer, **given)
