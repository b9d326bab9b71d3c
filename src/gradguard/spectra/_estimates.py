"""What an estimate says of itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SigmaMax", "SpectralRadius"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SigmaMax:
    """A largest singular value; ``float()`` gives the number.

    Attributes:
        value: The estimate, >= 0; where it is not exact, the largest singular value is at least this, up to rounding.
        residual: ``|A^T A v - value^2 v| / value^2`` of its vector v: a singular value lies within half of that share
            of ``value``. 0 where it is exact.
        certified: Whether the residual is at most the relative error asked for.
        method: ``"exact"``, ``"lanczos"`` or ``"fft"``.
        iterations: Products with the matrix and its transpose that it took; 0 where it is exact.
        vector: The right singular vector, unit norm, to start from next time; ``None`` where it is exact.
    """

    value: float
    residual: float
    certified: bool
    method: str
    iterations: int
    vector: Tensor | None = field(default=None, repr=False, compare=False)

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class SpectralRadius:
    """A largest absolute eigenvalue; ``float()`` gives the number.

    Attributes:
        value: The estimate, >= 0.
        residual: ``|A x - lambda x| / |lambda|`` of the eigenpair that it rests on; 0 where it is exact. For matrices
            far from normal a small residual does not bound the error of the eigenvalue.
        certified: Whether the residual is at most the relative error asked for.
        method: ``"exact"``, ``"arnoldi"`` or ``"growth rate"``.
        iterations: Products with the matrix that it took; 0 where it is exact.
        vector: A vector to start from next time; ``None`` where it is exact.
    """

    value: float
    residual: float
    certified: bool
    method: str
    iterations: int
    vector: Tensor | None = field(default=None, repr=False, compare=False)

    def __float__(self) -> float:
        return self.value
