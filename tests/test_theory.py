"""Mean-field theory: quadrature, activations, fixed points and gains, against closed forms, torch and real networks."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradguard import theory
from gradguard.theory import Activation
from tests.activations import EVERY, NAMES, label

SQRT2 = math.sqrt(2.0)


def cdf(x: float) -> float:
    """Return the standard normal distribution function."""
    return 0.5 * math.erfc(-x / SQRT2)


def density(x: float) -> float:
    """Return the standard normal density."""
    return math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)


@pytest.mark.parametrize(
    ("name", "square", "derivative_square", "bound", "forward", "backward"),
    [
        ("sigmoid", 0.29338, 0.04484, 0.25, 1.846, 4.723),
        ("tanh", 0.39429, 0.46440, 1.0, 1.593, 1.467),
        ("relu", 0.5, 0.5, 1.0, 1.4142, 1.4142),
        ("leaky_relu", 0.50005, 0.50005, 1.0, 1.4142, 1.4142),
        ("elu", 0.64495, 0.66810, 1.0, 1.245, 1.223),
        ("selu", 1.0, 1.07157, 1.758, 1.0, 0.966),
        ("gelu", 0.42522, 0.45585, 1.129, 1.534, 1.481),
        ("silu", 0.35578, 0.37948, 1.100, 1.677, 1.623),
        ("softsign", 0.18301, 0.22767, 1.0, 2.338, 2.096),
        ("hardtanh", 0.51606, 0.68269, 1.0, 1.392, 1.210),
        ("softplus", 0.92125, 0.29338, 1.0, 1.042, 1.846),
    ],
)
def test_unit_variance_values_match_the_measured_table(
    name: str, square: float, derivative_square: float, bound: float, forward: float, backward: float
) -> None:
    """Expectations and gains at q = 1 agree to the last printed digit with a trapezoid sum over two million points."""
    assert theory.mean_square(name, 1.0) == pytest.approx(square, abs=5.1e-6)
    assert theory.mean_square_derivative(name, 1.0) == pytest.approx(derivative_square, abs=5.1e-6)
    assert theory.activation(name).derivative_bound == pytest.approx(bound, abs=5.1e-4)
    assert theory.forward_gain(name) == pytest.approx(forward, abs=5.1e-4)
    assert theory.backward_gain(name) == pytest.approx(backward, abs=5.1e-4)


def elu_square(s: float, alpha: float) -> float:
    """Return E[ELU(s z)^2] by completing the square."""
    left = math.exp(2 * s * s) * cdf(-2 * s) - 2 * math.exp(s * s / 2) * cdf(-s) + 0.5
    return 0.5 * s * s + alpha * alpha * left


def gelu_square(s: float) -> float:
    """Return E[GELU(s z)^2] by the arcsine law of two correlated Gaussians."""
    q = s * s
    return q / 4 + q / (2 * math.pi) * (math.asin(q / (1 + q)) + 2 * q / ((1 + q) * math.sqrt(1 + 2 * q)))


def beyond(s: float, lambd: float) -> float:
    """Return E[(s z)^2; |s z| > lambd]."""
    a = lambd / s
    return 2 * s * s * (a * density(a) + cdf(-a))


CLOSED_FORMS: dict[str, Callable[[float], float]] = {
    "relu": lambda s: s * s / 2,
    "leaky_relu": lambda s: s * s * (1 + 1e-4) / 2,
    "elu": lambda s: elu_square(s, 1.0),
    "selu": lambda s: 1.0507009873554805**2 * elu_square(s, 1.6732632423543772),
    "gelu": gelu_square,
    "hardtanh": lambda s: s * s - beyond(s, 1.0) + 2 * cdf(-1 / s),
    "hardshrink": lambda s: beyond(s, 0.5),
    "softshrink": lambda s: beyond(s, 0.5) - 2 * s * density(0.5 / s) + 0.5 * cdf(-0.5 / s),
}


@pytest.mark.parametrize("s", [0.3, 1.0, 4.0])
@pytest.mark.parametrize("name", CLOSED_FORMS)
def test_mean_square_agrees_with_the_closed_form(name: str, s: float) -> None:
    """Kinks cost no accuracy: where the integral is known exactly, twelve digits agree."""
    assert theory.mean_square(name, s * s) == pytest.approx(CLOSED_FORMS[name](s), rel=1e-12)


@pytest.mark.parametrize("q", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("name", ["sigmoid", "tanh", "silu", "mish", "gelu", "softplus", "logsigmoid", "tanhshrink"])
def test_smooth_functions_agree_with_a_fine_trapezoid_sum(name: str, q: float) -> None:
    """For smooth integrands a trapezoid sum converges exponentially, so it is an independent reference."""
    z = np.linspace(-12.0, 12.0, 100_001)
    weight = np.exp(-0.5 * z**2) / math.sqrt(2.0 * math.pi) * (z[1] - z[0])
    known = theory.activation(name)
    x = math.sqrt(q) * z

    assert theory.mean(name, q) == pytest.approx((weight * known.function(x)).sum(), rel=1e-8, abs=1e-12)
    assert theory.mean_square(name, q) == pytest.approx((weight * known.function(x) ** 2).sum(), rel=1e-8)
    assert theory.mean_square_derivative(name, q) == pytest.approx((weight * known.derivative(x) ** 2).sum(), rel=1e-8)


@pytest.mark.parametrize("known", EVERY, ids=label)
def test_expectations_agree_with_sampling(known: Activation) -> None:
    """Two hundred thousand random numbers give the same averages, within five standard errors."""
    q = 1.7
    x = math.sqrt(q) * np.random.default_rng(0).standard_normal(200_000)
    for values, expected in (
        (known.function(x), theory.mean(known, q)),
        (known.function(x) ** 2, theory.mean_square(known, q)),
        (known.derivative(x) ** 2, theory.mean_square_derivative(known, q)),
    ):
        assert expected == pytest.approx(values.mean(), abs=5 * values.std() / math.sqrt(200_000) + 1e-12)


@pytest.mark.parametrize("known", EVERY, ids=label)
def test_limits_of_vanishing_and_infinite_variance(known: Activation) -> None:
    """At q = 0 and at infinity the limits are returned, without a floating-point warning."""
    slopes = known.derivative(np.array([-1e-12, 1e-12, -1e12, 1e12])) ** 2

    assert theory.mean_square(known, 0.0) == pytest.approx(float(known.function(np.zeros(1))[0]) ** 2, abs=1e-12)
    assert theory.mean_square_derivative(known, 0.0) == pytest.approx(slopes[:2].mean(), abs=1e-9)
    assert theory.mean_square_derivative(known, math.inf) == pytest.approx(slopes[2:].mean(), abs=1e-9)
    assert math.isinf(theory.mean_square(known, math.inf)) == (slopes[2:].max() > 1e-9)


def test_an_array_of_variances_gives_an_array() -> None:
    """Expectations are elementwise in q, whatever its shape, and a number gives a number."""
    q = np.array([[0.0, 1e-6, 1.0], [3.0, 1e8, np.inf]])

    result = theory.mean_square_derivative("mish", q)

    assert isinstance(theory.mean_square("mish", 1.0), float)
    assert result.shape == (2, 3)
    expected = [theory.mean_square_derivative("mish", float(one)) for one in q.flat]
    np.testing.assert_allclose(result.ravel(), expected, rtol=1e-13)
    assert theory.mean_square("mish", np.zeros(0)).shape == (0,)


@pytest.mark.parametrize("q", [-1.0, math.nan])
def test_a_variance_below_zero_is_refused(q: float) -> None:
    """Variances are checked, and the message has the value."""
    with pytest.raises(ValueError, match=r"q is a variance and must be at least 0, got (-1\.0|nan)"):
        theory.mean_square("tanh", q)


@given(name=st.sampled_from(NAMES), q=st.floats(1e-6, 1e6))
def test_mean_square_derivative_never_exceeds_the_squared_bound(name: str, q: float) -> None:
    """An average cannot exceed the supremum."""
    bound = theory.activation(name).derivative_bound

    assert 0.0 <= theory.mean_square_derivative(name, q) <= bound**2 * (1 + 1e-12)


@pytest.mark.parametrize(
    ("name", "sigma_w", "sigma_b", "q", "chi", "digits"),
    [
        pytest.param("tanh", 1.0, 0.0, 0.0, 1.0, 1e-9, id="tanh, critical"),
        pytest.param("tanh", 5 / 3, 0.0, 1.178, 1.210, 5.1e-4, id="tanh at torch's gain"),
        pytest.param("tanh", 2.0, 0.0, None, 1.363, 5.1e-4, id="tanh, chaotic"),
        pytest.param("tanh", math.sqrt(1.7603), math.sqrt(0.05), 0.56965, 0.99986, 5.1e-6, id="tanh, edge of chaos"),
        pytest.param("tanh", theory.PYTORCH_DEFAULT_SIGMA_W, 0.0, 0.0, 1 / 3, 1e-9, id="tanh, torch's default"),
        pytest.param("sigmoid", 1.0, 0.0, 0.2647, 0.0557, 5.1e-5, id="sigmoid, Xavier"),
        pytest.param("sigmoid", 4.0, 0.0, None, 0.399, 5.1e-4, id="sigmoid, large weights"),
        pytest.param("relu", SQRT2, 0.0, 1.0, 1.0, 1e-9, id="ReLU, He"),
        pytest.param("relu", theory.PYTORCH_DEFAULT_SIGMA_W, 0.0, 0.0, 1 / 6, 1e-9, id="ReLU, torch's default"),
        pytest.param("relu", 2.0, 0.0, math.inf, 2.0, 1e-9, id="ReLU, too large"),
        pytest.param("relu", 1.0, 0.5, 0.5, 0.5, 1e-9, id="ReLU with biases"),
        pytest.param("selu", 1.0, 0.0, 1.0, 1.07157, 5.1e-6, id="SELU normalizes itself"),
    ],
)
def test_fixed_points_and_chi(
    name: str, sigma_w: float, sigma_b: float, q: float | None, chi: float, digits: float
) -> None:
    """The variance that deep layers approach, and the factor on the squared gradient there."""
    if q is not None:
        assert theory.fixed_point(name, sigma_w=sigma_w, sigma_b=sigma_b) == pytest.approx(q, abs=digits)
    assert theory.chi(name, sigma_w=sigma_w, sigma_b=sigma_b) == pytest.approx(chi, abs=digits)
    gain = theory.gain_per_layer(name, sigma_w=sigma_w, sigma_b=sigma_b)
    assert gain == pytest.approx(math.sqrt(chi), abs=digits)


@settings(max_examples=40)
@given(name=st.sampled_from(NAMES), sigma_w=st.floats(0.05, 4.0), sigma_b=st.floats(0.0, 2.0))
def test_a_fixed_point_is_one_and_is_reached_by_iteration(name: str, sigma_w: float, sigma_b: float) -> None:
    """The length map leaves q* alone, and 20 layers from unit variance never lead away from it."""
    q = theory.fixed_point(name, sigma_w=sigma_w, sigma_b=sigma_b)
    layer = 1.0
    for _ in range(20):
        layer = theory.length_map(name, layer, sigma_w=sigma_w, sigma_b=sigma_b)

    if 0.0 < q < math.inf:
        assert theory.length_map(name, q, sigma_w=sigma_w, sigma_b=sigma_b) == pytest.approx(q, rel=1e-9)
    assert min(1.0, q) * (1 - 1e-9) <= layer <= max(1.0, q) * (1 + 1e-9)


@given(sigma_w=st.floats(0.0, 10.0), factor=st.floats(0.1, 10.0), q=st.floats(0.0, 1e6))
def test_chi_scales_with_the_weight_variance(sigma_w: float, factor: float, q: float) -> None:
    """At a given q, chi is proportional to sigma_w^2; for ReLU it is sigma_w^2 / 2 at any q."""
    for name in ("relu", "gelu", "tanh"):
        scaled = theory.chi(name, sigma_w=factor * sigma_w, q=q)
        assert scaled == pytest.approx(factor**2 * theory.chi(name, sigma_w=sigma_w, q=q), rel=1e-12, abs=1e-300)
    assert theory.chi("relu", sigma_w=sigma_w, q=q) == pytest.approx(sigma_w**2 / 2, rel=1e-12, abs=1e-300)


def test_gelu_has_two_basins_divided_by_its_forward_gain() -> None:
    """Unit variance dies out just below the forward gain, grows without bound just above, and is kept at it."""
    gain = theory.forward_gain("gelu")

    assert theory.fixed_point("gelu", sigma_w=0.999 * gain) == 0.0
    assert theory.fixed_point("gelu", sigma_w=gain) == 1.0
    assert theory.fixed_point("gelu", sigma_w=1.001 * gain) == math.inf
    assert theory.fixed_point("gelu", sigma_w=0.999 * gain, start=100.0) == math.inf


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: theory.chi("tanh", sigma_w=-1.0), r"sigma_w is a standard deviation .* finite, got -1\.0"),
        (lambda: theory.chi("tanh", sigma_w=1.0, sigma_b=math.inf), r"sigma_b is a standard deviation .* got inf"),
        (lambda: theory.critical_gain("tanh", sigma_b=math.nan), r"sigma_b is a standard deviation .* got nan"),
        (lambda: theory.fixed_point("tanh", sigma_w=1.0, start=0.0), r"start is a variance and must be positive"),
        (lambda: theory.mean("relu", math.inf), r"q must be finite for a mean, got inf"),
        (lambda: theory.depth_scale(-1.0), r"chi is a factor on squared norms and must be at least 0, got -1\.0"),
        (
            lambda: theory.normalized_chi("relu", normalization="group"),  # type: ignore[arg-type] # what is tested
            r"normalization must be 'batch' or 'layer', got 'group'",
        ),
    ],
)
def test_arguments_out_of_range_are_refused(call: Callable[[], object], message: str) -> None:
    """The message names the argument, its range and what came."""
    with pytest.raises(ValueError, match=message):
        call()


def test_depth_scale_counts_layers() -> None:
    """After that many layers the squared norm has changed by e; at chi = 1 it never does."""
    assert theory.depth_scale(math.exp(-0.25)) == pytest.approx(4.0)
    assert theory.depth_scale(math.exp(0.25)) == pytest.approx(4.0)
    assert theory.depth_scale(1.0) == math.inf
    assert theory.depth_scale(0.0) == theory.depth_scale(math.inf) == 0.0


@pytest.mark.parametrize(
    ("name", "sigma_b", "variance"),
    [
        ("relu", 0.0, 2.0),
        ("leaky_relu", 0.0, 2 / 1.0001),
        ("tanh", 0.0, 1.0),
        ("hardtanh", 0.0, 1.0),
        ("softplus", 0.0, 2.0),
        pytest.param("tanh", math.sqrt(0.05), 1.761, id="Poole et al. 2016: about (1.76, 0.05)"),
        pytest.param("gelu", math.sqrt(0.17292239), 1.98305826, id="GELU, half-stable"),
        pytest.param("silu", math.sqrt(0.55514317), 1.98800468, id="SiLU, half-stable"),
    ],
)
def test_critical_gains_of_the_literature(name: str, sigma_b: float, variance: float) -> None:
    """Squared critical gains; the half-stable ones are those of Roberts, Yaida, Hanin 2022, arXiv 2106.10165."""
    gain = theory.critical_gain(name, sigma_b=sigma_b)

    assert gain is not None
    assert gain**2 == pytest.approx(variance, rel=5e-5 if name == "tanh" else 2e-9)


@pytest.mark.parametrize("known", EVERY, ids=label)
def test_chi_crosses_one_at_the_critical_gain(known: Activation) -> None:
    """Below it gradients vanish, above it they do not; where there is none, chi jumps over 1 or never gets there."""
    gain = theory.critical_gain(known)

    if gain is None:
        steps = np.geomspace(0.3, 30.0, 15)
        distances = [abs(theory.chi(known, sigma_w=float(step)) - 1.0) for step in steps]
        assert min(distances) > 1e-2
    else:
        assert theory.chi(known, sigma_w=0.99 * gain) < 1.0
        assert theory.chi(known, sigma_w=1.01 * gain) >= 1.0


@pytest.mark.parametrize("name", ["gelu", "silu", "mish", "hardswish", "tanhshrink", "softshrink", "hardshrink"])
def test_activations_that_bend_away_from_zero_have_no_critical_gain(name: str) -> None:
    """Without biases their only fixed point with chi near 1 repels, so there is nothing to aim at."""
    assert theory.critical_gain(name) is None


def test_torch_initializes_linear_and_conv_with_the_stated_variance() -> None:
    """The default's variance is sigma_w^2 / fan_in with sigma_w^2 = 1/3."""
    linear, conv = nn.Linear(400, 500), nn.Conv2d(32, 64, 3)

    sigma_w = theory.PYTORCH_DEFAULT_SIGMA_W

    assert sigma_w**2 == pytest.approx(1 / 3)
    assert float(linear.weight.detach().var()) * 400 == pytest.approx(1 / 3, rel=0.02)
    assert float(conv.weight.detach().var()) * 32 * 9 == pytest.approx(1 / 3, rel=0.04)


