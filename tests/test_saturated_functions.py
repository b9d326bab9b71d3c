"""Tanh and sigmoid that code calls as functions: saturated units before a layer are measured, told and cured."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard.findings import Cause, Severity
from tests.driving import observe
from tests.models import classification_loss, digit_batch


class Net(nn.Module):
    """Two hidden layers with an activation of the test's."""

    def __init__(self, act: Callable[[Tensor], Tensor], width: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.out = nn.Linear(64, width), nn.Linear(width, width), nn.Linear(width, 10)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        logits: Tensor = self.out(self.act(self.second(self.act(self.first(x)))))
        return logits


def spoilt(model: Net) -> Net:
    """Drive three of every four units of the first layer to an end."""
    with torch.no_grad():
        model.first.weight[::2] *= 0.0
        model.first.bias[::2] = 40.0
        model.first.weight[1::4] *= 0.0
        model.first.bias[1::4] = -40.0
    return model


@pytest.mark.parametrize(("act", "bound"), [(torch.tanh, 1.0), (torch.sigmoid, 0.25), (lambda x: x.tanh(), 1.0)])
def test_derivatives_and_saturated_units_are_those_of_autograd(act: Callable[[Tensor], Tensor], bound: float) -> None:
    """In the row of the layer that takes what the function gave."""
    model, batch = spoilt(Net(act)), digit_batch(32)
    seen = observe(model, lambda: classification_loss(model, batch).backward())

    before = model.first(batch[0]).detach().requires_grad_()
    (slope,) = torch.autograd.grad(act(before).sum(), before)
    assert seen.layer("second")["input_saturated_share"] == float((slope.mean(dim=0) < 0.05 * bound).float().mean())
    assert seen.layer("second")["input_saturated_share"] == 0.75
    assert seen.layer("second")["input_derivative_share"] == pytest.approx(
        float(slope.square().mean().sqrt()) / bound, rel=1e-5
    )
    assert seen.layer("out")["input_saturated_share"] == 0.0
    assert math.isnan(seen.layer("first")["input_saturated_share"])


@pytest.mark.parametrize(
    "act",
    [F.relu, F.gelu, nn.Tanh(), lambda x: torch.tanh(x) * 2.0, lambda x: F.dropout(torch.tanh(x), 0.5)],
    ids=["relu", "gelu", "a module", "scaled", "dropout"],
)
def test_of_other_inputs_nothing_is_said(act: Callable[[Tensor], Tensor]) -> None:
    """ReLU has no ends; a module has a row of its own; what is scaled afterwards has other numbers."""
    model = Net(act)
    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward())

    for name in ("input_saturated_share", "input_derivative_share"):
        assert math.isnan(seen.layer("second")[name])


def test_channels_behind_a_convolution_are_units_and_reshaping_is_looked_past() -> None:
    """The values are the same, wherever they lie."""

    class Images(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.next, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(64, 10)
            with torch.no_grad():
                self.conv.bias.copy_(torch.tensor([30.0, -30.0, 0.0, 0.0]))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.next(torch.tanh(self.conv(x.reshape(-1, 1, 8, 8)))))
            logits: Tensor = self.out(h.flatten(1))
            return logits

    model = Images()
    seen = observe(model, lambda: classification_loss(model, digit_batch(8)).backward())

    assert seen.layer("next")["input_saturated_share"] == 0.5
    assert seen.layer("out")["input_saturated_share"] == 0.0


def test_an_expert_without_examples_is_no_failure() -> None:
    """Nothing is routed to it in this batch."""

    class Routed(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x))
            logits: Tensor = self.out(h) + self.second(torch.tanh(h[x[:, 0] > 99.0])).sum()
            return logits

    diagnosis = gradguard.check(Routed(torch.tanh), digit_batch(16), classification_loss)

    assert not [note for note in diagnosis.unobserved if "layer" in note.what]


@pytest.mark.parametrize(("scale", "found"), [(100.0, True), (1.0, False)], ids=["far off", "standardized"])
def test_data_far_off_into_tanh_as_a_function_are_found_and_named(scale: float, found: bool) -> None:
    """Coordinates in metres."""
    x, y = digit_batch(64)
    diagnosis = gradguard.check(Net(torch.tanh), (x * scale, y), classification_loss)
    findings = [finding for finding in diagnosis.findings if finding.code == "GG302"]

    assert bool(findings) is found
    if found:
        (finding,) = findings
        assert (finding.severity, finding.cause, finding.layer) == (Severity.WARNING, Cause.DATA, "second")
        assert "of the units before second are saturated" in finding.message
        assert 0.0 < float(finding.evidence["activation_gain"].value) < 0.2
        assert finding.prescriptions[0].remedy == "standardize-input"


def test_a_cure_of_such_data_is_found_by_a_trial() -> None:
    """From the check to the winner."""
    data: list[Any] = [(x * 100.0, y) for x, y in (digit_batch(64, seed=seed) for seed in range(40))]
    result = gradguard.trial(
        Net(torch.tanh, 32), data, classification_loss, lambda m: torch.optim.Adam(m.parameters()), run_steps=240
    )

    assert result.best is not None
    assert result.best.remedy in {"standardize-input", "layer-norm"}
    assert result.best.effect is not None
    assert result.best.effect.loss_after < 0.7 * result.best.effect.loss_before
