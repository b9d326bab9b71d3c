"""The search for a learning rate within a trial."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import gradguard
from gradguard._copies import Copies
from gradguard._entrant import Entrant
from gradguard._race import Batches, Lane, Race
from gradguard._rates import search_rate
from gradguard.prescriptions import plain_prescription
from gradguard.remedies import catalogue
from tests.models import classification_loss
from tests.test_trials import batches, net, sgd


def test_a_rate_that_diverges_after_the_search_is_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate of 1 lasts for ten steps: what the race shows of it is begun again at lower ones, by half a decade."""
    monkeypatch.setattr("gradguard._copies.search_rate", lambda _attempt, *, up: 1e-3)

    result = gradguard.trial(
        net(init="he"), batches(), classification_loss, sgd(1000.0), candidates=["lower-learning-rate"], steps=16
    )

    assert result.best is not None
    assert result.best.arguments["factor"] == pytest.approx(1e-3 / math.sqrt(10.0), rel=0.05)
    assert result.best.effect is not None
    assert result.best.effect.loss_after < 2.0


@pytest.mark.parametrize(
    ("kind", "size", "found", "expected"),
    [
        (torch.optim.SGD, 1, 1e-3, 1e-3 / math.sqrt(10.0)),
        (torch.optim.SGD, 3, 1e-3, 1e-3),
        (torch.optim.Adam, 1, 1e-3, 1e-3),
        (torch.optim.SGD, 1, 100.0, 100.0 / math.sqrt(10.0)),
        (torch.optim.SGD, 1, 2.0, 1.0),
    ],
    ids=["single examples", "more of them", "steps of one size", "upwards", "never below the rate that was too low"],
)
def test_single_examples_get_a_wider_margin_where_steps_follow_the_gradient(
    monkeypatch: pytest.MonkeyPatch, kind: type[torch.optim.Optimizer], size: int, found: float, expected: float
) -> None:
    """An example whose gradient is many times the usual comes later than a search ends."""
    name = "higher-learning-rate" if found > 1.0 else "lower-learning-rate"
    monkeypatch.setattr("gradguard._copies.search_rate", lambda attempt, *, up: found if attempt(0.1, 3) else 1.0)
    data = [(x[:size], y[:size]) for x, y in batches()]
    race = Race(Batches(data, 40), classification_loss, base_seed=0)
    cure = catalogue.find(name)
    assert cure is not None
    candidate = Entrant(prescription=plain_prescription(name), remedy=cure)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]

    Copies(net(init="he"), race, make).search_rate(candidate)

    assert candidate.prescription.arguments["factor"] == pytest.approx(expected, rel=0.02)


@given(st.floats(-7.5, 7.5), st.booleans(), st.sampled_from([math.nan, 0.1, 7e-3 * math.sqrt(10.0)]))
def test_the_search_ends_half_a_decade_below_the_best_rate(log: float, up: bool, ratio: float) -> None:
    """On a loss with one minimum, within half a decade of it at most, and never above."""
    if (log > 0) is not up or abs(log) < 1.0:
        return
    factor = search_rate(lambda tried, _steps: (abs(math.log10(tried) - log), ratio), up=up)

    assert log - 0.76 <= math.log10(factor) <= log - 0.24


@given(st.floats(1e-4, 2e-2))
def test_small_steps_leave_the_rate_that_the_search_found(ratio: float) -> None:
    """Lowered by half a decade at most, and by no more than brings the ratio of update to weight to 7e-3."""
    factor = search_rate(lambda tried, _steps: (abs(math.log10(tried) + 3.0), ratio), up=False)

    assert factor * ratio / 1e-3 == pytest.approx(min(ratio, max(7e-3, ratio / math.sqrt(10.0))))


@pytest.mark.parametrize(("ratio_at_1", "expected"), [(1e-7, 1e4), (3e-6, 333.0), (5e-5, 20.0)])
def test_where_no_higher_rate_moves_the_loss_steps_of_usual_size_are_taken(ratio_at_1: float, expected: float) -> None:
    """A net that stands still for fifty steps whatever the rate: 1e-3 of the weights per step, and half a decade up."""
    tried: list[float] = []

    def attempt(factor: float, _steps: int) -> tuple[float, float]:
        tried.append(factor)
        return 2.3 + 1e-3 * factor * ratio_at_1, factor * ratio_at_1

    assert search_rate(attempt, up=True) == pytest.approx(expected, rel=0.01)
    assert max(tried) * ratio_at_1 >= 1e-2, "the search goes on to steps that ought to tell"


def test_downwards_no_rate_is_lower_than_does_good() -> None:
    """Of single examples three tell nothing: a hundredth is as good as a hundred-millionth, and trains."""
    factor = search_rate(lambda tried, _steps: (1.0 + tried / 10.0, tried / 10.0), up=False)

    assert 1e-2 <= factor <= 0.1


@pytest.mark.parametrize(("log", "up", "reached"), [(-5, False, True), (3, True, False)])
def test_rates_that_diverge_end_no_search_downwards(log: int, up: bool, reached: bool) -> None:
    """Where the run's rate is ten thousand times too high the first three decades diverge; upwards the next do too."""
    tried: list[float] = []

    def attempt(factor: float, steps: int) -> tuple[float, float]:
        tried.append(math.log10(factor))
        return (1.0 if factor < 1.01 * 10.0**log and not up else math.inf), 1e-3

    search_rate(attempt, up=up)

    assert any(exponent == pytest.approx(log) for exponent in tried) is reached


def test_the_search_measures_the_steps_that_it_takes() -> None:
    """SGD on one matrix: the ratio of each step is the rate times the gradient over the weight."""
    model = nn.Linear(4, 1, bias=False)
    lane = Lane("", 0, model, torch.optim.SGD(model.parameters(), lr=0.1), ratios=[])
    weight = model.weight.detach().clone()
    Race(Batches([torch.ones(1, 4)], 1), lambda net, x: net(x).sum(), base_seed=0).advance(lane, 1)

    assert lane.ratios is not None
    assert lane.ratios == pytest.approx([0.1 * 2.0 / float(weight.norm())])
