"""The course of a race: whom it trains for how long, and what it may leave out."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch
from torch import nn

import gradguard
from gradguard._copies import Copies
from gradguard._entrant import Entrant, far_behind
from gradguard._plan import make_plan
from gradguard._race import Batches, Lane, Race, paired_gain
from gradguard._rates import search_rate
from gradguard.prescriptions import plain_prescription
from gradguard.remedies import catalogue
from tests.models import classification_loss
from tests.test_contest import contest, scaled
from tests.test_trials import batches, net, sgd

PLAN = make_plan(3, steps=20)


def ran(*losses: float) -> Lane:
    """Return a copy with these losses."""
    model = nn.Linear(1, 1)
    return Lane("", 0, model, torch.optim.SGD(model.parameters(), lr=1.0), losses=list(losses))


def entrant(*losses: float) -> Entrant:
    """Return a candidate whose copy has these losses."""
    remedy = catalogue.find("clip-norm")
    assert remedy is not None
    return Entrant(prescription=plain_prescription("clip-norm"), remedy=remedy, lanes=[ran(*losses)])


@pytest.mark.parametrize(
    ("illness", "factor", "steps"),
    [("GG501", 1e5, PLAN.before_last), ("GG501", 1e3, PLAN.length), ("", 1e5, PLAN.length)],
    ids=["far ahead of an ill one", "hardly ahead", "nothing is wrong"],
)
def test_an_untreated_copy_that_is_far_behind_takes_no_further_steps(illness: str, factor: float, steps: int) -> None:
    """Its last steps would tell nothing; where nothing is wrong they are what a cure must be measured by."""
    held = contest([("cure", 0, scaled(factor))], illness=illness, plan=PLAN)

    assert held.judgement.control_run().steps == steps
    assert held.judgement.ranking()[0].effect is not None


def test_an_untreated_copy_that_learns_is_trained_to_the_end() -> None:
    """However far behind it is by then: what a cure gains is measured against where it would have come."""
    held = contest([("cure", 0, scaled(8.0))], lr=1e-2, illness="GG502", plan=PLAN)

    best = held.judgement.best()
    assert best is not None
    assert best.effect is not None
    assert held.judgement.control_run().steps == PLAN.length


@pytest.mark.parametrize(("onset", "steps"), [(150, PLAN.length), (0, PLAN.before_last)])
def test_what_came_late_in_a_run_is_looked_for_in_all_steps_of_the_untreated_copy(onset: int, steps: int) -> None:
    """A spike in the last of them would be missed."""
    held = contest([("cure", 0, scaled(1e5))], illness="GG103", onset=onset, plan=PLAN)

    assert held.judgement.control_run().steps == steps


def test_who_is_left_behind_by_far_leaves_before_the_last_steps() -> None:
    """Twice the loss of another after half of them; losses below zero have no multiples."""
    best, near, far = entrant(4.0, 1.0), entrant(4.0, 1.9), entrant(4.0, 2.1)

    assert far_behind([best, near, far], 2) == [far]
    assert far_behind([entrant(0.0, -2.0), entrant(0.0, -0.5)], 2) == []
    assert far_behind([], 2) == []


@pytest.mark.parametrize(("below", "sure"), [(5, True), (4, False)])
def test_five_steps_that_all_tell_the_same_leave_no_doubt(below: int, sure: bool) -> None:
    """However far the untreated copy swings; of four that is one in sixteen."""
    wild = [10.0, 1000.0, 12.0, 4000.0, 11.0][:below]
    gain, error = paired_gain([ran(*wild)], [ran(*[1.0] * 8)])

    assert gain > 0.0
    assert (error == 0.0) is sure


def test_a_shorter_untreated_copy_is_paired_with_the_last_steps_of_a_cure() -> None:
    """What a cure has come to counts, not where it passed through."""
    gain, error = paired_gain([ran(*[1.0] * 5)], [ran(1.0, *[0.9] * 6, *[0.1] * 5)])

    assert gain == pytest.approx(0.9)
    assert error == 0.0


def deep_regression(kind: type[nn.Module]) -> nn.Module:
    """Return a deep sigmoid net with one output, or ten."""
    torch.manual_seed(0)
    model = net(10, activation=nn.Sigmoid, init="xavier")
    if kind is nn.MSELoss:
        model.append(nn.Linear(10, 1))
    return model


@pytest.mark.parametrize(("kind", "steps"), [(nn.MSELoss, 40), (nn.CrossEntropyLoss, 16)])
def test_a_regression_that_batch_norm_leads_goes_on(kind: type[nn.Module], steps: int) -> None:
    """What falls first need not fall furthest; a classifier that has left chance has been told by then."""

    def compute_loss(model: nn.Module, batch: Any) -> torch.Tensor:
        x, _ = batch
        if kind is nn.CrossEntropyLoss:
            return classification_loss(model, batch)
        return (model(x)[:, 0] - (x[:, :8].sum(dim=1) - 2.0)).square().mean()

    model = deep_regression(kind)
    diagnosis = gradguard.check(model, batches()[0], compute_loss)
    result = gradguard.trial(
        model, batches(), compute_loss, sgd(0.05), diagnosis=diagnosis, candidates=["batch-norm", "relu"], run_steps=240
    )

    assert "GG101" in {found.code for found in diagnosis.findings}
    assert {run.steps for run in result.runs if run.outcome in {"best", "helps", "no effect", "worse"}} == {steps}


def sines(seed: int, times: float = 6.0) -> tuple[nn.Module, list[Any]]:
    """Return a net whose first weights are so many times too large, and batches of a sine of two features."""
    draw = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            (nn.init.zeros_ if "bias" in name else nn.init.kaiming_normal_)(parameter)
        model[0].weight.mul_(times)
    points = [3.0 * (2.0 * torch.rand(64, 2, generator=draw) - 1.0) for _ in range(80)]
    return model, [(x, torch.sin(2.0 * x).mean(dim=1) * math.sqrt(2.0)) for x in points]


def fast_adam(model: nn.Module) -> torch.optim.Optimizer:
    """Return Adam at ten times its usual rate."""
    return torch.optim.Adam(model.parameters(), lr=1e-2)


def square(model: nn.Module, batch: Any) -> torch.Tensor:
    """Return the mean square error of a model with one output."""
    return (model(batch[0])[:, 0] - batch[1]).square().mean()


@pytest.mark.parametrize(
    ("seed", "steps"),
    [(2, {40}), (0, {80, 160}), (3, {80, 160})],
    ids=["a normalization leads", "nobody helps in 40 steps", "nor here"],
)
def test_a_saturated_regression_goes_on_to_where_new_weights_show(seed: int, steps: set[int]) -> None:
    """LayerNorm makes of two features little more than their signs; saturated units learn what is easy as fast."""
    model, data = sines(seed)
    diagnosis = gradguard.check(model, data[0], square)
    result = gradguard.trial(model, data, square, fast_adam, diagnosis=diagnosis, run_steps=240)

    assert result.best is not None
    assert result.best.remedy == "xavier-initialization"
    assert result.best.effect is not None
    assert result.best.effect.steps in steps
    assert result.best.effect.loss_after < 0.6 * result.best.effect.loss_before


@pytest.mark.parametrize(("run_steps", "times", "rate"), [(900, 12.0, 3e-3), (1000, 6.0, 1e-3), (5000, 6.0, 1e-3)])
def test_overtime_keeps_to_the_quarter_of_a_run_of_thousands(run_steps: int, times: float, rate: float) -> None:
    """Nobody is let in again whom a check found ill; a run of hundreds may cost more."""
    model, data = sines(0, times)
    diagnosis = gradguard.check(model, data[0], square)
    result = gradguard.trial(
        model,
        data,
        square,
        lambda net: torch.optim.Adam(net.parameters(), lr=rate),
        diagnosis=diagnosis,
        run_steps=run_steps,
    )

    assert all(run.steps <= 16 for run in result.runs if run.remedy == "residual")
    assert run_steps < 1000 or result.cost_steps <= 0.25 * run_steps


@pytest.mark.parametrize(("kind", "raised"), [(nn.MSELoss, True), (nn.CrossEntropyLoss, False)])
def test_a_regression_bears_a_rate_without_the_margin_of_the_search(kind: type[nn.Module], raised: bool) -> None:
    """It is tried, and taken where it does better; a classifier keeps the margin."""
    compute_loss = square if kind is nn.MSELoss else classification_loss
    data = [(x, x[:, :8].sum(dim=1) - 2.0 if kind is nn.MSELoss else y) for x, y in batches()]
    model, remedy = net(init="he"), catalogue.find("lower-learning-rate")
    assert remedy is not None
    searched = Entrant(prescription=plain_prescription("lower-learning-rate"), remedy=remedy)
    Copies(model, Race(Batches(data, 80), compute_loss, base_seed=0), sgd(3.0)).search_rate(searched)
    result = gradguard.trial(model, data, compute_loss, sgd(3.0), candidates=["lower-learning-rate"], run_steps=240)

    assert result.best is not None
    times = float(result.best.arguments["factor"]) / float(searched.prescription.arguments["factor"])
    assert times == pytest.approx(math.sqrt(10.0) if raised else 1.0, rel=0.05)


def test_a_search_goes_on_with_the_copy_that_did_best() -> None:
    """It finds the rate that it would find if each attempt began anew, in three steps less."""
    remedy = catalogue.find("lower-learning-rate")
    assert remedy is not None

    def anew(factor: float, steps: int) -> tuple[float, float]:
        race.advance(lane := Lane("", 0, model := net(init="he"), sgd(30.0 * factor)(model), ratios=[]), steps)
        assert lane.ratios is not None
        return (math.inf if lane.fault else sum(lane.losses[-2:]) / 2), statistics.median(lane.ratios)

    race = Race(Batches(batches(), 40), classification_loss, base_seed=0)
    factor = search_rate(anew, up=False)
    spent = race.steps_taken
    candidate = Entrant(prescription=plain_prescription("lower-learning-rate"), remedy=remedy)
    Copies(net(init="he"), race, sgd(30.0)).search_rate(candidate)

    assert candidate.prescription.arguments["factor"] == pytest.approx(factor)
    assert race.steps_taken - spent == spent - 3
