"""Activations that users write themselves: told from other modules, and then treated as torch's own are."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradguard
from gradguard import theory
from gradguard.remedies.initialization import initialize
from gradguard.remedies.initialization._custom import custom_activation, is_activation
from gradguard.remedies.surgery import Normalized, insert_norm, replace_activations
from tests.models import classification_loss
from tests.test_trials import batches, sgd


class Logistic(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Return the sigmoid, by hand."""
        return 1.0 / (1.0 + torch.exp(-x))


class Exponential(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Return exp(x)."""
        return x.exp()


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        """Return x times its sigmoid."""
        return x * torch.sigmoid(x)


class Other(nn.Module):
    """Computes what it is told to."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        """Return what the function makes of it."""
        return self.function(x)


def stack(kind: Callable[[], nn.Module], depth: int = 4, width: int = 32) -> nn.Sequential:
    """Return a net of layers and activations."""
    torch.manual_seed(0)
    sizes = [64, *[width] * depth]
    hidden = [[nn.Linear(a, b), kind()] for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*(module for pair in hidden for module in pair), nn.Linear(width, 10))


@pytest.mark.parametrize(
    ("module", "like", "bound"),
    [(Logistic(), "sigmoid", 0.25), (Swish(), "silu", 1.09984), (Exponential(), "", math.inf)],
    ids=["logistic", "swish", "exp"],
)
def test_what_a_module_computes_is_read_off_it(module: nn.Module, like: str, bound: float) -> None:
    """Function, derivative and the largest of it; the same as the theory has of torch's own."""
    found = custom_activation(module)

    assert found is not None
    assert found.name == type(module).__name__
    assert found.derivative_bound == pytest.approx(bound, rel=1e-3)
    x = np.linspace(-4.0, 4.0, 9)
    function, derivative = (np.exp, np.exp) if not like else (theory.activation(like).function, None)
    assert found.function(x) == pytest.approx(function(x))
    assert found.derivative(x) == pytest.approx((derivative or theory.activation(like).derivative)(x))


@pytest.mark.parametrize(
    "module",
    [
        nn.Tanh(),
        nn.Linear(3, 3),
        nn.Sequential(Logistic()),
        Other(lambda x: x),
        Other(lambda x: 3.0 * x + 1.0),
        Other(lambda x: x.detach().exp()),
        Other(lambda x: x.softmax(-1)),
        Other(lambda x: x / x.norm()),
        Other(lambda x: x + torch.rand_like(x)),
        Other(lambda x: x.cumsum(0)),
        Other(lambda x: x.flatten()[:5]),
        Other(lambda x: (x, x)),
        Other(lambda x: x.float().tanh()),
        Other(lambda x: x.view(7)),
        Other(lambda x: x.round()),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_activation_of_the_authors_own(module: nn.Module) -> None:
    """Torch's, layers, what mixes entries, is a straight line, passes no gradient, draws or fails."""
    assert custom_activation(module) is None
    assert is_activation(module) is isinstance(module, nn.Tanh)


def test_norms_are_inserted_before_them_and_weights_drawn_for_them() -> None:
    """Exactly where and as for torch's sigmoid."""
    x = torch.randn(16, 64)
    own, torchs = stack(Logistic), stack(nn.Sigmoid)

    insert_norm(own, "batch", batch=x)
    insert_norm(torchs, "batch", batch=x)

    assert [isinstance(m, Normalized) for m in own] == [isinstance(m, Normalized) for m in torchs]
    assert torch.allclose(own(x), torchs(x), atol=1e-6)
    own, torchs = stack(Logistic), stack(nn.Sigmoid)
    initialize(own, "he", batch=x, generator=0)
    initialize(torchs, "he", batch=x, generator=0)
    for name, parameter in own.named_parameters():
        assert torch.allclose(parameter, torchs.get_parameter(name), rtol=1e-3), name


@pytest.mark.parametrize(("kind", "replaced"), [(Logistic, True), (Exponential, True), (Swish, False)])
def test_those_that_saturate_or_have_no_bound_are_replaced(kind: Callable[[], nn.Module], replaced: bool) -> None:
    """By ReLU; one that does neither is left alone, unless it is named. Undone, they are back."""
    model, x = stack(kind), torch.randn(16, 64)
    before = list(model)
    if not replaced:
        with pytest.raises(gradguard.UnsupportedModelError, match="found nothing to change"):
            replace_activations(model, "relu", batch=x)
        replace_activations(model, "relu", batch=x, modules=["1"])
        assert [type(m).__name__ for m in model if not isinstance(m, nn.Linear)] == ["ReLU", *["Swish"] * 3]
        return
    applied = replace_activations(model, "relu", batch=x, initialize_layers=True)

    assert sum(isinstance(m, nn.ReLU) for m in model) == 4
    applied.undo()
    assert list(model) == before


def test_looking_leaves_a_module_as_it_was() -> None:
    """Mode and random state, too, where it draws numbers."""
    model = nn.Sequential(nn.Linear(64, 8), Other(lambda x: torch.nn.functional.dropout(x).tanh()), nn.Linear(8, 10))
    x, weights = torch.randn(4, 64), copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()

    insert_norm(model, "layer", batch=x, dry_run=True)

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_net_that_overflows_at_once_has_cures_to_try() -> None:
    """Ten layers of exp(x): the first loss is not finite, and what keeps it finite helps."""
    model, data = stack(Exponential, depth=10, width=64), batches()
    diagnosis = gradguard.check(model, data[0], classification_loss)

    result = gradguard.trial(model, data, classification_loss, sgd(0.01), diagnosis=diagnosis, run_steps=240)

    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG202"
    assert result.best is not None
    assert result.best.remedy == "relu"
    assert math.isinf(result.control.loss)
