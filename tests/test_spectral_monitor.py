"""The spectral monitor: what it reads, that it follows the weights, and that it touches nothing."""

from __future__ import annotations

import copy
import io
import math
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import gradguard
from gradguard import spectra
from gradguard.guard import Guard


class Mixed(nn.Module):
    """A convolution, a recurrent net, attention and a table of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(6, 8, 3, padding=1, stride=2)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.words = nn.Embedding(10, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).mT + self.position + self.words(torch.zeros(5, dtype=torch.int64))
        h, _ = self.rnn(h)
        h, _ = self.attention(h, h, h)
        result: Tensor = self.head(h[:, -1])
        return result


def train(model: nn.Module, x: Tensor, *, steps: int = 12, rate: float = 0.1, **options: Any) -> Guard:
    """Train on a made-up target and observe every step."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    guard = gradguard.watch(model, optimizer, every=1, on_finding="silent", on_error="raise", **options)
    for _ in range(steps):
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        guard.record(loss=loss)
        optimizer.step()
    return guard


def test_every_matrix_that_is_multiplied_is_followed_and_nothing_else() -> None:
    """Gates and projections are rows of their own; positions and embeddings, which no vector meets, have none."""
    torch.manual_seed(0)
    guard = train(Mixed(), torch.randn(4, 6, 10))
    gates = ("input", "forget", "cell", "output")
    expected = {"conv.weight", "attention.out_proj.weight", "head.weight"}
    expected |= {f"rnn.weight_{way}_l0[{gate}]" for way in ("ih", "hh") for gate in gates}
    expected |= {f"attention.in_proj_weight[{part}]" for part in ("query", "key", "value")}
    assert set(guard.history.matrices.names) == expected


def test_the_estimates_follow_the_weights() -> None:
    """After some steps the warm estimates are those of the exact spectra, of the weights before the last update."""
    torch.manual_seed(0)
    model = Mixed()
    guard = train(model, torch.randn(4, 6, 10), steps=40, rate=0.3)
    rows = {name: row for row, name in enumerate(guard.history.matrices.names)}
    sigma, radius = guard.history.matrix("sigma_max")[-1], guard.history.matrix("spectral_radius")[-1]
    recurrent = dict(model.rnn.named_parameters())["weight_hh_l0"]
    for gate, block in zip(("input", "forget", "cell", "output"), recurrent.chunk(4), strict=True):
        row = rows[f"rnn.weight_hh_l0[{gate}]"]
        assert sigma[row] == pytest.approx(spectra.sigma_max(block).value, rel=0.02)
        assert radius[row] == pytest.approx(spectra.spectral_radius(block).value, rel=0.1)
    assert sigma[rows["head.weight"]] == pytest.approx(spectra.sigma_max(model.head.weight).value, rel=0.02)
    assert sigma[rows["conv.weight"]] == pytest.approx(spectra.conv_sigma_max(model.conv, 10).value, rel=0.02)
    assert np.isnan(radius[rows["head.weight"]])


def test_watched_training_is_bit_identical() -> None:
    """Reading spectra touches neither weights nor random numbers."""
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 6, 10)
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    torch.manual_seed(1)
    train(model, x).detach()
    ours = torch.rand(3)
    torch.manual_seed(1)
    for _ in range(12):
        loss = twin(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert torch.equal(torch.rand(3), ours)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


def test_weights_with_nan_give_nan_and_the_estimate_recovers() -> None:
    """One bad weight at one step neither stops the monitor nor spoils what comes after it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    guard = train(model, torch.randn(8, 4), steps=3)
    good = model[0].weight.detach().clone()
    model[0].weight.data[0, 0] = math.nan
    optimizer = guard._optimizers[0]
    for broken in (True, False, False):
        if not broken:
            model[0].weight.data.copy_(good)
            model[0].bias.data.zero_()
            model[1].weight.data.nan_to_num_()
            model[1].bias.data.nan_to_num_()
        loss = model(torch.randn(8, 4)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        guard.record(loss=loss)
        optimizer.step()
    sigma = guard.history.matrix("sigma_max")[:, 0]
    assert np.isnan(sigma[-3])
    assert sigma[-1] == pytest.approx(spectra.sigma_max(good).value, rel=0.2)


def test_parametrized_weights_are_not_read_and_the_report_says_so() -> None:
    """Reading a spectrally normalized weight would advance its own power iteration."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Linear(4, 2))
    guard = train(model, torch.randn(8, 4))
    assert guard.history.matrices.names == ("1.weight",)
    assert any("spectrum of 0" in note.what for note in guard.diagnose().unobserved)


def test_tied_weights_have_one_row() -> None:
    """A matrix that two modules share is measured once, under its first name."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert train(model, torch.randn(8, 4)).history.matrices.names == ("0.weight",)


def test_it_is_off_where_its_rules_are_ignored() -> None:
    """Who wants neither rule pays nothing."""
    guard = train(nn.Linear(4, 2), torch.randn(8, 4), ignore=("spectral",))
    assert len(guard.history.matrices) == 0


def test_a_failure_switches_it_off_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails in reading a spectrum warns once; the other numbers are still there."""
    import gradguard.monitors.spectral as module

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(module, "power_iteration", fail)
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(8, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    guard = gradguard.watch(model, optimizer, every=1, on_finding="silent")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(4):
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
    assert len(caught) == 1
    assert "boom" in str(caught[0].message)
    assert guard.observations == 4
    assert np.isfinite(guard.history.parameter("grad_norm")).all()


def test_a_report_in_depth_has_the_exact_spectra_of_the_weights_now() -> None:
    """Every followed matrix is there with the numbers of the functions, the convolution at its input's size."""
    torch.manual_seed(0)
    model = Mixed()
    guard = train(model, torch.randn(4, 6, 10))
    diagnosis = guard.report(Console(file=io.StringIO(), width=100), deep=True)
    rows = {row.name: row for row in diagnosis.spectra}
    assert set(rows) == set(guard.history.matrices.names)
    assert all(row.certified for row in rows.values())
    block = dict(model.rnn.named_parameters())["weight_hh_l0"][8:16]
    forget = rows["rnn.weight_hh_l0[forget]"]
    assert forget.sigma_max == pytest.approx(spectra.sigma_max(block).value, rel=1e-5)
    assert forget.spectral_radius == pytest.approx(spectra.spectral_radius(block).value, rel=1e-5)
    assert forget.condition == pytest.approx(spectra.condition_number(block), rel=1e-3)
    assert forget.stable_rank == pytest.approx(spectra.stable_rank(block), rel=1e-3)
    assert forget.derivative_bound == 0.25
    assert rows["conv.weight"].input_size == (10,)
    assert rows["conv.weight"].sigma_max == pytest.approx(spectra.conv_sigma_max(model.conv, 10).value, rel=1e-3)
    assert guard.diagnose().spectra == ()
