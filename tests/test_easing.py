"""Cures whose steps overshoot at the run's own learning rate: found, tried at lower ones, applied so."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import gradguard
from gradguard._easing import does_better
from gradguard._plan import SHARE, make_plan
from gradguard._race import Batches, Lane, Race
from gradguard.prescriptions import plain_prescription, with_rate
from tests.models import classification_loss
from tests.test_trials import adam, batches, net, sgd


def square(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """A parabola whose second derivative is 2 in every weight."""
    return sum((parameter.square().sum() for parameter in model.parameters()), torch.zeros(()))


@pytest.mark.parametrize("rate", [1e-3, 0.25, 0.45, 0.9, 1.2])
def test_along_a_parabola_a_step_gains_one_less_half_its_rate_times_the_curvature(rate: float) -> None:
    """All of what the gradient promises for small steps, half of it to the minimum, less than nothing beyond twice."""
    model = nn.Linear(3, 2).double()
    lane = Lane("", 0, model, torch.optim.SGD(model.parameters(), lr=rate), gains=[])
    Race(Batches([torch.zeros(1)], 1), square, base_seed=0).advance(lane, 3)

    assert lane.gains == pytest.approx([1.0 - rate] * 3)


def test_the_gain_is_that_of_the_same_batch_under_the_same_random_numbers() -> None:
    """Dropout draws again what it drew; else what differs would be its noise. What a clip takes away was promised."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 10))
    lane = Lane("", 0, model, sgd(1e-4)(model), gains=[])
    gradguard.apply("clip-norm", model, optimizer=lane.optimizer)
    data = [(torch.randn(8, 16), torch.randint(0, 10, (8,))) for _ in range(4)]
    Race(Batches(data, 4), classification_loss, base_seed=0).advance(lane, 4)

    assert lane.gains == pytest.approx([1.0] * 4, abs=0.05)


class Table(nn.Module):
    """Two weights that are unlike others: one with sparse gradients, one complex."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(10, 4, sparse=True)
        self.phase = nn.Parameter(torch.full((3, 3), 1.0 + 2.0j))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        """Return half the sum of squares of both."""
        return (self.rows(rows).square().sum() + self.phase.abs().square().sum()) / 2.0


def test_sparse_gradients_and_complex_weights_gain_what_others_do() -> None:
    """Every row once, so that it is a parabola again."""
    model = Table()
    lane = Lane("", 0, model, torch.optim.SGD(model.parameters(), lr=0.2), gains=[])
    Race(Batches([torch.arange(10)], 1), lambda net, rows: net(rows), base_seed=0).advance(lane, 3)

    assert not lane.fault
    assert lane.gains == pytest.approx([0.9] * 3, rel=1e-4)


def test_a_step_against_the_gradient_promises_nothing() -> None:
    """As of an optimizer that has stopped, or that a momentum carries uphill."""
    model = nn.Linear(3, 2)
    lane = Lane("", 0, model, sgd(0.0)(model), gains=[])
    Race(Batches([torch.zeros(1)], 1), square, base_seed=0).advance(lane, 1)

    assert lane.gains is not None
    assert math.isnan(lane.gains[0])


def hasty() -> gradguard.TrialResult:
    """Try normalization on a deep net whose rate is too high for it as well."""
    model = net(20, activation=nn.Tanh, init="small")
    return gradguard.trial(model, batches(), classification_loss, sgd(0.3), candidates=["layer-norm"], run_steps=240)


def test_a_cure_that_overshoots_is_recommended_at_a_lower_rate() -> None:
    """In its arguments, its reason and its code; all copies are trained for longer then, the untreated one too."""
    result = hasty()

    best = result.best
    assert best is not None
    assert best.arguments["lr_factor"] in {0.32, 0.1}
    assert f"At {best.arguments['lr_factor']} times the learning rate" in best.reason
    assert f'group["lr"] *= {best.arguments["lr_factor"]}' in best.code
    assert best.effect is not None
    assert best.effect.steps == result.control.steps == 40
    assert [run.remedy for run in result.runs] == ["layer-norm"]


def test_a_cure_that_keeps_what_it_promises_is_left_at_its_rate() -> None:
    """And costs no further step."""
    model = net(20, activation=nn.Tanh, init="small")
    result = gradguard.trial(model, batches(), classification_loss, sgd(1e-3), candidates=["layer-norm"], run_steps=240)

    assert result.best is not None
    assert "lr_factor" not in result.best.arguments
    assert result.best.effect is not None
    assert result.best.effect.steps == make_plan(1, run_steps=240).length
    assert result.cost_steps == 2 * result.best.effect.steps


def test_a_cure_whose_steps_are_far_too_short_is_recommended_at_a_higher_rate() -> None:
    """Along such steps the loss is a straight line: three times as long they gain three times as much."""
    model = net(20, activation=nn.Tanh, init="small")
    result = gradguard.trial(model, batches(), classification_loss, sgd(3e-4), candidates=["layer-norm"], run_steps=240)

    best = result.best
    assert best is not None
    assert best.arguments["lr_factor"] == 3.2
    assert "At 3.2 times the learning rate: at the run's own its steps are far too short." in best.reason
    assert 'group["lr"] *= 3.2' in best.code
    assert result.cost_steps == 3 * make_plan(1, run_steps=240).length


def test_nobody_looks_further_than_the_steps_that_were_asked_for() -> None:
    """The same trial, whose length is the caller's."""
    model = net(20, activation=nn.Tanh, init="small")
    result = gradguard.trial(model, batches(), classification_loss, sgd(1e-3), candidates=["layer-norm"], steps=24)

    assert result.best is not None
    assert result.cost_steps == sum(run.steps * run.seeds for run in (result.control, *result.runs))


