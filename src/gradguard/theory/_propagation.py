"""How signals and gradients scale from layer to layer in wide random networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, overload

import numpy as np

from gradguard.theory._activations import Activation, FloatArray
from gradguard.theory._expectations import mean, mean_square, mean_square_derivative
from gradguard.theory._lookup import ActivationLike
from gradguard.theory._lookup import activation as lookup

__all__ = [
    "PYTORCH_DEFAULT_SIGMA_W",
    "chi",
    "critical_gain",
    "depth_scale",
    "fixed_point",
    "gain_per_layer",
    "length_map",
    "normalized_chi",
]

PYTORCH_DEFAULT_SIGMA_W = math.sqrt(1.0 / 3.0)
"""``sigma_w`` of PyTorch's default initialization of Linear and Conv layers, 0.577.

``kaiming_uniform_(weight, a=sqrt(5))`` draws from ``U(-b, b)`` with ``b = sqrt(6 / ((1 + 5) fan_in))``, whose variance
is ``b^2 / 3 = 1 / (3 fan_in)``. Source: ``torch/nn/modules/linear.py`` and ``conv.py``, ``reset_parameters``.
"""

_ROUNDING = 1e-13
"""Relative difference below which two variances count as equal; the quadrature's own error is about 1e-15."""
_OCTAVES = 60
"""Factors of two over which a fixed point is looked for on either side: 1e-18 counts as 0, 1e18 as divergence."""
_BISECTIONS = 52
_CLEAR = 1e-10
"""Distance from 1 at which chi counts as above or below it; homogeneous activations differ from 1 by rounding only."""
_BESIDE = 1e-6
"""Relative distance from a critical gain at which chi has to lie on its side of 1."""


@overload
def length_map(activation: ActivationLike, q: float, *, sigma_w: float, sigma_b: float = 0.0) -> float: ...
@overload
def length_map(activation: ActivationLike, q: FloatArray, *, sigma_w: float, sigma_b: float = 0.0) -> FloatArray: ...
def length_map(
    activation: ActivationLike, q: float | FloatArray, *, sigma_w: float, sigma_b: float = 0.0
) -> float | FloatArray:
    """Return the next layer's pre-activation variance, ``sigma_w^2 E[phi(sqrt(q) z)^2] + sigma_b^2``.

    Args:
        activation: See :func:`activation`.
        q: Variance of this layer's pre-activations, a number or an array of numbers, >= 0.
        sigma_w: Standard deviation of the weights times ``sqrt(fan_in)``, >= 0; torch's ``gain`` in fan-in mode.
        sigma_b: Standard deviation of the biases, >= 0.

    Raises:
        ValueError: If a variance or standard deviation is negative or not a number.

    Source:
        Poole et al. (2016), "Exponential expressivity in deep neural networks through transient chaos", NeurIPS, arXiv
        1606.05340: the iterative length map.

    Example:
        >>> round(length_map("relu", 1.0, sigma_w=math.sqrt(2.0)), 12)
        1.0
    """
    _check_deviations(sigma_w=sigma_w, sigma_b=sigma_b)
    return sigma_w**2 * mean_square(activation, q) + sigma_b**2


def fixed_point(activation: ActivationLike, *, sigma_w: float, sigma_b: float = 0.0, start: float = 1.0) -> float:
    """Return the variance q* that pre-activations approach with depth, from the variance ``start``.

    It is the first solution of ``length_map(q) = q`` that lies on the way from ``start``. Where the length map falls
    with q (possible for ``threshold`` only) layers may oscillate around it instead.

    Args:
        activation: See :func:`activation`.
        sigma_w: Standard deviation of the weights times ``sqrt(fan_in)``, >= 0.
        sigma_b: Standard deviation of the biases, >= 0.
        start: Variance of the first layer's pre-activations, > 0. It matters for activations with two basins: below
            their forward gain GELU, SiLU and Mish lose a signal of variance 1, above it they enlarge it for ever.

    Returns:
        q* > 0; or ``0.0`` where the signal dies out, however slowly (tanh at ``sigma_w = 1`` falls like 1 / depth); or
        ``inf`` where it grows without bound. ``start`` itself where every variance is kept (ReLU at sqrt 2).

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Poole et al. (2016), NeurIPS, arXiv 1606.05340: fixed points of the length map. The search is ours.

    Example:
        >>> round(fixed_point("tanh", sigma_w=5 / 3), 3)
        1.178
        >>> fixed_point("tanh", sigma_w=1.0), fixed_point("relu", sigma_w=2.0)
        (0.0, inf)
    """
    known = lookup(activation)
    _check_deviations(sigma_w=sigma_w, sigma_b=sigma_b)
    if not 0.0 < start < math.inf:
        raise ValueError(f"start is a variance and must be positive and finite, got {start!r}")

    def growth(q: float) -> float:
        return length_map(known, q, sigma_w=sigma_w, sigma_b=sigma_b) / q - 1.0

    first = growth(start)
    if abs(first) <= _ROUNDING:
        return start
    direction = math.copysign(1.0, first)
    near = start
    for octave in range(1, _OCTAVES + 1):
        far = start * 2.0 ** (direction * octave)
        if direction * growth(far) < -_ROUNDING:
            return _bisect(lambda q: direction * growth(q), near, far)
        near = far
    return math.inf if direction > 0.0 else 0.0


