"""The elementwise activations of ``torch.nn`` as numpy functions, with derivatives, bounds and kinks.

Formulas and defaults: PyTorch documentation, ``torch.nn``, non-linear activations. Derivatives at a kink are those of
torch's autograd.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["BUILDERS", "Activation", "FloatArray"]

FloatArray: TypeAlias = NDArray[np.float64]

_NO_PARAMETERS: Mapping[str, float | str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """An elementwise activation function phi. Make your own to use the theory for a function that torch does not have.

    Attributes:
        name: For instance ``"leaky_relu"``.
        function: phi, from an array of float64 to one of the same shape.
        derivative: Its derivative, likewise; at a kink either one-sided value will do.
        derivative_bound: Supremum of the derivative's absolute value over all inputs where it exists.
        kinks: Inputs at which phi or one of its first two derivatives jumps; expectations are integrated between them.
        scale: Inputs over which phi bends near 0, > 0; expectations resolve it.
        parameters: Parameters by name, for instance ``{"negative_slope": 0.01}``.
    """

    name: str
    function: Callable[[FloatArray], FloatArray] = field(compare=False, repr=False)
    derivative: Callable[[FloatArray], FloatArray] = field(compare=False, repr=False)
    derivative_bound: float
    kinks: tuple[float, ...] = ()
    scale: float = 1.0
    parameters: Mapping[str, float | str] = field(default_factory=lambda: _NO_PARAMETERS, hash=False)


def _parameters(**values: float | str) -> Mapping[str, float | str]:
    return MappingProxyType(values)


def _require(condition: bool, name: str, requirement: str) -> None:  # noqa: FBT001 - a condition reads best in place
    if not condition:
        raise ValueError(f"activation {name!r} needs {requirement}")


# ----------------------------------------------------------------------------------------------- shared building blocks


def _sigmoid(x: FloatArray) -> FloatArray:
    return np.exp(-np.logaddexp(0.0, -x))


def _sigmoid_slope(x: FloatArray) -> FloatArray:
    return _sigmoid(x) * _sigmoid(-x)


def _tanh_slope(x: FloatArray) -> FloatArray:
    near = np.clip(x, -400.0, 400.0)  # cosh overflows; the slope is far below rounding by then
    return np.cosh(near) ** -2.0


def _softplus(x: FloatArray) -> FloatArray:
    return np.logaddexp(0.0, x)


_erfc = np.frompyfunc(math.erfc, 1, 1)


def _normal_cdf(x: FloatArray) -> FloatArray:
    return 0.5 * np.asarray(_erfc(-x / math.sqrt(2.0)), dtype=np.float64)


def _normal_density(x: FloatArray) -> FloatArray:
    return np.exp(-0.5 * x**2) / math.sqrt(2.0 * math.pi)


def _between(x: FloatArray, low: float, high: float, inside: FloatArray | float) -> FloatArray:
    return np.where((x > low) & (x < high), inside, 0.0)


def _bent(x: FloatArray, slope: float) -> FloatArray:
    return np.where(x > 0.0, x, slope * x)


# ------------------------------------------------------------------------------------------------------ the activations


def _identity() -> Activation:
    return Activation(name="identity", function=np.positive, derivative=np.ones_like, derivative_bound=1.0)


def _sigmoid_activation() -> Activation:
    return Activation(name="sigmoid", function=_sigmoid, derivative=_sigmoid_slope, derivative_bound=0.25)


def _tanh() -> Activation:
    return Activation(name="tanh", function=np.tanh, derivative=_tanh_slope, derivative_bound=1.0)


def _relu() -> Activation:
    return Activation(
        name="relu",
        function=lambda x: np.maximum(x, 0.0),
        derivative=lambda x: np.where(x > 0.0, 1.0, 0.0),
        derivative_bound=1.0,
        kinks=(0.0,),
    )


def _leaky_relu(*, negative_slope: float = 0.01) -> Activation:
    return Activation(
        name="leaky_relu",
        function=lambda x: _bent(x, negative_slope),
        derivative=lambda x: np.where(x > 0.0, 1.0, negative_slope),
        derivative_bound=max(1.0, abs(negative_slope)),
        kinks=(0.0,),
        parameters=_parameters(negative_slope=negative_slope),
    )


def _prelu(*, weight: float | Sequence[float] = 0.25) -> Activation:
    """PReLU; several slopes are pooled as their root mean square, which is what expectations of squares need."""
    slopes = np.atleast_1d(np.asarray(weight, dtype=np.float64))
    pooled = float(slopes[0]) if slopes.size == 1 else math.sqrt(float(np.mean(slopes**2)))
    return replace(
        _leaky_relu(negative_slope=pooled),
        name="prelu",
        derivative_bound=max(1.0, float(np.abs(slopes).max())),
        parameters=_parameters(weight=pooled),
    )


def _rrelu(*, lower: float = 1.0 / 8.0, upper: float = 1.0 / 3.0) -> Activation:
    mean_slope = _leaky_relu(negative_slope=(lower + upper) / 2.0)
    return replace(mean_slope, name="rrelu", parameters=_parameters(lower=lower, upper=upper))


def _elu(*, alpha: float = 1.0) -> Activation:
    return Activation(
        name="elu",
        function=lambda x: np.where(x > 0.0, x, alpha * np.expm1(np.minimum(x, 0.0))),
        derivative=lambda x: np.where(x > 0.0, 1.0, alpha * np.exp(np.minimum(x, 0.0))),
        derivative_bound=max(1.0, abs(alpha)),
        kinks=(0.0,),
        parameters=_parameters(alpha=alpha),
    )


def _celu(*, alpha: float = 1.0) -> Activation:
    _require(alpha > 0.0, "celu", f"alpha > 0, got {alpha!r}")
    return Activation(
        name="celu",
        function=lambda x: np.where(x > 0.0, x, alpha * np.expm1(np.minimum(x, 0.0) / alpha)),
        derivative=lambda x: np.where(x > 0.0, 1.0, np.exp(np.minimum(x, 0.0) / alpha)),
        derivative_bound=1.0,
        kinks=(0.0,),
        scale=alpha,
        parameters=_parameters(alpha=alpha),
    )


def _selu() -> Activation:
    """SELU: its constants make mean 0 and variance 1 a fixed point.

    Source:
        Klambauer, Unterthiner, Mayr, Hochreiter (2017), "Self-Normalizing Neural Networks", NeurIPS, arXiv 1706.02515.
    """
    alpha, scale = 1.6732632423543772, 1.0507009873554805
    elu = _elu(alpha=alpha)
    return Activation(
        name="selu",
        function=lambda x: scale * elu.function(x),
        derivative=lambda x: scale * elu.derivative(x),
        derivative_bound=scale * alpha,
        kinks=(0.0,),
    )


def _gelu(*, approximate: str = "none") -> Activation:
    """GELU, exact (largest slope at sqrt 2) or with the tanh approximation (largest slope at 1.4185, ours)."""
    _require(approximate in {"none", "tanh"}, "gelu", f"approximate 'none' or 'tanh', got {approximate!r}")
    if approximate == "none":
        return Activation(
            name="gelu",
            function=lambda x: x * _normal_cdf(x),
            derivative=lambda x: _normal_cdf(x) + x * _normal_density(x),
            derivative_bound=1.128904145185155,
            parameters=_parameters(approximate=approximate),
        )
    factor, cubic = math.sqrt(2.0 / math.pi), 0.044715

    def gate(x: FloatArray) -> FloatArray:
        near = np.clip(x, -20.0, 20.0)
        return 2.0 * factor * (near + cubic * near**3)

    def derivative(x: FloatArray) -> FloatArray:
        slope = 2.0 * factor * (1.0 + 3.0 * cubic * np.clip(x, -20.0, 20.0) ** 2)
        return _sigmoid(gate(x)) + x * _sigmoid_slope(gate(x)) * slope

    return Activation(
        name="gelu",
        function=lambda x: x * _sigmoid(gate(x)),
        derivative=derivative,
        derivative_bound=1.1289930686587718,
        parameters=_parameters(approximate=approximate),
    )


def _silu() -> Activation:
    """SiLU (swish); largest slope at 2.3994, ours."""
    return Activation(
        name="silu",
        function=lambda x: x * _sigmoid(x),
        derivative=lambda x: _sigmoid(x) * (1.0 + x * _sigmoid(-x)),
        derivative_bound=1.0998393201288669,
    )


def _mish() -> Activation:
    """Mish; largest slope at 1.4906, ours."""
    return Activation(
        name="mish",
        function=lambda x: x * np.tanh(_softplus(x)),
        derivative=lambda x: np.tanh(_softplus(x)) + x * _sigmoid(x) * _tanh_slope(_softplus(x)),
        derivative_bound=1.0884981612217279,
    )


def _softplus_activation(*, beta: float = 1.0, threshold: float = 20.0) -> Activation:
    """Softplus; torch continues it as the identity where ``beta * x > threshold``."""
    _require(beta > 0.0, "softplus", f"beta > 0, got {beta!r}")
    return Activation(
        name="softplus",
        function=lambda x: np.where(beta * x > threshold, x, _softplus(beta * x) / beta),
        derivative=lambda x: np.where(beta * x > threshold, 1.0, _sigmoid(beta * x)),
        derivative_bound=1.0,
        kinks=(threshold / beta,),
        scale=1.0 / beta,
        parameters=_parameters(beta=beta, threshold=threshold),
    )


def _softsign() -> Activation:
    return Activation(
        name="softsign",
        function=lambda x: x / (1.0 + np.abs(x)),
        derivative=lambda x: (1.0 + np.abs(x)) ** -2.0,
        derivative_bound=1.0,
        kinks=(0.0,),
    )


def _hardtanh(*, min_val: float = -1.0, max_val: float = 1.0) -> Activation:
    _require(min_val < max_val, "hardtanh", f"min_val < max_val, got {min_val!r} and {max_val!r}")
    return Activation(
        name="hardtanh",
        function=lambda x: np.clip(x, min_val, max_val),
        derivative=lambda x: _between(x, min_val, max_val, 1.0),
        derivative_bound=1.0,
        kinks=(min_val, max_val),
        parameters=_parameters(min_val=min_val, max_val=max_val),
    )


def _relu6() -> Activation:
    return replace(_hardtanh(min_val=0.0, max_val=6.0), name="relu6", parameters=_NO_PARAMETERS)


def _hardsigmoid() -> Activation:
    return Activation(
        name="hardsigmoid",
        function=lambda x: np.clip(x + 3.0, 0.0, 6.0) / 6.0,
        derivative=lambda x: _between(x, -3.0, 3.0, 1.0 / 6.0),
        derivative_bound=1.0 / 6.0,
        kinks=(-3.0, 3.0),
    )


def _hardswish() -> Activation:
    """Hardswish; its slope reaches 1.5 just below 3."""
    return Activation(
        name="hardswish",
        function=lambda x: x * (np.clip(x + 3.0, 0.0, 6.0) / 6.0),
        derivative=lambda x: np.where(x >= 3.0, 1.0, _between(x, -3.0, 3.0, x / 3.0 + 0.5)),
        derivative_bound=1.5,
        kinks=(-3.0, 3.0),
    )


def _logsigmoid() -> Activation:
    return Activation(
        name="logsigmoid",
        function=lambda x: -_softplus(-x),
        derivative=lambda x: _sigmoid(-x),
        derivative_bound=1.0,
    )


def _tanhshrink() -> Activation:
    def function(x: FloatArray) -> FloatArray:
        small = np.clip(x, -0.1, 0.1) ** 2  # x - tanh(x) cancels there; the Taylor series does not
        series = 1 / 3 - small * (2 / 15 - small * (17 / 315 - small * (62 / 2835 - small * (1382 / 155925))))
        return np.where(np.abs(x) < 0.1, x * small * series, x - np.tanh(x))

    return Activation(name="tanhshrink", function=function, derivative=lambda x: np.tanh(x) ** 2, derivative_bound=1.0)


def _softshrink(*, lambd: float = 0.5) -> Activation:
    _require(lambd >= 0.0, "softshrink", f"lambd >= 0, got {lambd!r}")
    return Activation(
        name="softshrink",
        function=lambda x: np.sign(x) * np.maximum(np.abs(x) - lambd, 0.0),
        derivative=lambda x: np.where(np.abs(x) > lambd, 1.0, 0.0),
        derivative_bound=1.0,
        kinks=(-lambd, lambd),
        parameters=_parameters(lambd=lambd),
    )


def _hardshrink(*, lambd: float = 0.5) -> Activation:
    """Hardshrink; as in autograd, its jumps at +-lambd count neither in the derivative nor in its bound."""
    _require(lambd >= 0.0, "hardshrink", f"lambd >= 0, got {lambd!r}")
    return Activation(
        name="hardshrink",
        function=lambda x: np.where(np.abs(x) > lambd, x, 0.0),
        derivative=lambda x: np.where(np.abs(x) > lambd, 1.0, 0.0),
        derivative_bound=1.0,
        kinks=(-lambd, lambd),
        parameters=_parameters(lambd=lambd),
    )


def _threshold(*, threshold: float, value: float) -> Activation:
    """Threshold; as in autograd, its jump counts neither in the derivative nor in its bound."""
    return Activation(
        name="threshold",
        function=lambda x: np.where(x > threshold, x, value),
        derivative=lambda x: np.where(x > threshold, 1.0, 0.0),
        derivative_bound=1.0,
        kinks=(threshold,),
        parameters=_parameters(threshold=threshold, value=value),
    )


BUILDERS: Mapping[str, Callable[..., Activation]] = MappingProxyType(
    {
        "celu": _celu,
        "elu": _elu,
        "gelu": _gelu,
        "hardshrink": _hardshrink,
        "hardsigmoid": _hardsigmoid,
        "hardswish": _hardswish,
        "hardtanh": _hardtanh,
        "identity": _identity,
        "leaky_relu": _leaky_relu,
        "logsigmoid": _logsigmoid,
        "mish": _mish,
        "prelu": _prelu,
        "relu": _relu,
        "relu6": _relu6,
        "rrelu": _rrelu,
        "selu": _selu,
        "sigmoid": _sigmoid_activation,
        "silu": _silu,
        "softplus": _softplus_activation,
        "softshrink": _softshrink,
        "softsign": _softsign,
        "tanh": _tanh,
        "tanhshrink": _tanhshrink,
        "threshold": _threshold,
    }
)
"""Constructors by name; their keywords are the parameters, under the names of torch's attributes."""
