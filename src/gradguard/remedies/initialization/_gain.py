"""The weight gain at which theory predicts that a stack of a given depth keeps the gradient's norm."""

from __future__ import annotations

import math

from gradguard import theory

__all__ = ["stack_gain"]

_LOWEST, _HIGHEST = 1e-2, 1e2
_BISECTIONS = 20
"""Halvings of the logarithm of the ratio of the two, which leave a relative error of 1e-5."""
_DEEPEST = 64
"""Layers after which the gain of a stack differs from that of a deeper one by less than 0.01. Ours: tanh 1.16 against
1.11 for 128 layers, sigmoid 10.22 against 10.18, ReLU no difference."""
_OUT_OF_RANGE = 1e30


def stack_gain(activation: theory.ActivationLike, depth: int) -> float:
    """Return the weight gain at which a stack of ``depth`` layers keeps the gradient's expected norm.

    Weights have variance ``gain^2 / fan_in`` and biases are 0. Theory gives each pre-activation's variance and each
    layer's factor chi on the squared gradient; the gain returned makes the product of those factors 1. The variance
    starts at ``gain^2``, which inputs of variance 1 give, or at 1, whichever gives the smaller gain: so shallow stacks
    are not driven into saturation. For deep stacks the gain approaches :func:`gradguard.theory.critical_gain` where
    there is one, and it exists where there is none (GELU, SiLU); for ReLU it is sqrt 2 at any depth.

    Args:
        activation: See :func:`gradguard.theory.activation`.
        depth: Layers of the stack with this activation behind them, >= 1; more than 64 count as 64.

    Raises:
        ValueError: If ``depth`` is below 1, or no gain between 0.01 and 100 keeps the gradient.

    Source:
        Schoenholz et al. (2017), "Deep Information Propagation", ICLR, arXiv 1611.01232, for chi. The product over a
        finite depth is ours. On MLPs of width 256 with 20 and 50 layers, mean of 5 seeds, it brings the gain per layer
        to 0.95-1.05 for tanh, ReLU, GELU, SELU, sigmoid and softplus (tests/test_remedies_initialization.py), where the
        gain for infinite depth leaves tanh at 0.92 and 0.96 and SELU at 0.90 and 0.94. SiLU, unstable at any gain,
        comes to 1.09 and 1.10.

    Example:
        >>> round(stack_gain("relu", 20), 4), round(stack_gain("tanh", 20), 2), round(stack_gain("identity", 5), 4)
        (1.4142, 1.24, 1.0)
    """
    if depth < 1:
        raise ValueError(f"depth must be at least 1 layer, got {depth!r}")
    known = theory.activation(activation)
    layers = min(depth, _DEEPEST)
    return min(_root(known, max(1, layers - 1), None), _root(known, layers, 1.0))


def _root(known: theory.Activation, steps: int, start: float | None) -> float:
    low, high = _LOWEST, _HIGHEST
    if not (_log_product(known, low, steps, start) < 0.0 < _log_product(known, high, steps, start)):
        raise ValueError(
            f"no weight gain between {_LOWEST:g} and {_HIGHEST:g} lets {steps} layers of {known.name} keep the "
            "gradient's norm. Pass gain="
        )
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if _log_product(known, middle, steps, start) > 0.0:
            high = middle
        else:
            low = middle
    return math.sqrt(low * high)


def _log_product(known: theory.Activation, gain: float, steps: int, start: float | None) -> float:
    """Return the logarithm of the product of chi over a stack, without bound where the signal leaves the range."""
    variance, total = gain**2 if start is None else start, 0.0
    for _ in range(steps):
        factor = theory.chi(known, sigma_w=gain, q=variance)
        if factor <= 0.0:
            return -math.inf
        if not math.isfinite(factor):
            return math.inf
        total += math.log(factor)
        variance = theory.length_map(known, variance, sigma_w=gain)
        if not variance <= _OUT_OF_RANGE:  # nor NaN, as of exp(x)
            return math.inf
        if variance < 1.0 / _OUT_OF_RANGE:
            return -math.inf
    return total
