"""Gaussian expectations of activations and the gains that follow from them.

Gauss-Hermite quadrature converges slowly for ReLU and its like, because of the kink. Here the line is cut at kinks, at
unit steps of the Gaussian and at steps over which the function bends; each piece gets a Gauss-Legendre rule of its own.
The tests compare with closed forms (twelve digits) and fine sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import overload

import numpy as np

from gradguard.theory._activations import Activation, FloatArray
from gradguard.theory._lookup import ActivationLike
from gradguard.theory._lookup import activation as lookup

__all__ = ["backward_gain", "forward_gain", "mean", "mean_square", "mean_square_derivative"]

_REACH = 12.0
"""Standard deviations at which integration ends: the Gaussian weight beyond is 1e-32."""
_NODES = 16
"""Gauss-Legendre nodes per piece."""
_SMALLEST, _LARGEST = 1e-100, 1e100
"""Standard deviations that stand for the limits q to 0 and q to infinity; their squares are still finite."""
_DIED, _DIVERGED = 1e-150, 1e150
"""Mean squares in the limits q to 0 and q to infinity, beyond which the limit itself is 0 or infinite."""


@overload
def mean(activation: ActivationLike, q: float) -> float: ...
@overload
def mean(activation: ActivationLike, q: FloatArray) -> FloatArray: ...
def mean(activation: ActivationLike, q: float | FloatArray) -> float | FloatArray:
    """Return ``E[phi(sqrt(q) z)]`` with z standard normal.

    Args:
        activation: See :func:`activation`.
        q: Variance of the pre-activations, a number or an array of numbers, >= 0 and finite; 0 means the limit q to 0.

    Example:
        >>> round(mean("relu", 1.0), 6), round(1 / math.sqrt(2 * math.pi), 6)
        (0.398942, 0.398942)
    """
    known = lookup(activation)
    variance = _variance(q)
    if np.isinf(variance).any():
        raise ValueError(f"q must be finite for a mean, got {q!r}")
    return _plain(_expectation(known, known.function, variance), q)


@overload
def mean_square(activation: ActivationLike, q: float) -> float: ...
@overload
def mean_square(activation: ActivationLike, q: FloatArray) -> FloatArray: ...
def mean_square(activation: ActivationLike, q: float | FloatArray) -> float | FloatArray:
    """Return ``E[phi(sqrt(q) z)^2]`` with z standard normal: the mean square of the activation's output.

    Args:
        activation: See :func:`activation`.
        q: Variance of the pre-activations, a number or an array of numbers, >= 0; 0 and infinity mean the limits.

    Raises:
        ValueError: If ``q`` is negative or NaN.

    Source:
        Poole et al. (2016), "Exponential expressivity in deep neural networks through transient chaos", NeurIPS,
        arXiv 1606.05340. The quadrature is ours.

    Example:
        >>> round(mean_square("tanh", 1.0), 5)
        0.39429
    """
    known = lookup(activation)
    variance = _variance(q)
    square = _expectation(known, lambda x: known.function(x) ** 2, variance)
    square = np.where((variance == 0.0) & (square < _DIED), 0.0, square)
    return _plain(np.where(np.isinf(variance) & (square > _DIVERGED), np.inf, square), q)


@overload
def mean_square_derivative(activation: ActivationLike, q: float) -> float: ...
@overload
def mean_square_derivative(activation: ActivationLike, q: FloatArray) -> FloatArray: ...
def mean_square_derivative(activation: ActivationLike, q: float | FloatArray) -> float | FloatArray:
    """Return ``E[phi'(sqrt(q) z)^2]`` with z standard normal: the factor on the squared gradient through phi.

    Jumps of phi itself (hardshrink, threshold) do not count, as in backpropagation.

    Args:
        activation: See :func:`activation`.
        q: Variance of the pre-activations, a number or an array of numbers, >= 0; 0 and infinity mean the limits.

    Raises:
        ValueError: If ``q`` is negative or NaN.

    Source:
        Schoenholz et al. (2017), "Deep Information Propagation", ICLR, arXiv 1611.01232. The quadrature is ours.

    Example:
        >>> round(mean_square_derivative("sigmoid", 1.0), 5)
        0.04484
    """
    known = lookup(activation)
    return _plain(_expectation(known, lambda x: known.derivative(x) ** 2, _variance(q)), q)


def forward_gain(activation: ActivationLike) -> float:
    """Return ``1 / sqrt(E[phi(z)^2])``: the weight gain that keeps unit variance from one layer to the next.

    Weights of variance ``gain^2 / fan_in`` and no bias then have the fixed point q = 1, stable or not. Infinite where
    phi is 0 for every input.

    Source:
        He et al. (2015), "Delving Deep into Rectifiers", ICCV, arXiv 1502.01852, section 2.2, for ReLU (sqrt 2); the
        same argument for other activations.

    Example:
        >>> [round(forward_gain(name), 3) for name in ("relu", "tanh", "gelu", "sigmoid")]
        [1.414, 1.593, 1.534, 1.846]
    """
    return _inverse_root(mean_square(activation, 1.0))


def backward_gain(activation: ActivationLike) -> float:
    """Return ``1 / sqrt(E[phi'(z)^2])``: the weight gain that keeps the gradient's norm, at unit variance.

    Infinite where phi is constant.

    Source:
        Glorot and Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks", AISTATS,
        section 4.2.1, and He et al. (2015), arXiv 1502.01852, section 2.2; the same argument for other activations.

    Example:
        >>> [round(backward_gain(name), 3) for name in ("relu", "tanh", "gelu", "sigmoid")]
        [1.414, 1.467, 1.481, 4.723]
    """
    return _inverse_root(mean_square_derivative(activation, 1.0))


def _inverse_root(square: float) -> float:
    return 1.0 / math.sqrt(square) if square > 0.0 else math.inf


def _variance(q: float | FloatArray) -> FloatArray:
    variance = np.asarray(q, dtype=np.float64)
    if not (variance >= 0.0).all():  # NaN compares false
        raise ValueError(f"q is a variance and must be at least 0, got {q!r}")
    return variance


def _plain(values: FloatArray, q: float | FloatArray) -> float | FloatArray:
    return values if isinstance(q, np.ndarray) else float(values)


@cache
def _rule() -> tuple[FloatArray, FloatArray]:
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    return nodes, weights


def _expectation(known: Activation, function: Callable[[FloatArray], FloatArray], variance: FloatArray) -> FloatArray:
    """Return ``E[function(sqrt(variance) z)]``, elementwise in ``variance``."""
    deviation = np.clip(np.sqrt(variance), _SMALLEST, _LARGEST)[..., np.newaxis]
    octaves = max(1, math.ceil(math.log2(_REACH * float(deviation.max(initial=_SMALLEST)) / known.scale)))
    bends = known.scale * np.outer([1.0, 1.5], 2.0 ** np.arange(octaves)).ravel()
    inner = np.concatenate([-bends, [0.0], bends, known.kinks]) / deviation
    steps = np.arange(-_REACH, _REACH + 1.0)
    cuts = np.concatenate([np.broadcast_to(steps, (*variance.shape, steps.size)), inner.clip(-_REACH, _REACH)], axis=-1)
    cuts.sort(axis=-1)
    nodes, weights = _rule()
    half = np.diff(cuts)[..., np.newaxis] / 2.0
    z = cuts[..., :-1, np.newaxis] + half * (1.0 + nodes)
    density = half * weights * np.exp(-0.5 * z**2)  # normalized by its own sum, so that constants come out exactly
    total = (density * function(deviation[..., np.newaxis] * z)).sum(axis=(-2, -1))
    return np.asarray(total / density.sum(axis=(-2, -1)))
