"""From a yes or no per observation to an episode: since when, until when, over or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["BoolArray", "Episode", "last_episode"]

BoolArray: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Episode:
    """A stretch of observations in which something was so.

    Attributes:
        first: Index of the first observation of the stretch.
        last: Index of the last observation at which it was still so.
        resolved: Index of the first observation at which it was over, ``None`` while it stands.
        count: Observations at which it was so.
    """

    first: int
    last: int
    resolved: int | None
    count: int

    @property
    def standing(self) -> bool:
        """Whether it was still so when last looked at."""
        return self.resolved is None


def last_episode(
    begins: BoolArray,
    *,
    holds: BoolArray | None = None,
    known: BoolArray | None = None,
    patience: int = 1,
) -> Episode | None:
    """Return the newest episode of a condition, ``None`` where there was none.

    Args:
        begins: Whether the condition for a beginning is met, shape ``[observations]``.
        holds: Whether an episode that has begun goes on; a wider condition than ``begins`` gives hysteresis, so that a
            value at the limit does not flicker. Default: ``begins``.
        known: Whether an observation says anything at all; one that does not neither begins, continues nor ends an
            episode. Default: all do.
        patience: Consecutive known observations for which the beginning's condition must be met, at least 1.
    """
    holds = begins if holds is None else holds | begins
    indices = np.flatnonzero(np.ones_like(begins) if known is None else known)
    found: Episode | None = None
    run: list[int] = []
    for index in (int(i) for i in indices):
        if found is not None and found.standing:
            if holds[index]:
                found = Episode(first=found.first, last=index, resolved=None, count=found.count + 1)
            else:
                found = Episode(first=found.first, last=found.last, resolved=index, count=found.count)
                run = []
            continue
        run = [*run, index] if begins[index] else []
        if len(run) >= patience:
            found = Episode(first=run[0], last=index, resolved=None, count=len(run))
    return found
