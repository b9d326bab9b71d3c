"""Clipping all gradients together at a threshold from the norms of the run, which are kept on the host."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Unpack

from gradguard.remedies.clipping._arguments import check_count, check_fraction, check_threshold
from gradguard.remedies.clipping._base import Clipped, Clipper, Measured, Options
from gradguard.remedies.clipping._gradients import Parameters
from gradguard.remedies.clipping._methods import to_norm_
from gradguard.remedies.clipping.thresholds import Percentile, RobustWindow, zclip_norm

__all__ = ["Adaptive", "AutoClip", "ZClip"]


class _History(Clipper):
    """A clipper whose global threshold comes from the norms of the run, which are kept on the host."""

    _on_host = True

    def _clip(self, measured: Measured) -> Clipped:
        norm = float(measured.total)
        return to_norm_(measured, self._threshold(norm, learn=bool(measured.learn)))

    def _threshold(self, norm: float, *, learn: bool) -> float:
        """Return the threshold for a norm, which enters the history if ``learn``."""
        raise NotImplementedError


class AutoClip(_History):
    """Clip at a percentile of all norms so far, the present one included.

    At the paper's 10th percentile nine steps in ten are clipped: the gradient is normalised. Norms of 0 do not enter.

    Source: Seetharaman, Wichern, Pardo, Le Roux (2020), "AutoClip: Adaptive Gradient Clipping for Source Separation
    Networks", IEEE MLSP, arXiv 2007.14469. The bound on the history is ours; the paper keeps everything.
    """

    def __init__(
        self,
        parameters: Parameters,
        percentile: float = 10.0,
        *,
        history_size: int | None = 10_000,
        **options: Unpack[Options],
    ) -> None:
        """Take what is to be clipped.

        Args:
            parameters: A module, parameters, or (name, parameter) pairs.
            percentile: Percentile of the norms to clip at, 0 to 100.
            history_size: Newest norms to take it from, at least 1; ``None`` for all, as in the paper.
            **options: ``scaler``, ``non_finite`` and ``optimizer``, see :class:`Clipper`.

        Raises:
            TypeError: If a number is none.
            ValueError: If it is out of range.
        """
        super().__init__(parameters, **options)
        self.percentile = check_fraction("percentile", percentile, low=0.0, high=100.0)
        capacity = None if history_size is None else check_count("history_size", history_size, low=1)
        self._norms = Percentile(self.percentile, capacity=capacity)

    @property
    def norm_limit(self) -> float:
        """Global norm at the percentile so far, infinite before the first."""
        return self._norms.value()

    def _threshold(self, norm: float, *, learn: bool) -> float:
        if learn and norm > 0.0:
            self._norms.add(norm)
        return self._norms.value()

    def _state(self) -> dict[str, Any]:
        return {"norms": self._norms.norms()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._norms.replace(float(norm) for norm in state["norms"])


class ZClip(_History):
    """Clip norms that lie far above their moving average, the harder the farther they lie.

    Norms are taken as normally distributed, which they are not: of 1000 healthy steps with log-normal norms 2 to 15 are
    clipped (docs/clipping.md). Clipped norms enter the average, so that it lags where norms rise for good.

    Source: Kumar, Owen, Roy Chowdhury, Gura (2025), "ZClip: Adaptive Spike Mitigation for LLM Pre-Training",
    arXiv 2504.02507, also for all defaults; numbers as in the authors' package ``zclip``.
    """

    def __init__(
        self,
        parameters: Parameters,
        alpha: float = 0.97,
        z_threshold: float = 2.5,
        warmup_steps: int = 25,
        max_norm: float | None = 1.0,
        **options: Unpack[Options],
    ) -> None:
        """Take what is to be clipped.

        Args:
            parameters: A module, parameters, or (name, parameter) pairs.
            alpha: Share of the old average that is kept at each step, 0 to 1.
            z_threshold: Standard deviations above the average at which clipping begins, above 0.
            warmup_steps: Norms that the first average is taken from, at least 1.
            max_norm: Norm that is never exceeded, also during warmup; ``None`` for no such bound.
            **options: ``scaler``, ``non_finite`` and ``optimizer``, see :class:`Clipper`.

        Raises:
            TypeError: If a number is none.
            ValueError: If it is out of range.
        """
        super().__init__(parameters, **options)
        self.alpha = check_fraction("alpha", alpha, low=0.0, high=1.0)
        self.z_threshold = check_threshold("z_threshold", z_threshold)
        self.warmup_steps = check_count("warmup_steps", warmup_steps, low=1)
        self.max_norm = math.inf if max_norm is None else check_threshold("max_norm", max_norm, infinite=True)
        self._waiting: list[float] = []
        self._mean = math.nan
        self._variance = math.nan

    @property
    def mean(self) -> float:
        """Moving average of the norms, NaN during warmup."""
        return self._mean

    @property
    def deviation(self) -> float:
        """Moving standard deviation of the norms, NaN during warmup."""
        return math.sqrt(self._variance)

    @property
    def norm_limit(self) -> float:
        """Global norm above which the next step is clipped, infinite where nothing bounds it yet."""
        if math.isnan(self._mean):
            return self.max_norm
        return min(self._mean + self.z_threshold * (self.deviation + 1e-6), self.max_norm)

    def _threshold(self, norm: float, *, learn: bool) -> float:
        limit = self.norm_limit
        if math.isnan(self._mean):
            if learn:
                self._warm_up(norm)
            return limit
        left = zclip_norm(norm, mean=self._mean, variance=self._variance, z_threshold=self.z_threshold)
        if learn:
            self._mean = self.alpha * self._mean + (1.0 - self.alpha) * left
            self._variance = self.alpha * self._variance + (1.0 - self.alpha) * (left - self._mean) ** 2
        return min(left, self.max_norm) if left < norm else limit

    def _warm_up(self, norm: float) -> None:
        self._waiting.append(norm)
        if len(self._waiting) < self.warmup_steps:
            return
        self._mean = sum(self._waiting) / len(self._waiting)
        self._variance = sum((known - self._mean) ** 2 for known in self._waiting) / len(self._waiting)
        self._waiting = []

    def _state(self) -> dict[str, Any]:
        return {"mean": self._mean, "variance": self._variance, "warmup_norms": list(self._waiting)}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._mean, self._variance = float(state["mean"]), float(state["variance"])
        self._waiting = [float(norm) for norm in state["warmup_norms"]]


class Adaptive(_History):
    """The default: clip outliers of the run's own norms, with no threshold to choose.

    The threshold is ``exp(m + max(3 s, ln 2))``, with median m and robust deviation s of the log norms of the newest
    steps: never below twice the median, so that an even run is not clipped at all. Norms enter as they came, so that
    it follows a run whose norms rise for good, within half a window; spikes do not move a median. The present norm
    is judged by those before it. Norms of 0 do not enter.

    Source: ours, see :func:`gradguard.suggestions.robust_threshold`; docs/clipping.md has the measurements.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(1))
        >>> clipper = Adaptive([weight])
        >>> for norm in [1.0] * 30 + [100.0]:
        ...     weight.grad = torch.tensor([norm])
        ...     result = clipper.step()
        >>> result.norm_before, result.threshold, round(result.norm_after, 3)
        (100.0, 2.0, 2.0)
    """

    def __init__(
        self,
        parameters: Parameters,
        *,
        window: int = 64,
        warmup_steps: int = 20,
        max_norm: float | None = None,
        **options: Unpack[Options],
    ) -> None:
        """Take what is to be clipped.

        Args:
            parameters: A module, parameters, or (name, parameter) pairs.
            window: Newest norms that the threshold is taken from, at least ``warmup_steps``.
            warmup_steps: Norms before which only ``max_norm`` bounds anything, at least 2.
            max_norm: Norm that is never exceeded, from the first step on; ``None`` for no such bound.
            **options: ``scaler``, ``non_finite`` and ``optimizer``, see :class:`Clipper`.

        Raises:
            TypeError: If a number is none.
            ValueError: If it is out of range.
        """
        super().__init__(parameters, **options)
        self.warmup_steps = check_count("warmup_steps", warmup_steps, low=2)
        self.window = check_count("window", window, low=self.warmup_steps)
        self.max_norm = math.inf if max_norm is None else check_threshold("max_norm", max_norm, infinite=True)
        self._norms = RobustWindow(self.window, warmup=self.warmup_steps)

    @property
    def norm_limit(self) -> float:
        """Global norm above which the next step is clipped, infinite where nothing bounds it yet."""
        return min(self._norms.value(), self.max_norm)

    def _threshold(self, norm: float, *, learn: bool) -> float:
        limit = self.norm_limit
        if learn:
            self._norms.add(norm)
        return limit

    def _state(self) -> dict[str, Any]:
        return {"norms": self._norms.norms()}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._norms.replace(float(norm) for norm in state["norms"])
