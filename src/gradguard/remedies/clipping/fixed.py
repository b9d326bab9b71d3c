"""Clipping at a fixed threshold, by norm or by value."""

from __future__ import annotations

import math
from typing import Unpack

from gradguard.remedies.clipping._arguments import check_norm_type, check_threshold
from gradguard.remedies.clipping._base import Clipped, Clipper, Measured, Options
from gradguard.remedies.clipping._gradients import Parameters
from gradguard.remedies.clipping._methods import to_norm_, to_value_

__all__ = ["Norm", "Value"]


class Norm(Clipper):
    """Scale all gradients together so that their norm is at most ``max_norm``. The direction stays.

    Source: Pascanu, Mikolov, Bengio (2013), "On the difficulty of training recurrent neural networks", ICML,
    arXiv 1211.5063, algorithm 1; ``guard.suggest_clip()`` proposes a threshold from a run's own norms.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clipper = Norm([weight], max_norm=1.0)
        >>> result = clipper.step()
        >>> result.norm_before, round(result.norm_after, 4), result.engaged
        (5.0, 1.0, True)
    """

    def __init__(
        self, parameters: Parameters, max_norm: float, *, norm_type: float = 2.0, **options: Unpack[Options]
    ) -> None:
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

    def __init__(self, parameters: Parameters, clip_value: float, **options: Unpack[Options]) -> None:
        """Take what is to be clipped, and the largest entry to leave, above 0.

        Raises:
            TypeError: If ``clip_value`` is no number.
            ValueError: If it is 0, negative, infinite or NaN.
        """
        super().__init__(parameters, **options)
        self.clip_value = check_threshold("clip_value", clip_value)

    def _clip(self, measured: Measured) -> Clipped:
        return to_value_(measured, self.clip_value)
