"""The activations behind the theory: torch's functions and derivatives, and the look-up of whatever people pass."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradguard import theory
from gradguard.theory import ACTIVATIONS, Activation
from tests.activations import EVERY, MODULES, NAMES, label


@pytest.mark.parametrize(("module", "known"), list(zip(MODULES, EVERY, strict=True)), ids=label)
def test_function_and_derivative_are_those_of_torch(module: nn.Module, known: Activation) -> None:
    """Values and autograd's derivatives agree far out, close to zero and exactly at the kinks."""
    grid = np.concatenate([np.linspace(-30.0, 30.0, 2401), np.geomspace(1e-6, 0.1, 30), known.kinks])
    x = torch.tensor(grid, dtype=torch.float64, requires_grad=True)
    y = module.double()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)

    np.testing.assert_allclose(known.function(grid), y.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(known.derivative(grid), slope.numpy(), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("known", EVERY, ids=label)
def test_derivative_bound_is_the_supremum(known: Activation) -> None:
    """No slope exceeds the bound, and some slope comes within a millionth of it."""
    x = np.concatenate([np.linspace(-40.0, 40.0, 80_001), np.array(known.kinks) - 1e-9, np.array(known.kinks) + 1e-9])
    steepest = float(np.abs(known.derivative(x)).max())

    assert steepest == pytest.approx(known.derivative_bound, rel=1e-6)
    assert steepest <= known.derivative_bound * (1 + 1e-12)


@given(known=st.sampled_from(EVERY), x=st.floats(-25.0, 25.0))
def test_derivative_matches_finite_differences_away_from_kinks(known: Activation, x: float) -> None:
    """The derivative is that of the function."""
    h = 1e-5
    if any(abs(x - kink) <= 2 * h for kink in known.kinks):
        return
    low, high = known.function(np.array([x - h, x + h]))

    assert float(known.derivative(np.array([x]))[0]) == pytest.approx((high - low) / (2 * h), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_huge_inputs_stay_finite_and_silent(name: str) -> None:
    """No activation overflows or warns on inputs as large as floats allow."""
    known = theory.activation(name)
    x = np.array([-1e100, -1e4, -800.0, 800.0, 1e4, 1e100])

    assert np.isfinite(known.function(x)).all()
    assert np.isfinite(known.derivative(x)).all()


def test_the_table_has_every_elementwise_activation_of_torch() -> None:
    """A new activation in torch.nn fails this test until it is added, or named as not elementwise."""
    coupled = {"GLU", "MultiheadAttention", "Softmin", "Softmax", "Softmax2d", "LogSoftmax"}
    offered = set(torch.nn.modules.activation.__all__) - coupled

    assert len({theory.activation(name, **_needed(name)).name for name in offered}) == len(offered)
    assert {theory.activation(name, **_needed(name)).name for name in offered} == set(ACTIVATIONS) - {"identity"}


def _needed(name: str) -> dict[str, float]:
    return {"threshold": 0.1, "value": 20.0} if name == "Threshold" else {}


@pytest.mark.parametrize(
    ("source", "name", "parameters"),
    [
        ("SWISH", "silu", {}),
        ("linear", "identity", {}),
        ("leaky-relu", "leaky_relu", {"negative_slope": 0.01}),
        (nn.ReLU, "relu", {}),
        (nn.functional.gelu, "gelu", {"approximate": "none"}),
        (nn.functional.logsigmoid, "logsigmoid", {}),
        (torch.tanh, "tanh", {}),
        (nn.GELU(approximate="tanh"), "gelu", {"approximate": "tanh"}),
        (type("Renamed", (nn.ELU,), {})(alpha=3.0), "elu", {"alpha": 3.0}),
    ],
)
def test_an_activation_is_found_by_name_module_class_or_function(
    source: Any, name: str, parameters: dict[str, float | str]
) -> None:
    """Whatever people have at hand is understood, with its parameters."""
    known = theory.activation(source)

    assert known.name == name
    assert dict(known.parameters) == parameters
    assert theory.activation(known) is known


def test_equal_activations_are_equal_and_hash_alike() -> None:
    """Two look-ups of the same name and parameters compare equal; other parameters do not."""
    first, second = (theory.activation("elu", alpha=2.0) for _ in range(2))

    assert first == second
    assert hash(first) == hash(second)
    assert first != theory.activation("elu")


def test_prelu_slopes_are_pooled_as_root_mean_square() -> None:
    """One slope per channel: expectations are those of all channels together, the bound is the steepest one's."""
    module = nn.PReLU(num_parameters=2)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.0, -2.0]))

    assert theory.mean_square_derivative(module, 1.0) == pytest.approx((0.5 + 0.5 * (1 + 4)) / 2)
    assert theory.activation(module).derivative_bound == 2.0


@pytest.mark.parametrize(
    ("source", "parameters", "error", "message"),
    [
        ("gleu", {}, ValueError, r"unknown activation 'gleu'\. Did you mean '[a-z]*elu'\? Known are: celu, elu,"),
        ("qqq", {}, ValueError, r"unknown activation 'qqq'\. Known are: celu, elu, .*, threshold\."),
        ("softmax", {}, ValueError, r"'softmax' is not elementwise"),
        (nn.Linear(2, 2), {}, TypeError, r"^Linear is no elementwise activation .*Known are: celu"),
        (3.0, {}, TypeError, r"^float is no elementwise activation that gradguard\.theory knows, got 3\.0"),
        (nn.ELU(), {"alpha": 2.0}, TypeError, r"^the ELU module has its own parameters, got alpha beside it"),
        ("elu", {"slope": 2.0}, TypeError, r"activation 'elu' has no parameter 'slope'; it takes alpha\."),
        ("relu", {"slope": 2.0}, TypeError, r"activation 'relu' has no parameter 'slope'; it takes none\."),
        ("threshold", {"value": 1.0}, TypeError, r"activation 'threshold' needs threshold: activation\('threshol"),
        ("elu", {"alpha": "one"}, TypeError, r"parameter 'alpha' of activation 'elu' must be a number, got 'one'"),
        ("elu", {"alpha": None}, TypeError, r"parameter 'alpha' of activation 'elu' must be a number, got None"),
        ("elu", {"alpha": math.nan}, ValueError, r"parameter 'alpha' of activation 'elu' must be finite, got nan"),
        ("elu", {"alpha": np.ones(2)}, TypeError, r"parameter 'alpha' of activation 'elu' must be a number"),
        ("celu", {"alpha": 0.0}, ValueError, r"activation 'celu' needs alpha > 0, got 0\.0"),
        ("gelu", {"approximate": "erf"}, ValueError, r"needs approximate 'none' or 'tanh', got 'erf'"),
        ("hardtanh", {"min_val": 2.0}, ValueError, r"needs min_val < max_val, got 2\.0 and 1\.0"),
    ],
)
def test_what_is_no_activation_is_refused_with_the_way_out(
    source: Any, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Errors say what came, what is accepted and, for names, the closest one."""
    with pytest.raises(error, match=message):
        theory.activation(source, **parameters)


def test_an_activation_of_ones_own() -> None:
    """A function that torch does not have takes part in the theory like any other."""
    sine = Activation(name="sine", function=np.sin, derivative=np.cos, derivative_bound=1.0)

    assert theory.mean_square(sine, 1.0) == pytest.approx((1 - math.exp(-2.0)) / 2, rel=1e-12)
    assert theory.critical_gain(sine) == pytest.approx(1.0)
    assert theory.chi(replace(sine, kinks=(0.3, 0.7)), sigma_w=1.5) == pytest.approx(theory.chi(sine, sigma_w=1.5))
