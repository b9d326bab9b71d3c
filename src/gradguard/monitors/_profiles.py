"""From the gradients that a replay gave at every time step to the numbers of a record. On the host, numpy only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradguard.records import FloatArray, TemporalProfile

__all__ = ["CURVES", "MINIMUM_STEPS", "Curves", "TemporalNumbers", "summarise"]

CURVES = ("injected", "hidden", "cell", "input", "memory", "count")
"""What is fetched per direction, each a number per time step back from the last reading; see :class:`Curves`."""

MINIMUM_STEPS = 8
"""Time steps below which nothing is said. Ours: the span compares eighths."""

_POINTS = 64
"""Points of a profile that are kept for drawing."""

_ARRIVES = 1e-3
"""Share of the largest gradient put in at a step from which a step counts as read. Ours."""

_TINY = 1e-38
"""Below this a replay in float32 underflows: spans are followed to 38 decades, and larger ones are given as that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """One direction's curves, each of shape ``[steps]``, at 0, 1, 2, ... steps back from the last reading.

    Attributes:
        injected: L2 norm of what the loss puts in.
        hidden: L2 norm of the loss gradient at the hidden states, over layers and sequences.
        cell: The same at the cell states; NaN without cells.
        input: The same at what the module is given, through this direction.
        memory: Root mean square over sequences of the gradient of the last reading alone, of length 1, at the input.
        count: Sequences that reach so far back.
        tolerance: Share of ``hidden`` below which ``injected`` is rounding.
    """

    injected: FloatArray
    hidden: FloatArray
    cell: FloatArray
    input: FloatArray
    memory: FloatArray
    count: FloatArray
    tolerance: float = 0.0

    @property
    def steps(self) -> int:
        """Steps that some sequence reaches."""
        return int((self.count > 0).sum())

    @property
    def reach(self) -> float:
        """How far back the loss reads outputs, as a share of the steps: 0 for one reading, near 1 for all steps."""
        read = (self.injected > _ARRIVES * self.injected.max()) & (self.injected > self.tolerance * self.hidden)
        where = np.flatnonzero(read[: self.steps])
        return float(where[-1]) / self.steps if where.size else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TemporalNumbers:
    """The numbers of one module; see :data:`gradguard.columns.TEMPORAL_STATISTICS`."""

    span: float
    factor: float
    horizon: float
    steps: int
    reach: float
    profile: TemporalProfile


def summarise(directions: Sequence[Curves], *, scale: float = 1.0) -> TemporalNumbers | None:
    """Return a module's numbers, ``None`` where fewer than eight steps were seen or numbers are not finite.

    Two directions that both read on are judged over half the steps: a bidirectional net sees each input from its nearer
    side. A direction that gets gradient at less than eight steps is passed over.

    Args:
        directions: Curves of the forward direction and, where there is one, of the backward one.
        scale: Factor of a loss scaler, by which gradients of the loss are divided.
    """
    usable = [curves for curves in directions if curves.steps >= MINIMUM_STEPS]
    if not usable:
        return None
    steps = min(curves.steps for curves in usable)
    shown = steps if len(usable) == 1 else -(-steps // 2)
    parts = {name: [getattr(curves, name)[:shown] for curves in usable] for name in CURVES}
    joined = {name: np.sqrt(sum(part**2 for part in values)) for name, values in parts.items()}
    memory = joined["memory"]
    if shown < MINIMUM_STEPS or not np.isfinite(memory).all() or not (memory > 0.0).any():
        return None
    logs = np.log10(np.maximum(memory, _TINY))
    chosen = np.unique(np.linspace(0, shown - 1, min(shown, _POINTS)).round().astype(np.intp))
    within = chosen[memory[chosen] > _TINY]
    followed = within if within.size > 1 else chosen
    profile = TemporalProfile(
        distance=chosen.astype(np.float64),
        injected=joined["injected"][chosen] / scale,
        hidden=joined["hidden"][chosen] / scale,
        cell=joined["cell"][chosen] / scale,
        input=joined["input"][chosen] / scale,
        memory=memory[chosen],
    )
    return TemporalNumbers(
        span=_span(logs),
        factor=10.0 ** _slope(followed.astype(np.float64), logs[followed]),
        horizon=_horizon(logs),
        steps=shown,
        reach=max(curves.reach for curves in usable),
        profile=profile,
    )


def _span(logs: FloatArray) -> float:
    """Return the decades between the farthest and the nearest eighth of the steps; negative where it vanishes."""
    width = max(1, logs.size // 8)
    return float(logs[-width:].mean() - logs[:width].mean())


def _slope(distance: FloatArray, logs: FloatArray) -> float:
    """Return the Theil-Sen slope: the median over all pairs (Theil 1950; Sen 1968, JASA 63)."""
    first, second = np.triu_indices(distance.size, 1)
    return float(np.median((logs[second] - logs[first]) / (distance[second] - distance[first])))


def _horizon(logs: FloatArray) -> float:
    """Return after how many steps the gradient has lost a decade, interpolated; infinity where it never does."""
    below = np.flatnonzero(logs < logs[0] - 1.0)
    if not below.size:
        return math.inf
    index = int(below[0])
    before, after = logs[index - 1], logs[index]
    return float(index - 1 + (before - (logs[0] - 1.0)) / (before - after))