def measured_gain(phi: Callable[[torch.Tensor], torch.Tensor], sigma_w: float, *, q: float, batch: int = 4) -> float:
    """Return the gradient's growth per layer in random nets of width 512 and depth 10, as a mean over three nets.

    ``phi`` may begin with a normalization. ``q`` is the variance of the first pre-activations.
    """
    width, depth, logs = 512, 10, []
    for _ in range(3):
        x = math.sqrt(q) * torch.randn(batch, width)
        first = x.requires_grad_()
        for _ in range(depth):
            x = nn.functional.linear(phi(x), sigma_w / math.sqrt(width) * torch.randn(width, width))
        sent = torch.randn(batch, width)
        (arrived,) = torch.autograd.grad(x, first, sent)
        logs.append(math.log(float(arrived.norm() / sent.norm())) / depth)
    return math.exp(sum(logs) / len(logs))


@pytest.mark.parametrize(
    ("name", "sigma_w", "expected"),
    [
        pytest.param("sigmoid", 1.0, 0.236, id="sigmoid, Xavier"),
        pytest.param("relu", theory.PYTORCH_DEFAULT_SIGMA_W, 0.408, id="ReLU, torch's default"),
        pytest.param("relu", 0.5 * SQRT2, 0.5, id="ReLU, half He"),
        pytest.param("relu", 0.8 * SQRT2, 0.8, id="ReLU, 0.8 He"),
        pytest.param("relu", 1.3 * SQRT2, 1.3, id="ReLU, 1.3 He"),
        pytest.param("relu", 2.0 * SQRT2, 2.0, id="ReLU, twice He"),
        pytest.param("tanh", 5 / 3, 1.100, id="tanh at torch's gain"),
        pytest.param("sigmoid", 10.149, 1.0, id="sigmoid at its critical gain"),
        pytest.param("softsign", 2.0, 1.0784, id="softsign, chaotic"),
        pytest.param("selu", 1.0, 1.035, id="SELU"),
    ],
)
def test_measured_gain_of_wide_networks_agrees_with_theory(name: str, sigma_w: float, expected: float) -> None:
    """The gradient of real random networks changes per layer as predicted, within 4 %."""
    predicted = theory.gain_per_layer(name, sigma_w=sigma_w)
    q = theory.fixed_point(name, sigma_w=sigma_w)
    start = q if 0.0 < q < math.inf else 1.0

    assert predicted == pytest.approx(expected, abs=6e-4)
    assert measured_gain(getattr(torch, name, None) or getattr(nn.functional, name), sigma_w, q=start) == pytest.approx(
        predicted, rel=0.04
    )


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "sigmoid"])
def test_measured_gain_under_batch_norm_agrees_with_theory(name: str) -> None:
    """Batch norm makes gradients grow with depth by the predicted factor, whatever the weights' scale."""
    phi = getattr(nn.functional, name, None) or getattr(torch, name)
    predicted = math.sqrt(theory.normalized_chi(name, normalization="batch"))
    spread = theory.mean_square(name, 1.0) - theory.mean(name, 1.0) ** 2

    def block(x: torch.Tensor) -> torch.Tensor:
        return phi(nn.functional.batch_norm(x, None, None, training=True))

    assert predicted >= 1.0
    assert measured_gain(block, 3.0, q=9.0 * spread, batch=256) == pytest.approx(predicted, rel=0.04)


