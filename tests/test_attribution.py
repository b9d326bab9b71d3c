"""The gain of each layer, measured and as mean-field theory predicts it from the weights and the measured slopes."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import gradguard
from gradguard.detectors._attribution import LayerGain, layer_gains, wished_deviation
from gradguard.detectors._depth import trunk
from gradguard.detectors._numbers import signal
from gradguard.records import StepRecord
from tests.models import classification_loss, digit_batch

CRITICAL_RELU = math.sqrt(2.0)


def plain_net(activation: type[nn.Module], sigma_w: float | None, depth: int = 20) -> nn.Sequential:
    """Return a net of width 64 with Gaussian weights of a scale, PyTorch's own initialization for ``None``."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layer = nn.Linear(64, 64)
        if sigma_w is not None:
            nn.init.normal_(layer.weight, std=sigma_w / 8.0)
            nn.init.zeros_(layer.bias)
        layers += [layer, activation()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def observed(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> StepRecord:
    """Return the record of one step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradguard.watch(model, optimizer, every=1, on_finding="silent", on_error="raise") as guard:
        classification_loss(model, batch).backward()
        guard.record()
        optimizer.step()
    return guard.history.records[0]


def gains_of(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> tuple[LayerGain, ...]:
    """Return the gains of one step."""
    record = observed(model, batch)
    return layer_gains(record, trunk(record.layers, signal(record)))


@pytest.mark.parametrize(
    ("activation", "sigma_w"),
    [
        (nn.Sigmoid, 1.0),
        (nn.ReLU, None),
        (nn.ReLU, 0.5 * CRITICAL_RELU),
        (nn.ReLU, 0.8 * CRITICAL_RELU),
        (nn.ReLU, 1.3 * CRITICAL_RELU),
        (nn.ReLU, 2.0 * CRITICAL_RELU),
        (nn.Tanh, 5.0 / 3.0),
        (nn.GELU, 1.5),
    ],
    ids=["sigmoid Xavier", "ReLU default", "0.5 He", "0.8 He", "1.3 He", "2 He", "tanh 5/3", "GELU 1.5"],
)
def test_measured_gain_is_the_predicted_one_within_six_percent(
    activation: type[nn.Module], sigma_w: float | None
) -> None:
    """Width 64, mean over three seeds: algorithms.md, section D."""
    ratios = []
    for seed in range(3):
        torch.manual_seed(seed)
        gains = gains_of(plain_net(activation, sigma_w), digit_batch(128, seed=seed))
        assert len(gains) == 20
        ratios.append(np.mean([math.log(gain.measured / gain.predicted) for gain in gains]))

    assert math.exp(float(np.mean(ratios))) == pytest.approx(1.0, abs=0.06)


def test_convolutions_are_measured_by_their_kernels() -> None:
    """3x3 kernels, stride 1 and 2, two groups: sigma_w is the deviation times the root of fan-in."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for stride, groups in ((1, 1), (1, 2), (2, 1), (1, 1)):
        conv = nn.Conv2d(16 if layers else 1, 16, 3, stride=stride, padding=1, groups=groups if layers else 1)
        nn.init.kaiming_normal_(conv.weight)
        layers += [conv, nn.ReLU()]
    images = digit_batch(128)[0].reshape(-1, 1, 8, 8)
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))
    gains = gains_of(model, (images, digit_batch(128)[1]))[:3]

    assert [gain.weights for gain in gains] == pytest.approx([CRITICAL_RELU] * 3, rel=0.05)
    assert math.log(math.prod(gain.measured / gain.predicted for gain in gains)) / 3 == pytest.approx(0.0, abs=0.2)


def test_theory_says_nothing_across_skips_and_normalizations() -> None:
    """Only a layer whose input is the activation of the layer before it is predicted."""
    torch.manual_seed(0)
    normed = nn.Sequential(
        nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)
    )

    assert [gain.row for gain in gains_of(normed, digit_batch(32))] == [5]


@pytest.mark.parametrize(
    ("activation", "sigma_w"),
    [("ReLU", 1.414), ("Tanh", 1.0), ("GELU", 1.481), ("Sigmoid", math.nan), ("Strange", math.nan), ("", 1.0)],
)
def test_wished_scale_of_the_weights(activation: str, sigma_w: float) -> None:
    """The critical one, or that for unit variance; none where units would sit at their ends."""
    assert wished_deviation(activation) == pytest.approx(sigma_w, abs=1e-3, nan_ok=True)


@pytest.mark.parametrize(
    ("activation", "sigma_w", "end"),
    [
        (nn.ReLU, None, "; a scale of 1.41 would keep the gradient's size"),
        (nn.Sigmoid, 1.0, "; no usual scale of weights makes up for such a slope"),
    ],
)
def test_the_report_says_what_theory_makes_of_it(activation: type[nn.Module], sigma_w: float | None, end: str) -> None:
    """In one sentence, with the reader's own numbers."""
    torch.manual_seed(0)
    model = plain_net(activation, sigma_w)
    diagnosis = gradguard.check(model, digit_batch(128), classification_loss)
    stream = io.StringIO()
    Console(file=stream, width=100).print(diagnosis)
    text = " ".join(stream.getvalue().split())

    assert "theory weights of scale" in text
    assert end in text