def chi(activation: ActivationLike, *, sigma_w: float, sigma_b: float = 0.0, q: float | None = None) -> float:
    """Return the factor on the squared gradient norm per layer, ``sigma_w^2 E[phi'(sqrt(q) z)^2]``.

    Below 1 gradients vanish with depth (ordered phase), above 1 they explode (chaotic phase). It holds for the L2 norm
    of the loss gradient at the pre-activations, in expectation over random weights, whatever the layers' widths.

    Args:
        activation: See :func:`activation`.
        sigma_w: Standard deviation of the weights times ``sqrt(fan_in)``, >= 0.
        sigma_b: Standard deviation of the biases, >= 0; it acts through the fixed point only.
        q: Variance of the pre-activations, >= 0, for instance a measured one; ``None`` takes :func:`fixed_point`, and
            its limit where the signal dies out or diverges.

    Raises:
        ValueError: If an argument is out of range.

    Source:
        Schoenholz et al. (2017), "Deep Information Propagation", ICLR, arXiv 1611.01232, section 4.

    Example:
        >>> round(chi("sigmoid", sigma_w=1.0), 4)
        0.0557
        >>> round(chi("relu", sigma_w=PYTORCH_DEFAULT_SIGMA_W), 4)
        0.1667
    """
    known = lookup(activation)
    _check_deviations(sigma_w=sigma_w, sigma_b=sigma_b)
    variance = fixed_point(known, sigma_w=sigma_w, sigma_b=sigma_b) if q is None else q
    return sigma_w**2 * mean_square_derivative(known, variance)


def gain_per_layer(
    activation: ActivationLike, *, sigma_w: float, sigma_b: float = 0.0, q: float | None = None
) -> float:
    """Return the factor on the gradient's L2 norm per layer, ``sqrt(chi)``; arguments as for :func:`chi`.

    Example:
        >>> round(gain_per_layer("tanh", sigma_w=5 / 3), 3)
        1.1
        >>> round(gain_per_layer("relu", sigma_w=PYTORCH_DEFAULT_SIGMA_W), 3)
        0.408
    """
    return math.sqrt(chi(activation, sigma_w=sigma_w, sigma_b=sigma_b, q=q))


def normalized_chi(activation: ActivationLike, *, normalization: Literal["batch", "layer"]) -> float:
    """Return chi of a stack of weights, normalization and activation, whatever the weights' scale.

    Normalization sets q = 1 and divides the gradient by the deviation that it removed, so ``sigma_w`` cancels. Layer
    norm divides by the root mean square, batch norm by the deviation between examples, from which the mean of phi,
    common to all of them, is missing::

        layer norm:  chi = E[phi'(z)^2] / E[phi(z)^2]
        batch norm:  chi = E[phi'(z)^2] / (E[phi(z)^2] - E[phi(z)]^2)

    Both hold for wide layers, without skip connections; batch norm's for large batches, too. With batch norm chi is at
    least 1 for every continuous phi, by the Gaussian Poincare inequality, and 1 for the identity only.

    Args:
        activation: See :func:`activation`.
        normalization: ``"batch"`` or ``"layer"``, just before the activation, at its initial scale 1 and shift 0.

    Raises:
        ValueError: If ``normalization`` is neither.

    Source:
        Yang et al. (2019), "A Mean Field Theory of Batch Normalization", ICLR, arXiv 1902.08129: pi / (pi - 1) for ReLU
        and batch norm. The short forms for any activation are ours; the tests measure them.

    Example:
        >>> round(normalized_chi("relu", normalization="batch"), 3), round(math.pi / (math.pi - 1), 3)
        (1.467, 1.467)
        >>> round(normalized_chi("relu", normalization="layer"), 12)
        1.0
    """
    if normalization not in {"batch", "layer"}:
        raise ValueError(f"normalization must be 'batch' or 'layer', got {normalization!r}")
    known = lookup(activation)
    spread = mean_square(known, 1.0) - (mean(known, 1.0) ** 2 if normalization == "batch" else 0.0)
    return mean_square_derivative(known, 1.0) / spread


