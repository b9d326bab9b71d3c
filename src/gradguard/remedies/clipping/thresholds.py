"""Thresholds that follow the norms of a run: arithmetic on plain numbers."""

from __future__ import annotations

import bisect
import math
from collections import deque
from collections.abc import Iterable

from gradguard.suggestions import robust_threshold

__all__ = ["Percentile", "RobustWindow", "zclip_norm"]


class Percentile:
    """A percentile of the newest norms, kept sorted: adding one costs a search, not a sort.

    Example:
        >>> history = Percentile(10.0, capacity=None)
        >>> for norm in range(1, 11):
        ...     history.add(float(norm))
        >>> round(history.value(), 12)
        1.9
    """

    def __init__(self, percentile: float, *, capacity: int | None) -> None:
        """Start empty.

        Args:
            percentile: 0 to 100.
            capacity: Norms kept, the oldest going first; ``None`` for all.
        """
        self._share = percentile / 100.0
        self._norms: deque[float] = deque(maxlen=capacity)
        self._sorted: list[float] = []

    def add(self, norm: float) -> None:
        """Take a finite norm."""
        if self._norms.maxlen is not None and len(self._norms) == self._norms.maxlen:
            del self._sorted[bisect.bisect_left(self._sorted, self._norms[0])]
        self._norms.append(norm)
        bisect.insort(self._sorted, norm)

    def value(self) -> float:
        """Return the percentile, interpolated linearly as numpy does; infinite while empty."""
        if not self._sorted:
            return math.inf
        position = self._share * (len(self._sorted) - 1)
        low = min(int(position), len(self._sorted) - 1)
        high = min(low + 1, len(self._sorted) - 1)
        return self._sorted[low] + (self._sorted[high] - self._sorted[low]) * (position - low)

    def norms(self) -> list[float]:
        """Return the norms, oldest first."""
        return list(self._norms)

    def replace(self, norms: Iterable[float]) -> None:
        """Forget everything and take these, oldest first."""
        self._norms.clear()
        self._norms.extend(norms)
        self._sorted = sorted(self._norms)


class RobustWindow:
    """The robust threshold of :func:`gradguard.suggestions.robust_threshold` over the newest norms.

    Example:
        >>> window = RobustWindow(64, warmup=3)
        >>> for norm in (1.0, 1.0, 1.0):
        ...     window.add(norm)
        >>> window.value()
        2.0
    """

    def __init__(self, size: int, *, warmup: int) -> None:
        """Start empty.

        Args:
            size: Norms kept.
            warmup: Norms before which there is no threshold.
        """
        self._norms: deque[float] = deque(maxlen=size)
        self._warmup = warmup

    def add(self, norm: float) -> None:
        """Take a finite norm; 0 says nothing of a scale and is left out."""
        if norm > 0.0:
            self._norms.append(norm)

    def value(self) -> float:
        """Return the threshold, infinite before the warmup is over."""
        return math.inf if len(self._norms) < self._warmup else robust_threshold(list(self._norms))

    def norms(self) -> list[float]:
        """Return the norms, oldest first."""
        return list(self._norms)

    def replace(self, norms: Iterable[float]) -> None:
        """Forget everything and take these, oldest first."""
        self._norms.clear()
        self._norms.extend(norms)


def zclip_norm(norm: float, *, mean: float, variance: float, z_threshold: float) -> float:
    """Return the norm that ZClip leaves of ``norm``: the larger the spike, the closer to the mean.

    With z the distance from the mean in standard deviations: the norm itself up to ``z_threshold``, and beyond it
    ``mean + z_threshold * deviation / (z / z_threshold)``.

    Source: Kumar, Owen, Roy Chowdhury, Gura (2025), "ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
    arXiv 2504.02507; the 1e-6 beside the deviation is that of the authors' package.

    Example:
        >>> round(zclip_norm(2.0, mean=1.0, variance=0.005, z_threshold=2.5), 5)
        1.03125
    """
    deviation = math.sqrt(variance)
    z = (norm - mean) / (deviation + 1e-6)
    return mean + z_threshold * deviation / (z / z_threshold) if z > z_threshold else norm
