"""LSUV: unit output deviation on one batch, and the layers it must not touch."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from gradguard.errors import UnsupportedModelError
from gradguard.remedies.initialization import lsuv
from tests.models import digit_batch, mlp


def output_deviations(model: nn.Module, x: Tensor) -> list[float]:
    """Return the standard deviation of every Linear and convolution output, in order of execution."""
    found: list[float] = []
    handles = [
        module.register_forward_hook(lambda _, __, output: found.append(output.detach().float().std().item()))
        for module in model.modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


def span(model: nn.Sequential, seed: int = 0) -> float:
    """Return the decades by which the gradient at the first layers' outputs lies below that at the last ones'."""
    x, y = digit_batch(64, seed)
    h, outputs = x, []
    for module in model:
        h = module(h)
        if isinstance(module, nn.Linear):
            h.retain_grad()
            outputs.append(h)
    F.cross_entropy(h, y).backward()
    norms = np.log10([output.grad.norm().item() for output in outputs])
    edge = max(1, len(norms) // 8)
    return float(norms[:edge].mean() - norms[-edge:].mean())


def convolutions() -> nn.Sequential:
    """Return a CNN without normalization."""
    convs = [m for _ in range(6) for m in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())]
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 8, 3), nn.ReLU(), *convs, nn.Flatten(), nn.Linear(288, 10)
    )


@pytest.mark.parametrize("orthogonal", [True, False])
@pytest.mark.parametrize("make", [lambda: mlp(20), lambda: mlp(10, nn.Tanh, gain=5.0, init="xavier"), convolutions])
def test_every_output_has_unit_deviation(make: Any, orthogonal: bool) -> None:
    """On the batch each output's deviation is 1 within the tolerance, where at least one was far off."""
    torch.manual_seed(0)
    model, x = make(), digit_batch(100)[0]
    before = output_deviations(model, x)
    applied = lsuv(model, x, orthogonal=orthogonal, generator=0)

    assert max(abs(math.log(value)) for value in before) > 1.0
    assert output_deviations(model, x) == pytest.approx([1.0] * len(before), abs=0.1)
    assert len(applied.changes) == len(before)


def test_tolerance_and_target_are_kept() -> None:
    """A tighter tolerance and another target are met as well."""
    model, x = convolutions(), digit_batch(100)[0]
    lsuv(model, x, std=2.0, tolerance=0.001, generator=0)

    assert output_deviations(model, x) == pytest.approx([2.0] * 8, rel=0.001)


@pytest.mark.parametrize(("init", "gain"), [("default", 1.0), ("he", 0.5), ("he", 2.0)])
def test_repairs_relu_stacks(init: str, gain: float) -> None:
    """Gradients that vanish or explode over 20 ReLU layers come back within half a decade."""
    torch.manual_seed(0)
    model = mlp(20, init=init, gain=gain)
    before = span(model)
    lsuv(model, digit_batch(256, 1)[0], generator=0)

    assert abs(before) > 4.0
    assert abs(span(model)) < 0.5


def test_does_not_repair_deep_sigmoid() -> None:
    """The documentation says so: unit deviation leaves sigmoid's small slope, and the gradient vanishes still."""
    torch.manual_seed(0)
    model = mlp(20, nn.Sigmoid, init="xavier")
    lsuv(model, digit_batch(256)[0], generator=0)

    assert span(model) < -4.0


class Mixed(nn.Module):
    """Every kind of layer that LSUV leaves alone, and two that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 16)
        self.normed = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.twice = nn.Linear(16, 16)
        self.branch = nn.Linear(16, 16)
        self.frozen = nn.Linear(16, 16).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.constant = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)
        nn.init.zeros_(self.branch.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(torch.relu(self.norm(self.normed(torch.relu(self.first(x))))), 0.2)
        x = self.twice(torch.relu(self.twice(x)))
        x = self.frozen(x + self.branch(torch.relu(x)))
        return self.head(x + self.constant(torch.zeros_like(x)))


def test_what_scaling_would_spoil_is_left_alone() -> None:
    """Norm-followed, repeated, zero-initialised, frozen, unused and constant layers keep every bit, with the reason."""
    torch.manual_seed(0)
    model = Mixed()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    applied = lsuv(model, digit_batch(64)[0], generator=0)

    reasons = {
        "normed": "normalization",
        "twice": "used 2 times",
        "branch": "residual branch",
        "frozen": "frozen",
        "unused": "did not run",
        "constant": "does not vary",
    }
    assert applied.skipped.keys() == reasons.keys()
    assert all(reasons[name] in why for name, why in applied.skipped.items())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"first.weight", "first.bias", "head.weight", "head.bias"}


def test_weight_norm_is_scaled_through_its_parametrization() -> None:
    """A weight-normalised layer reaches unit deviation too; an orthogonal one has no scale and is left alone."""
    torch.manual_seed(0)
    x = digit_batch(64)[0]
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Linear(64, 32)),
        nn.ReLU(),
        parametrizations.orthogonal(nn.Linear(32, 32)),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    before = {key: value.clone() for key, value in model[2].state_dict().items()}
    applied = lsuv(model, x, orthogonal=False, generator=0)
    deviations = output_deviations(model, x)

    assert deviations[0] == pytest.approx(1.0, abs=0.1)
    assert deviations[2] == pytest.approx(1.0, abs=0.1)
    assert "parametrized" in applied.skipped["2"]
    assert all(torch.equal(value, before[key]) for key, value in model[2].state_dict().items())


def test_bias_that_cannot_be_scaled_away_is_said() -> None:
    """With a kept bias that varies more than wanted the target cannot be reached, and the line says so."""
    first = nn.Linear(64, 32)
    nn.init.uniform_(first.bias, -5.0, 5.0)
    model = nn.Sequential(first, nn.ReLU(), nn.Linear(32, 4))
    applied = lsuv(model, digit_batch(64)[0], orthogonal=False, max_attempts=3, generator=0)

    assert "not reached in 3 attempts" in applied.changes[0]


def test_one_forward_pass_each_to_look_and_to_scale() -> None:
    """A net of any depth is run twice, not once per layer and attempt."""
    calls = []
    model = mlp(12)
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    lsuv(model, digit_batch(32)[0], generator=0)

    assert len(calls) == 2


@pytest.mark.parametrize("arguments", [{"std": 0.0}, {"tolerance": 1.0}, {"max_attempts": 0}])
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    """Each error names the three numbers and their ranges."""
    with pytest.raises(ValueError, match="std must be positive, tolerance between 0 and 1"):
        lsuv(mlp(3), digit_batch(8)[0], **arguments)


def test_nothing_to_scale_is_said() -> None:
    """Where every layer has a norm behind it there is nothing to do."""
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8))
    with pytest.raises(UnsupportedModelError, match="normalization behind it"):
        lsuv(model, digit_batch(8)[0])