def depth_scale(chi: float) -> float:
    """Return ``1 / |ln chi|``, the layers over which a squared gradient norm changes by the factor e; inf at chi = 1.

    Args:
        chi: Factor on the squared gradient norm per layer, >= 0; 0 and infinity give a depth scale of 0.

    Raises:
        ValueError: If ``chi`` is negative or NaN.

    Source:
        Schoenholz et al. (2017), "Deep Information Propagation", ICLR, arXiv 1611.01232, section 4.

    Example:
        >>> round(depth_scale(1 / 6), 3)
        0.558
        >>> depth_scale(1.0)
        inf
    """
    if not chi >= 0.0:
        raise ValueError(f"chi is a factor on squared norms and must be at least 0, got {chi!r}")
    if chi == 1.0:
        return math.inf
    return 0.0 if chi in {0.0, math.inf} else 1.0 / abs(math.log(chi))


def critical_gain(activation: ActivationLike, *, sigma_b: float = 0.0) -> float | None:
    """Return the ``sigma_w`` at which deep networks pass from vanishing to exploding gradients, with chi = 1.

    Every fixed point q has one ``sigma_w``, ``sqrt((q - sigma_b^2) / E[phi^2])``. Those with chi = 1 are at q = 0
    (tanh and its like, ReLU and its like), at finite q (biases, sigmoid) or at infinite q (softplus). The first counts
    at which :func:`chi` itself crosses 1, so that signals of variance 1 do reach the fixed point.

    Args:
        activation: See :func:`activation`.
        sigma_b: Standard deviation of the biases, >= 0.

    Returns:
        The critical gain, or ``None`` where there is none. GELU, SiLU, Mish and Hardswish have none without biases:
        below their forward gain a signal of variance 1 dies out (chi below 1), above it the signal grows without bound
        (chi above 1), so chi jumps over 1. The same holds for the shrinking activations. Take :func:`forward_gain` or
        :func:`backward_gain` for these. Sigmoid's critical gain is 10.15: a wide network does pass its gradient there,
        with most units saturated; at any usual gain it vanishes.

    Raises:
        ValueError: If ``sigma_b`` is out of range.

    Source:
        The edge of chaos of Poole et al. (2016), NeurIPS, arXiv 1606.05340, and Schoenholz et al. (2017), ICLR, arXiv
        1611.01232; the search along q is ours.

    Example:
        >>> round(critical_gain("relu"), 6), round(critical_gain("tanh"), 6), critical_gain("gelu")
        (1.414214, 1.0, None)
        >>> round(critical_gain("tanh", sigma_b=math.sqrt(0.05)) ** 2, 2)
        1.76
    """
    known = lookup(activation)
    _check_deviations(sigma_b=sigma_b)

    def crosses(gain: float) -> bool:
        below = chi(known, sigma_w=gain * (1.0 - _BESIDE), sigma_b=sigma_b)
        above = chi(known, sigma_w=gain * (1.0 + _BESIDE), sigma_b=sigma_b)
        return below < 1.0 - _CLEAR and above > 1.0 - _CLEAR

    return next((gain for gain in _gains_with_unit_chi(known, sigma_b**2) if crosses(gain)), None)


def _gains_with_unit_chi(known: Activation, bias: float) -> Iterator[float]:
    """Yield each ``sigma_w`` that has a fixed point with chi = 1, whether networks reach it or not, by rising q."""
    near, far = mean_square_derivative(known, 0.0), mean_square_derivative(known, math.inf)
    if bias == 0.0 and near > _CLEAR:  # q and chi approach 0 and 1
        yield 1.0 / math.sqrt(near)
    shares = known.scale**2 * 2.0 ** np.arange(-30.0, 31.0)
    excess = _excess(known, bias, shares)
    clear = np.flatnonzero(np.abs(excess) > _CLEAR)
    for low, high in pairwise(clear):
        if excess[low] < 0.0 < excess[high]:
            share = _bisect(lambda x: float(_excess(known, bias, np.array(x))), float(shares[high]), float(shares[low]))
            yield math.sqrt(share / mean_square(known, bias + share))
    if far > _CLEAR:  # q and chi approach infinity and 1
        yield 1.0 / math.sqrt(far)


def _excess(known: Activation, bias: float, share: FloatArray) -> FloatArray:
    """Return chi - 1 at the fixed points ``bias + share``, to which the weights contribute ``share``; NaN if none."""
    squares = mean_square(known, bias + share)
    return share * mean_square_derivative(known, bias + share) / np.where(squares > 0.0, squares, np.nan) - 1.0


def _bisect(value: Callable[[float], float], positive: float, negative: float) -> float:
    """Return the root between a point where ``value`` is positive and one where it is negative, both > 0."""
    for _ in range(_BISECTIONS):
        middle = math.sqrt(positive * negative)
        if value(middle) > 0.0:
            positive = middle
        else:
            negative = middle
    return math.sqrt(positive * negative)


def _check_deviations(**deviations: float) -> None:
    for name, value in deviations.items():
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{name} is a standard deviation and must be at least 0 and finite, got {value!r}")
