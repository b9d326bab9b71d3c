"""Extreme singular values of a linear map that is known by its products alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Extremes", "extremes"]

_LEAST = 8
"""Steps before which convergence is not believed, unless the space is closed. Ours: from a random start the residual of
a value that is not the largest can be small for a while."""

_UNLUCKY = 0.0125
"""Share of its expected size below which a random start's part in one direction is called unlucky: 1 start in 100, for
the chance that a standard normal number is smaller than c is at most 0.8 c."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Extremes:
    """What the products told.

    Attributes:
        largest: Largest value found; the true one is no smaller.
        smallest: Smallest value found; the true one, on the smaller side, is no larger.
        floor: The true smallest value is no smaller than this, but for an unlucky start (1 in 100); may be 0.
        rms: Root mean square of the singular values on the smaller side, estimated from the start.
        residual: Distance from ``largest`` within which a singular value lies, as a share of ``largest``.
        closed: Whether the space that the products span was exhausted: then no value is missing.
        iterations: Pairs of products.
    """

    largest: float
    smallest: float
    floor: float
    rms: float
    residual: float
    closed: bool
    iterations: int


def extremes(
    spread: Callable[[Tensor], Tensor],
    gather: Callable[[Tensor], Tensor],
    start: Tensor,
    *,
    rtol: float,
    noise: float,
    max_iterations: int,
) -> Extremes:
    """Return the extreme singular values of a map by Golub-Kahan bidiagonalization.

    It is power iteration that forgets nothing: for the same products its largest value is never worse. The vectors on
    the smaller side are kept and made orthogonal to each other, which is enough for both sides.

    Args:
        spread: Multiplies a vector of the smaller side, shape ``[small]``; returns one of the larger side.
        gather: Multiplies by the transpose, from the larger side to the smaller.
        start: Random vector on the smaller side, shape ``[small]``, not zero.
        rtol: Residual, as a share of the largest value, at which to stop, > 0.
        noise: Share of the largest value that is rounding; what is smaller counts as nothing.
        max_iterations: Pairs of products, at least 1.

    That no value below ``floor`` was missed: the Lanczos polynomial ``p``, whose roots are the squares of the values
    found, sends the start to a vector of length ``b``, the product of all couplings. A direction of the true value
    ``s`` in which the start has the part ``c`` satisfies ``|p(s^2)| c <= b``, so that ``s^2`` lies within
    ``(b / c)^(1/k)`` of one of the ``k`` roots; ``c`` is about ``1 / sqrt(small)``.

    Source:
        Golub, Kahan (1965), "Calculating the singular values and pseudo-inverse of a matrix", SIAM J. Numer. Anal. 2;
        residuals and bounds: Golub, Van Loan (2013), "Matrix Computations", sections 10.1 and 10.4; the step from the
        polynomial to the floor is ours; one-sided reorthogonalization: Simon, Zha (2000), "Low-rank matrix
        approximation using the Lanczos bidiagonalization process", SIAM J. Sci. Comput. 21. That a random start finds
        the largest value: Kuczynski, Wozniakowski (1992), "Estimating the largest eigenvalue by the power and Lanczos
        algorithms with a random start", SIAM J. Matrix Anal. Appl. 13.
    """
    basis = [start / torch.linalg.vector_norm(start)]
    column = spread(basis[0])
    scale = float(torch.linalg.vector_norm(column))
    if scale == 0.0:
        return Extremes(largest=0.0, smallest=0.0, floor=0.0, rms=0.0, residual=0.0, closed=True, iterations=1)
    column = column / scale
    diagonal, beside = [scale], list[float]()
    lost = 0.5 * math.log(start.numel()) - math.log(_UNLUCKY)
    while True:
        rest = gather(column) - diagonal[-1] * basis[-1]
        for _ in range(2):  # twice is enough: Parlett (1998), "The Symmetric Eigenvalue Problem", section 6.9
            for vector in basis:
                rest = rest - torch.dot(vector, rest) * vector
        beta = float(torch.linalg.vector_norm(rest))
        values, ends = _decomposed(diagonal, beside)
        largest, smallest, count = float(values[0]), float(values[-1]), len(diagonal)
        lost += math.log(max(beta * diagonal[-1], 1e-300))
        closed = beta <= noise * largest or count >= start.numel()
        residual = 0.0 if closed else beta * abs(float(ends[0])) / largest
        if closed or count >= max_iterations or (residual <= rtol and count >= _LEAST):
            gap = 0.0 if closed else math.exp(lost / count)
            return Extremes(
                largest=largest,
                smallest=smallest,
                floor=math.sqrt(max(0.0, smallest**2 - gap)),
                rms=scale,
                residual=residual,
                closed=closed,
                iterations=count,
            )
        basis.append(rest / beta)
        column = spread(basis[-1]) - beta * column
        alpha = float(torch.linalg.vector_norm(column))
        alive = alpha > noise * largest
        beside.append(beta)
        diagonal.append(alpha if alive else 0.0)
        column = column / alpha if alive else torch.zeros_like(column)


def _decomposed(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Return the singular values of an upper bidiagonal matrix, falling, and the last entries of its left vectors."""
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    if beside:
        matrix += torch.diag(torch.tensor(beside, dtype=torch.float64), 1)
    left, values, _ = torch.linalg.svd(matrix)
    return values, left[-1]