@pytest.mark.parametrize("name", ["relu", "tanh", "gelu", "sigmoid"])
def test_measured_gain_under_layer_norm_agrees_with_theory(name: str) -> None:
    """Under layer norm the factor follows from the activation alone."""
    phi = getattr(nn.functional, name, None) or getattr(torch, name)
    predicted = math.sqrt(theory.normalized_chi(name, normalization="layer"))

    def block(x: torch.Tensor) -> torch.Tensor:
        return phi(nn.functional.layer_norm(x, x.shape[-1:]))

    assert measured_gain(block, 0.5, q=0.25 * theory.mean_square(name, 1.0)) == pytest.approx(predicted, rel=0.04)


def test_batch_norm_and_relu_explode_as_published() -> None:
    """It is pi / (pi - 1) on the squared norm, 1.211 per layer (Yang et al. 2019)."""
    chi = theory.normalized_chi("relu", normalization="batch")

    assert chi == pytest.approx(math.pi / (math.pi - 1), rel=1e-12)
    assert math.sqrt(chi) == pytest.approx(1.211, abs=5.1e-4)


@pytest.mark.parametrize("known", EVERY, ids=label)
def test_batch_norm_never_shrinks_gradients(known: Activation) -> None:
    """For continuous activations chi is at least 1 under batch norm: the Gaussian Poincare inequality."""
    chi = theory.normalized_chi(known, normalization="batch")

    if known.name in {"hardshrink", "threshold"}:  # they jump
        assert 0.0 < chi < math.inf
    else:
        assert chi >= 1.0 - 1e-12


def test_theory_does_not_import_torch() -> None:
    """The theory serves `gradguard explain`, which must start fast."""
    program = "import sys, gradguard.theory as t; t.critical_gain('gelu'); sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
