"""When to observe: a cadence is asked before each step, and told what an observation cost."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

__all__ = ["Cadence", "FixedCadence"]

_CLOSER = (0, 1, 2, 5, 10, 20)
"""Steps after an alarm at which to look again. Ours: the offsets of the dense start, where most illnesses show."""


class Cadence(Protocol):
    """Decides which optimizer steps are observed."""

    def due(self, step: int) -> bool:
        """Whether the coming step, counted from 0, is to be observed."""
        ...

    def observed(self, step: int, cost_s: float) -> None:
        """Learn what observing a step cost, in seconds of host time."""
        ...

    def look_closer(self, step: int) -> None:
        """Observe this step, if it is not over, and more densely after it."""
        ...


class FixedCadence:
    """Every so many steps, after a dense start; denser for 20 steps after an alarm.

    Example:
        >>> cadence = FixedCadence(every=100, dense=(0, 1, 2))
        >>> [step for step in range(300) if cadence.due(step)]
        [0, 1, 2, 100, 200]
        >>> cadence.look_closer(100)
        >>> [step for step in range(101, 200) if cadence.due(step)]
        [101, 102, 105, 110, 120]
    """

    def __init__(self, *, every: int, dense: Iterable[int] = ()) -> None:
        """Make a cadence.

        Args:
            every: Observe every so many optimizer steps, at least 1.
            dense: Further steps to observe.
        """
        self._every = every
        self._extra = set(dense)

    def due(self, step: int) -> bool:
        """Whether the coming step, counted from 0, is to be observed."""
        return step % self._every == 0 or step in self._extra

    def observed(self, step: int, cost_s: float) -> None:
        """Forget extra steps that lie behind; a fixed cadence does not mind the cost."""
        self._extra = {extra for extra in self._extra if extra > step}

    def look_closer(self, step: int) -> None:
        """Observe this step, if it is not over, and more densely after it."""
        self._extra.update(step + offset for offset in _CLOSER)
