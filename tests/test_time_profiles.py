"""The gradient through time, from a record to the chart in a report."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gradguard
from gradguard.detectors.temporal import time_profiles
from gradguard.findings import Diagnosis, Severity
from gradguard.history import History
from gradguard.profiles import TimeProfile
from gradguard.records import LayerTable, OptimizerInfo, RunInfo, StepRecord, TemporalProfile
from tests import report_fixtures as made
from tests.test_report import drawn_lines, printed

BLOCKS = " ▁▂▃▄▅▆▇█"


def record(step: int, *, optimizer: int = 0, factor: float = 0.5, horizon: float = 3.3) -> StepRecord:
    """Return an observation of an LSTM and a plain RNN, of which only the first was followed."""
    table = LayerTable(
        names=("lstm", "rnn"),
        types=("LSTM", "RNN"),
        kinds=("LSTM 4>8", "RNN 8>8"),
        roles=("recurrent", "recurrent"),
        derivative_bounds=(math.nan, math.nan),
    )
    distance = np.arange(10.0)
    memory = factor**distance
    numbers = {"span": -2.6, "factor": factor, "horizon": horizon, "steps": 10.0, "reach": 0.0}
    values = {f"temporal_{name}": np.array([value, math.nan]) for name, value in numbers.items()}
    profile = TemporalProfile(
        distance=distance, injected=memory, hidden=3 * memory, cell=memory, input=memory, memory=memory
    )
    return StepRecord(
        step=step,
        optimizer=optimizer,
        layers=table,
        layer_values=values | {"gate_mean": np.array([0.73, math.nan])},
        profiles={"lstm": profile},
    )


def test_a_profile_has_the_newest_numbers_of_its_module() -> None:
    """Curves and numbers are those of the last observation; a module that was not followed has no profile."""
    history = History()
    history.append(record(0, factor=0.9))
    history.append(record(1, factor=0.5))

    (profile,) = time_profiles(history, [])

    assert (profile.name, profile.kind, profile.steps, profile.mark) == ("lstm", "LSTM 4>8", 10, "")
    assert (profile.factor, profile.horizon, profile.span) == (0.5, 3.3, -2.6)
    assert (profile.gate, profile.gate_name) == (0.73, "forget gate")
    assert profile.distance == tuple(range(10))
    assert profile.memory == tuple(0.5**at for at in range(10))
    assert profile.loss_gradient == tuple(3 * 0.5**at for at in range(10))


def test_the_optimizer_whose_finding_it_is_owns_the_profile() -> None:
    """A module seen by two optimizers is shown once, as the one saw it in whose steps it was found ill."""
    names = ("first", "second")
    optimizers = tuple(OptimizerInfo(name="SGD", label=name) for name in names)
    history = History(RunInfo(optimizers=optimizers))
    history.append(record(0, optimizer=0, factor=0.9))
    history.append(record(0, optimizer=1, factor=0.5))
    finding = replace(made.recurrent().findings[0], layer="lstm", layers=("lstm",), optimizer="second")
    cleared = replace(finding, resolved_step=7)

    (marked,) = time_profiles(history, [finding])
    (unmarked,) = time_profiles(history, [cleared])

    assert (marked.mark, marked.factor) == ("GG111", 0.5)
    assert (unmarked.mark, unmarked.factor) == ("", 0.9)


class _Tagger(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = kind(3, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return torch.as_tensor(self.head(self.rnn(batch)[0][:, -1]))


def checked(kind: Callable[..., nn.RNNBase], *, steps: int = 40) -> tuple[_Tagger, torch.Tensor, Diagnosis]:
    """Return a model, its batch, and what a check says of them."""
    torch.manual_seed(0)
    model, batch = _Tagger(kind), torch.randn(4, steps, 3)
    return model, batch, gradguard.check(model, batch, lambda m, x: m(x).square().mean())


@pytest.mark.parametrize(("kind", "gate"), [(nn.LSTM, "forget gate"), (nn.GRU, "update gate"), (nn.RNN, "")])
def test_a_check_of_a_recurrent_net_brings_its_profile(kind: Callable[..., nn.RNNBase], gate: str) -> None:
    """The profile of a default start falls, and its factor is the slope of its own curve."""
    _, _, diagnosis = checked(kind)
    (profile,) = diagnosis.time_profiles

    slope = np.polyfit(profile.distance, np.log10(profile.memory), 1)[0]
    assert profile.name == "rnn"
    assert profile.gate_name == gate
    assert math.isfinite(profile.gate) is bool(gate)
    assert profile.mark == "GG111"
    assert 10.0**slope == pytest.approx(profile.factor, rel=0.05)
    assert [entry["name"] for entry in diagnosis.to_dict()["time_profiles"]] == ["rnn"]
    assert diagnosis.to_dict()["time_profiles"][0]["memory"] == list(profile.memory)


def test_a_profile_agrees_with_autograd() -> None:
    """The loss gradient at the states of a plain RNN is what autograd finds in a hand-written loop."""
    model, batch, diagnosis = checked(nn.RNN)
    (profile,) = diagnosis.time_profiles
    rnn, state, states = model.rnn, torch.zeros(4, 16), []
    for step in range(batch.shape[1]):
        drive = batch[:, step] @ rnn.weight_ih_l0.T + rnn.bias_ih_l0 + rnn.bias_hh_l0
        state = torch.tanh(drive + state @ rnn.weight_hh_l0.T)
        states.append(state)
    gradients = torch.autograd.grad(model.head(state).square().mean(), states)

    norms = [float(gradient.norm()) for gradient in reversed(gradients)]
    chosen = [norms[int(distance)] for distance in profile.distance]
    assert profile.loss_gradient == pytest.approx(chosen, rel=1e-3)


def test_a_net_without_recurrence_has_no_profile() -> None:
    """Nothing is drawn and nothing is in the JSON where nothing is recurrent."""
    torch.manual_seed(0)
    diagnosis = gradguard.check(nn.Linear(3, 1), torch.randn(4, 3), lambda m, x: m(x).square().mean())

    assert diagnosis.to_dict()["time_profiles"] == []
    assert "through time" not in printed(diagnosis, show_all=True)


# ------------------------------------------------------------------------------------------------------------ drawing


def heights(diagnosis: Diagnosis, width: int) -> list[int]:
    """Return the height of each column of the first chart, in eighths of a line."""
    lines = drawn_lines(diagnosis, width, show_all=True)
    start = next(index for index, line in enumerate(lines) if (" 1e" in line and "█" in line) or "▁" in line)
    rows = lines[start : start + 4]
    left = rows[-1].index("1e") + len(rows[-1].split()[0]) + 1
    cells = [row[left:].ljust(len(rows[-1])) for row in rows]
    return [sum(BLOCKS.index(row[column]) for row in cells) for column in range(len(rows[-1]) - left)]


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_steady_decay_is_a_straight_line(width: int) -> None:
    """On the log scale a constant factor falls by the same height everywhere, over the whole width."""
    ill = made.recurrent()
    drawn = heights(replace(ill, time_profiles=ill.time_profiles[:1]), width)
    line = np.linspace(drawn[0], drawn[-1], len(drawn))

    assert len(drawn) > width - 12
    assert np.abs(np.array(drawn) - line).max() <= 1.0
    assert drawn[0] > 25
    assert drawn[-1] >= 1


def test_what_underflows_is_blank_and_said() -> None:
    """Beyond what float32 holds nothing is drawn, and a sentence says from where on."""
    text = printed(made.recurrent())

    assert "nothing left that float32 can hold beyond 37 steps" in text
    ill = made.recurrent()
    drawn = heights(replace(ill, time_profiles=ill.time_profiles[1:2]), 80)
    assert len(drawn) == pytest.approx(37 / 63 * 70, abs=2)


def test_sick_modules_are_drawn_in_every_report_others_on_request() -> None:
    """A module with a finding is always drawn; one that keeps its gradient only where everything is shown."""
    ill = made.recurrent()

    assert "decoder · GRU" not in printed(ill)
    assert "encoder.rnn · LSTM" in printed(ill)
    assert "decoder · GRU" in printed(ill, show_all=True)


def test_many_modules_are_counted() -> None:
    """Of ten sick modules three are drawn."""
    ill = made.recurrent()
    many = tuple(replace(ill.time_profiles[0], name=f"rnn.{at}") for at in range(10))
    text = printed(replace(ill, time_profiles=many))

    assert text.count("LSTM 8>32 · GG111") == 3
    assert "and 7 more (show_all=True)" in text


def test_a_note_gets_a_line_and_an_illness_a_chart() -> None:
    """Who is well is told so in a few lines: the curve under a note takes one."""
    note = printed(made.recurrent_healthy())

    assert made.recurrent_healthy().healthy is True
    assert made.recurrent_healthy().findings[0].severity is Severity.INFO
    assert sum(any(block in line for block in "▁▂▃") for line in note.splitlines()) == 1
    assert "1e-1 to 1e-14 over 63 time steps back" in note


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_nothing_finite_is_said_in_words(value: float) -> None:
    """A profile without a finite, positive number is no empty chart."""
    ill = made.recurrent()
    profile: TimeProfile = replace(ill.time_profiles[0], memory=(value,) * 64)

    assert "nothing to draw: no finite gradient came through" in printed(replace(ill, time_profiles=(profile,)))
