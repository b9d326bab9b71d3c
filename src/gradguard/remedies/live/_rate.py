"""Backing off with the learning rate: a factor at the step alone, so that no schedule notices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from gradguard.findings import Finding, Severity

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["RateBackoff", "illness_of_rate"]

_CODES = frozenset({"GG102", "GG501", "GG505"})
"""Exploding gradient, learning rate too high, divergence: what a smaller step is a remedy for."""

_MOST = 3
"""Times that the rate is lowered at most. Ours: what an eighth of the rate does not heal is no matter of the rate."""

_COOL_DOWN = 100
"""Optimizer steps between two of them. Ours: an alarm is followed by six looks in 20 steps, and by the next regular
one; the rules need three to clear."""


def illness_of_rate(findings: Iterable[Finding], label: str) -> Finding | None:
    """Return the first standing warning about one optimizer that a smaller learning rate is a remedy for.

    What follows from an illness of another kind is left out: corrupt data is not healed so. A spike may be the cause.

    Args:
        findings: Findings whose consequences are linked to their causes.
        label: Label of the optimizer; findings without one concern all.
    """
    for finding in findings:
        concerns = finding.optimizer in ("", label) and finding.code in _CODES
        root = finding.consequence_of is None or finding.consequence_of in _CODES | {"GG103"}
        if concerns and root and finding.standing and finding.severity >= Severity.WARNING:
            return finding
    return None


class RateBackoff:
    """Multiplies the learning rates of an optimizer for the length of its step.

    The schedule's own numbers stay in the groups between steps: schedulers of every kind, those that compute a rate
    from the last one included, go on as if nothing had happened.
    """

    def __init__(self, optimizer: Optimizer, factor: float) -> None:
        """Begin with the rates as they are.

        Args:
            optimizer: Whose rates.
            factor: Factor of one backoff, between 0 and 1.
        """
        self._optimizer = optimizer
        self._step_factor = factor
        self._times = 0
        self._last: int | None = None
        self._lent: list[tuple[dict[str, Any], Any, Any]] = []

    @property
    def factor(self) -> float:
        """Factor on the rates of the schedule now."""
        return float(self._step_factor**self._times)

    def back_off(self, step: int) -> tuple[float, float] | None:
        """Lower the rate from the next step on; return it before and after, ``None`` where it stays.

        Args:
            step: The optimizer's step now.
        """
        if self._times >= _MOST or (self._last is not None and step - self._last < _COOL_DOWN):
            return None
        rate = next((float(group["lr"]) for group in self._optimizer.param_groups if "lr" in group), None)
        if rate is None:
            return None
        before = rate * self.factor
        self._times += 1
        self._last = step
        return before, rate * self.factor

    def lend(self) -> None:
        """Lower the rates for the step that begins."""
        self.give_back()  # a step that raised has never ended
        if not self._times:
            return
        for group in self._optimizer.param_groups:
            rate = group.get("lr")
            if isinstance(rate, torch.Tensor):  # a captured or compiled step holds this very tensor
                kept = rate.detach().clone()
                with torch.no_grad():
                    rate.mul_(self.factor)
                self._lent.append((group, kept, rate))
            elif rate is not None:
                group["lr"] = lowered = rate * self.factor
                self._lent.append((group, rate, lowered))

    def give_back(self) -> None:
        """Put the schedule's rates back, unless somebody has set others during the step."""
        while self._lent:
            group, kept, lowered = self._lent.pop()
            now = group.get("lr")
            if isinstance(now, torch.Tensor):
                if now is lowered:
                    with torch.no_grad():
                        now.copy_(kept)
            elif now == lowered:
                group["lr"] = kept

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {"times": self._times, "last": self._last}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped."""
        self._times = int(state["times"])
        self._last = None if state["last"] is None else int(state["last"])