def test_a_cure_that_has_halved_the_loss_is_not_looked_at() -> None:
    """It does well enough, and costs nothing more."""
    model = net(20, activation=nn.Tanh, init="small")
    result = gradguard.trial(model, batches(), classification_loss, sgd(1e-2), candidates=["lsuv"], run_steps=240)

    assert result.best is not None
    assert result.best.effect is not None
    assert result.best.effect.loss_after < 0.5 * math.log(10.0)
    assert result.cost_steps == 2 * result.best.effect.steps


def test_the_lower_rate_is_applied_with_the_cure_and_undone_with_it() -> None:
    """One call, and one back."""
    best = hasty().best
    assert best is not None
    model = net(20, activation=nn.Tanh, init="small")
    optimizer = sgd(0.3)(model)
    weights, groups = copy.deepcopy(model.state_dict()), len(optimizer.param_groups[0]["params"])
    applied = gradguard.apply(best, model, optimizer=optimizer, batch=batches(1)[0], compute_loss=classification_loss)

    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.3 * best.arguments["lr_factor"])
    assert any("learning rate 0.3 > " in line for line in applied.changes)
    assert applied.remedy == "layer-norm"
    applied.undo()
    assert optimizer.param_groups[0]["lr"] == 0.3
    assert len(optimizer.param_groups[0]["params"]) == groups
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_where_the_cure_fails_the_rate_stays_as_it_is() -> None:
    """Both or neither."""
    model = nn.Sequential(nn.Linear(4, 4))
    optimizer = adam(model)
    before = copy.deepcopy(optimizer.state_dict())
    cure = with_rate(plain_prescription("chrono-initialization"), 0.1)

    with pytest.raises(gradguard.UnsupportedModelError):
        gradguard.apply(cure, model, optimizer=optimizer)
    assert optimizer.state_dict() == before
    with pytest.raises(ValueError, match=r"was measured at 0\.1 times the learning rate: pass optimizer="):
        gradguard.apply(cure, model)


def test_a_rate_that_was_searched_gets_another_factor() -> None:
    """There is one rate to set, not two."""
    cure = plain_prescription("lower-learning-rate")
    eased = with_rate(replace(cure, arguments={"factor": 0.01}), 0.1)

    assert dict(eased.arguments) == {"factor": 0.001}
    assert "0.001" in eased.code


@pytest.mark.parametrize(
    ("given", "eased", "better"),
    [(1.0, 0.97, False), (1.0, 0.95, True), (-1.0, -1.05, True), (math.inf, 5.0, True), (math.inf, math.inf, False)],
)
def test_a_lower_rate_must_end_clearly_below(given: float, eased: float, better: bool) -> None:
    """By 4 % of the loss; one that holds does better than one that diverges."""

    def lane(loss: float) -> Lane:
        model = nn.Linear(1, 1)
        return Lane("", 0, model, sgd(0.1)(model), losses=[loss] * 8)

    assert does_better(lane(eased), lane(given), share=0.04) is better


@pytest.mark.parametrize("run_steps", [None, 20, 240, 999, 1000, 1200, 5000, 100_000])
def test_looking_for_a_lower_rate_stays_within_the_quarter_of_a_long_run(run_steps: int | None) -> None:
    """A run of hundreds of steps has no such room; one shorter than the look has no use for it."""
    plan = make_plan(5, run_steps=run_steps)

    assert bool(plan.easing) is (run_steps in {None, 240, 999, 1200, 5000, 100_000})
    if plan.easing and run_steps is not None and run_steps >= 1000:
        assert plan.cost(5) + 3 * max(plan.easing, plan.length) <= SHARE * run_steps
    assert make_plan(5, run_steps=run_steps, steps=40).easing == 0
