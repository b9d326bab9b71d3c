"""What one call of a clipper did."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ClipResult", "Scalar"]

Scalar: TypeAlias = "Tensor | float"
"""A number that may still be on the device."""


class ClipResult:
    """What one call of a clipper did. Read a field and you get a Python number.

    A number that is still on the device is copied to the host when it is read for the first time, and only then: a loop
    that looks at a result every hundredth step stops the device every hundredth step. Norms are L2 norms over every
    gradient of the clipper (the maximum norm with ``norm_type=inf``), on every rank and without the scale of a loss
    scaler.

    Example:
        >>> result = ClipResult(norm_before=torch.tensor(13.0), norm_after=1.0, threshold=1.0, engaged=True)
        >>> result.norm_before, result.engaged
        (13.0, True)
    """

    __slots__ = ("_engaged", "_non_finite", "_norm_after", "_norm_before", "_threshold", "skipped")

    def __init__(
        self,
        *,
        norm_before: Scalar,
        norm_after: Scalar,
        threshold: Scalar,
        engaged: Tensor | bool,
        non_finite: Tensor | bool = False,
        skipped: bool = False,
    ) -> None:
        """Keep the numbers as they come, on the device or on the host."""
        self._norm_before = norm_before
        self._norm_after = norm_after
        self._threshold = threshold
        self._engaged = engaged
        self._non_finite = non_finite
        self.skipped = skipped
        """Whether the gradients were taken away (``.grad = None``): not all finite, or refused by the caller."""

    @property
    def norm_before(self) -> float:
        """Norm of the gradients as they came; NaN or infinite only where a gradient is."""
        self._norm_before = float(self._norm_before)
        return self._norm_before

    @property
    def norm_after(self) -> float:
        """Norm of the gradients as they were left; 0 where the step was skipped."""
        self._norm_after = float(self._norm_after)
        return self._norm_after

    @property
    def threshold(self) -> float:
        """What was clipped at: a global norm, or for ``Value`` an entry's size.

        Infinite while a method is still collecting norms, NaN where each unit or tensor has a threshold of its own.
        """
        self._threshold = float(self._threshold)
        return self._threshold

    @property
    def engaged(self) -> bool:
        """Whether anything was clipped."""
        self._engaged = bool(self._engaged)
        return self._engaged

    @property
    def non_finite(self) -> bool:
        """Whether a gradient was NaN or infinite."""
        self._non_finite = bool(self._non_finite)
        return self._non_finite

    @property
    def on_host(self) -> bool:
        """Whether every number is on the host already, so that reading costs nothing."""
        fields = (self._norm_before, self._norm_after, self._threshold, self._engaged, self._non_finite)
        return not any(isinstance(value, torch.Tensor) for value in fields)

    def to_dict(self) -> dict[str, float | bool]:
        """Return every field as a Python number."""
        return {
            "norm_before": self.norm_before,
            "norm_after": self.norm_after,
            "threshold": self.threshold,
            "engaged": self.engaged,
            "non_finite": self.non_finite,
            "skipped": self.skipped,
        }

    def __repr__(self) -> str:
        return f"ClipResult({', '.join(f'{name}={value!r}' for name, value in self.to_dict().items())})"
