"""Bookkeeping of what was done to the steps of one optimizer, in bounded memory and without stopping the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from gradguard.actions import Action

if TYPE_CHECKING:
    from gradguard.remedies.clipping._result import ClipResult

__all__ = ["Ledger"]

_KEPT = 256
"""Newest acts kept; all are counted. Ours: 256 of them are 50 KiB."""

_PENDING = 64
"""Results that may wait on the device before they are read, in one go. Ours."""

_COUNTS = ("steps", "clipped", "spikes", "non_finite")


class Ledger:
    """Counts steps and acts, and keeps the newest acts."""

    def __init__(self) -> None:
        """Start with an empty page."""
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._newest: deque[tuple[int, Literal["clip", "skip", "lr"], float, float, str]] = deque(maxlen=_KEPT)
        self._pending: list[tuple[int, ClipResult, str]] = []

    def note_step(self, step: int, result: ClipResult, why: str) -> None:
        """Note what a clipper did; a result that is still on the device is read later.

        Args:
            step: The optimizer's step.
            result: What the clipper returned.
            why: The reason if it has clipped or skipped.
        """
        self._pending.append((step, result, why))
        if result.on_host or len(self._pending) >= _PENDING:
            self.settle()

    def note_rate(self, step: int, before: float, after: float, why: str) -> None:
        """Note a change of the learning rate."""
        self._newest.append((step, "lr", before, after, why))

    def settle(self) -> None:
        """Read the results that wait."""
        waiting, self._pending = self._pending, []
        for step, result, why in waiting:
            self._counts["steps"] += 1
            if result.skipped:
                self._counts["non_finite" if result.non_finite else "spikes"] += 1
                self._newest.append((step, "skip", result.norm_before, 0.0, why))
            elif result.engaged:
                self._counts["clipped"] += 1
                self._newest.append((step, "clip", result.norm_before, result.norm_after, why))

    @property
    def counts(self) -> dict[str, int]:
        """Steps seen, clipped, and left out by kind."""
        self.settle()
        return dict(self._counts)

    def actions(self, label: str) -> tuple[Action, ...]:
        """Return the newest acts, oldest first.

        Args:
            label: What the optimizer is called.
        """
        self.settle()
        return tuple(
            Action(step=step, optimizer=label, kind=kind, before=before, after=after, why=why)
            for step, kind, before, after, why in self._newest
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as plain numbers, strings and lists."""
        self.settle()
        return {"counts": dict(self._counts), "newest": [list(act) for act in self._newest]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another one stopped."""
        self._counts = {name: int(state["counts"][name]) for name in _COUNTS}
        self._newest.clear()
        for step, kind, before, after, why in state["newest"]:
            self._newest.append((int(step), kind, float(before), float(after), str(why)))
        self._pending = []
