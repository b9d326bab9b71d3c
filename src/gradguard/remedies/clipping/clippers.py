"""The clippers: one class per method, all with the interface of :class:`Clipper`."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from gradguard.remedies.clipping._arguments import check_count, check_fraction, check_norm_type, check_threshold
from gradguard.remedies.clipping._base import Clipped, Clipper, Measured
from gradguard.remedies.clipping._gradients import Gradient, Parameters
from gradguard.remedies.clipping._methods import scale_tensors_, to_norm_, to_value_, true_size
from gradguard.remedies.clipping._units import all_zero, clip_units_
from gradguard.remedies.clipping.thresholds import Percentile, RobustWindow, zclip_norm

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AGC", "AdaGC", "Adaptive", "AutoClip", "Norm", "Value", "ZClip"]


class Norm(Clipper):
    """Scale all gradients together so that their norm is at most ``max_norm``. The direction stays.

    Source: Pascanu, Mikolov, Bengio (2013), "On the difficulty of training recurrent neural networks", ICML,
    arXiv 1211.5063, algorithm 1; ``guard.suggest_clip()`` proposes a threshold from a run's own norms.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper = Norm([weight], max_norm=1.0)
        >>> result = clipper.step()
        >>> result.norm_before, round(result.norm_after, 4), result.engaged
        (5.0, 1.0, True)
    """

    def __init__(self, parameters: Parameters, max_norm: float, *, norm_type: float = 2.0, **options: Any) -> None:
        """Take what is to be clipped, and the threshold.

        Args:
            parameters: A module, parameters, or (name, parameter) pairs.
            max_norm: Largest norm to leave, above 0; ``math.inf`` measures without clipping.
            norm_type: 2, or ``math.inf`` for the largest entry.
            **options: ``scaler``, ``non_finite`` and ``optimizer``, see :class:`Clipper`.

        Raises:
            TypeError: If a threshold is no number.
            ValueError: If it is 0, negative or NaN.
        """
        super().__init__(parameters, **options)
        self.max_norm = check_threshold("max_norm", max_norm, infinite=True)
        self._norm_type = check_norm_type(norm_type)

    @property
    def norm_limit(self) -> float:
        """Global norm above which a step is clipped."""
        return self.max_norm if self._norm_type == 2.0 else math.nan

    def _clip(self, measured: Measured) -> Clipped:
        return to_norm_(measured, self.max_norm)


class Value(Clipper):
    """Cut every entry to the range from ``-clip_value`` to ``clip_value``. This turns the gradient's direction.

    Source: ``torch.nn.utils.clip_grad_value_``.
    """

    def __init__(self, parameters: Parameters, clip_value: float, **options: Any) -> None:
        """Take what is to be clipped, and the largest entry to leave, above 0.

        Raises:
            TypeError: If ``clip_value`` is no number.
            ValueError: If it is 0, negative, infinite or NaN.
        """
        super().__init__(parameters, **options)
        self.clip_value = check_threshold("clip_value", clip_value)

    def _clip(self, measured: Measured) -> Clipped:
        return to_value_(measured, self.clip_value)


class AGC(Clipper):
    """Adaptive gradient clipping: bound each unit's gradient norm by a share of its weight norm.

    A unit is a row of a weight (the weights of one output), all of a vector, or a scalar. The paper leaves the final
    linear layer out: ``AGC(model, exclude=["head.*"])``.

    A parameter whose entries are all zero when the clipper first sees it is left alone for good: zero-initialised gates,
    norm scales and adapters would be held to a gradient norm of ``clip_factor * eps`` (1e-5), which under SGD keeps them
    at zero. ``parity="timm"`` clips them too, and gives timm's numbers bit for bit.

    Source: Brock, De, Smith, Simonyan (2021), "High-Performance Large-Scale Image Recognition Without Normalization",
    ICML, arXiv 2102.06171, section 4, equation 3, also for both defaults. The exemption is ours.
    """

    def __init__(
        self,
        parameters: Parameters,
        clip_factor: float = 0.01,
        eps: float = 1e-3,
        *,
        exclude: Iterable[str] = (),
        parity: str | None = None,
        **options: Any,
    ) -> None:
        """Take what is to be clipped.

        Args:
            parameters: A module, parameters, or (name, parameter) pairs.
            clip_factor: Largest ratio of gradient norm to weight norm, above 0. 0.01 is for batches of 4096; smaller
                batches bear more.
            eps: Least weight norm to count with, above 0.
            exclude: Names of parameters to leave alone; ``*`` and ``?`` stand for any text and any character.
            parity: ``"timm"`` for timm's numbers, ``None`` for ours.
            **options: ``scaler``, ``non_finite`` and ``optimizer``, see :class:`Clipper`.

        Raises:
            TypeError: If a number is none.
            ValueError: If it is out of range, or nothing bears an excluded name.
        """
        super().__init__(parameters, **options)
        self.clip_factor = check_threshold("clip_factor", clip_factor)
        self.eps = check_threshold("eps", eps)
        if parity not in (None, "timm"):
            raise ValueError(f"parity must be None or 'timm', got {parity!r}")
        self._timm = parity == "timm"
        self._exclude = (exclude,) if isinstance(exclude, str) else tuple(exclude)
        self._exempt: dict[str, Tensor] = {}
        self._check_exclude()

    def _clip(self, measured: Measured) -> Clipped:
        chosen = [g for g in measured.gradients if not self._excluded(g.name)]
        if not self._timm:
            self._look_for_zeros([g for g in chosen if g.name not in self._exempt])
        return clip_units_(
            measured, chosen, clip_factor=self.clip_factor, eps=self.eps, exempt=self._exempt, timm=self._timm
        )

    def _look_for_zeros(self, new: list[Gradient]) -> None:
        for gradient, zero in zip(new, all_zero(new), strict=True):
            self._exempt[gradient.name] = zero

    def _excluded(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._exclude)

    def _check_exclude(self) -> None:
        names = [name for name, _ in self._targets.pairs()]
        if self._exclude and not self._targets.named:
            raise ValueError(
                f"exclude={list(self._exclude)!r} needs names, and the parameters came without. Pass the model or "
                "model.named_parameters()"
            )
        for pattern in self._exclude:
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"exclude names {pattern!r}, and no parameter is called so. Known are {', '.join(names[:5])}, ..."
                )

    def _state(self) -> dict[str, Any]:
        return {"zero_initialized": {name: bool(zero) for name, zero in self._exempt.items()}}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._exempt = {name: torch.tensor(bool(zero)) for name, zero in state["zero_initialized"].items()}


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
        self, parameters: Parameters, percentile: float = 10.0, *, history_size: int | None = 10_000, **options: Any
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

    Norms are taken as normally distributed, which they are not: on log-normal norms 1 to 4 steps in 100 are clipped
    without a spike. Clipped norms enter the average, so that it lags where norms rise for good.

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
        **options: Any,
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
        **options: Any,
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


class AdaGC(Clipper):
    """Clip each tensor at a multiple of the moving average of its own clipped norm.

    During warmup all gradients are clipped together at ``max_norm``, and each tensor's average starts from its least
    clipped norm. An average grows by at most 0.1 % per step at the defaults: a tensor whose norm rises for good is held
    back for hundreds of steps. A gradient of 0 does not enter, where the paper's rule would freeze the tensor for ever;
    a tensor whose first gradient comes after warmup starts there, clipped at ``max_norm`` by itself.

    Source: Wang et al. (2025), "AdaGC: Improving Training Stability for Large Language Model Pretraining",
    arXiv 2502.11034, also for all defaults; what becomes of gradients of 0 is ours.
    """

    def __init__(
        self,
        parameters: Parameters,
        ratio: float = 1.05,
        beta: float = 0.98,
        warmup_steps: int = 100,
        max_norm: float = 1.0,
        **options: Any,
    ) -> None:
        """Take what is to be clipped.

        Args:
            parameters: A module, parameters, or (name, parameter) pairs.
            ratio: Largest ratio of a tensor's norm to its average, above 0.
            beta: Share of the old average that is kept at each step, 0 to 1.
            warmup_steps: Steps clipped together, at least 1.
            max_norm: Norm of all gradients during these, above 0.
            **options: ``scaler``, ``non_finite`` and ``optimizer``, see :class:`Clipper`.

        Raises:
            TypeError: If a number is none.
            ValueError: If it is out of range.
        """
        super().__init__(parameters, **options)
        self.ratio = check_threshold("ratio", ratio)
        self.beta = check_fraction("beta", beta, low=0.0, high=1.0)
        self.warmup_steps = check_count("warmup_steps", warmup_steps, low=1)
        self.max_norm = check_threshold("max_norm", max_norm)
        self._averages: dict[str, Tensor] = {}

    @property
    def averages(self) -> dict[str, float]:
        """Moving average of each tensor's clipped norm, by name; infinite where no gradient but 0 has come yet."""
        names = list(self._averages)
        return dict(zip(names, torch.stack(list(self._averages.values())).tolist(), strict=True)) if names else {}

    def _clip(self, measured: Measured) -> Clipped:
        norms = true_size(measured, measured.norms.each)
        old = torch.stack([self._average(gradient.name, norms) for gradient in measured.gradients])
        if self.steps <= self.warmup_steps:
            clipped = to_norm_(measured, self.max_norm)
            total = true_size(measured, measured.norms.total)
            factor = torch.where(total > self.max_norm, self.max_norm / (total + 1e-6), 1.0)
            new = torch.minimum(old, norms * factor)
        else:
            fresh = torch.isinf(old)
            limits = torch.where(fresh, self.max_norm, self.ratio * old)
            factors = torch.where((norms > limits) & measured.finite, limits / norms, 1.0)
            clipped = scale_tensors_(measured, factors)
            left = norms * factors
            new = torch.where(fresh, left, self.beta * old + (1.0 - self.beta) * left)
        learn = (norms > 0) & measured.finite & measured.learn
        for gradient, average in zip(measured.gradients, torch.where(learn, new, old).unbind(), strict=True):
            self._averages[gradient.name] = average
        return clipped

    def _average(self, name: str, norms: Tensor) -> Tensor:
        average = self._averages.get(name)
        return norms.new_full((), math.inf) if average is None else average.to(norms)

    def _state(self) -> dict[str, Any]:
        return {"averages": self.averages}

    def _load(self, state: Mapping[str, Any]) -> None:
        self._averages = {name: torch.tensor(float(value)) for name, value in state["averages"].items()}
