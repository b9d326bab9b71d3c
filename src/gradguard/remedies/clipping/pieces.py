"""Clipping with a threshold for each unit or tensor."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Unpack

import torch

from gradguard.remedies.clipping._arguments import check_count, check_fraction, check_threshold
from gradguard.remedies.clipping._base import Clipped, Clipper, Measured, Options
from gradguard.remedies.clipping._gradients import Gradient, Parameters
from gradguard.remedies.clipping._methods import scale_tensors_, to_norm_, true_size
from gradguard.remedies.clipping._units import all_zero, clip_units_

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["AGC", "AdaGC"]


class AGC(Clipper):
    """Adaptive gradient clipping: bound each unit's gradient norm by a share of its weight norm.

    A unit is a row of a weight (the weights of one output), all of a vector, or a scalar. The paper leaves the final
    linear layer out: ``AGC(model, exclude=["head.*"])``.

    A parameter whose entries are all zero when the clipper first sees it is left alone for good: zero-initialised
    gates, norm scales and adapters would be held to a gradient norm of ``clip_factor * eps`` (1e-5), which under SGD
    keeps them at zero. ``parity="timm"`` clips them too, and gives timm's numbers bit for bit.

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
        **options: Unpack[Options],
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
        **options: Unpack[Options],
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
