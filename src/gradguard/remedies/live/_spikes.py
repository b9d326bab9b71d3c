"""Deciding, step by step, whether a gradient norm is a spike that may be left out."""

from __future__ import annotations

import math
import statistics
import warnings
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from gradguard.detectors._spikes import times_usual
from gradguard.errors import GradGuardWarning
from gradguard.remedies.clipping._base import Clipped, Clipper, Measured, is_first_rank

if TYPE_CHECKING:
    from gradguard.config import GuardConfig

__all__ = ["SpikeJudge", "Untouched"]

_BUDGET_STEPS = 100
"""Newest steps of which the budget is a share. Ours."""

_START = 3
"""First norms whose median is the level at which the run began, as in the rule GG103."""


class Untouched(Clipper):
    """A clipper that clips nothing: it measures, and takes away what is not finite or refused."""

    _on_host = True

    def _clip(self, measured: Measured) -> Clipped:
        """Leave the gradients as they are."""
        return Clipped(measured.total, math.nan, engaged=False)


class SpikeJudge:
    """Says whether a norm is a spike against the run's own norms, and whether the step may still be left out.

    The rule is that of GG103. Every norm enters the history, spikes too: where the norms rise for good, four of them
    lift the upper quantile of the 64 newest, and no more is refused.
    """

    def __init__(self, config: GuardConfig, *, budget: float) -> None:
        """Start with nothing known.

        Args:
            config: Its ``spike_ratio``, ``spike_z``, ``spike_window`` and ``spike_minimum`` say what a spike is.
            budget: Share of the newest 100 steps that may be left out, 0.01 to 0.5.
        """
        self._config = config
        self._budget = max(1, int(budget * _BUDGET_STEPS))
        self._norms: deque[float] = deque(maxlen=config.spike_window)
        self._first: list[float] = []
        self._seen = 0
        self._refused: deque[int] = deque(maxlen=self._budget)
        self.let_through = 0
        self.times = math.nan
        """How many times its usual size the newest spike was."""

    def refuse(self, norm: float) -> bool:
        """Whether the step with this finite norm is to be left out; the norm enters the history."""
        self._seen += 1
        times = self._judge(norm)
        if norm > 0.0:
            self._norms.append(norm)
            if len(self._first) < _START:
                self._first.append(norm)
        if times is None:
            return False
        if len(self._refused) == self._budget and self._seen - self._refused[0] < _BUDGET_STEPS:
            self._let_through()
            return False
        self.times = times
        self._refused.append(self._seen)
        return True

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers and lists."""
        return {
            "norms": list(self._norms),
            "first": list(self._first),
            "seen": self._seen,
            "refused": list(self._refused),
            "let_through": self.let_through,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped."""
        self._norms.clear()
        self._norms.extend(float(norm) for norm in state["norms"])
        self._first = [float(norm) for norm in state["first"]]
        self._seen = int(state["seen"])
        self._refused.clear()
        self._refused.extend(int(at) for at in state["refused"])
        self.let_through = int(state["let_through"])

    def _judge(self, norm: float) -> float | None:
        if len(self._norms) < self._config.spike_minimum or norm <= 0.0:
            return None
        before = np.array(self._norms)
        return times_usual(norm, before, start=statistics.median(self._first), config=self._config)

    def _let_through(self) -> None:
        self.let_through += 1
        if self.let_through == 1 and is_first_rank():
            warnings.warn(
                f"gradguard: {self._budget} of the newest {_BUDGET_STEPS} steps were left out as spikes, which is the "
                "whole spike_budget: further spikes are let through until it frees up. So many are no accident: look "
                "at the data and the learning rate",
                GradGuardWarning,
                stacklevel=4,
            )
