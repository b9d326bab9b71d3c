"""What a trial does where the prescribed cures do not do: reserves, slower steps, longer races, evaluation mode."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradguard
from gradguard._contest import Contest
from gradguard._copies import Copies
from gradguard._entrant import Entrant
from gradguard._health import Health
from gradguard._judgement import Judgement
from gradguard._measuring import evaluate
from gradguard._mending import first_that_mends
from gradguard._plan import Plan, make_plan
from gradguard._race import Batches, Lane, Race, paired_gain
from gradguard.findings import Finding, Prescription, Severity
from gradguard.preflight import check
from gradguard.prescriptions import plain_prescription
from gradguard.remedies import Applied
from gradguard.remedies.catalogue import Remedy, Target
from gradguard.trials import _prescribed
from tests.models import classification_loss
from tests.test_contest import broken, scaled
from tests.test_trials import Batch, adam, batches, net, sgd


def entrant(name: str, run: Callable[[Target], Applied], level: int = 1) -> Entrant:
    """Return a candidate that acts through the optimizer."""
    return Entrant(
        prescription=replace(plain_prescription("clip-norm"), remedy=name),
        remedy=Remedy(name=name, level=level, acts_on="optimizer", run=run),
    )


def race(
    entrants: list[Entrant],
    reserves: list[Entrant],
    *,
    lr: float,
    code: str = "GG101",
    run_steps: int = 240,
    plan: Plan | None = None,
) -> Contest:
    """Run a contest with reserves."""
    held = Contest(
        net(init="he"),
        Race(Batches(batches(), 40), classification_loss, base_seed=0),
        sgd(lr),
        plan=make_plan(len(entrants), run_steps=run_steps) if plan is None else plan,
        illness=Finding(code=code, name="", family="", severity=Severity.WARNING, message="", step=0, last_step=0),
    )
    held.run(entrants, reserves)
    return held


def outcomes(held: Contest) -> dict[str, str]:
    """Return what became of each candidate."""
    return {run.remedy: run.outcome for run in held.judgement.runs()}


def test_reserves_enter_where_the_prescribed_cures_cannot_be_applied() -> None:
    """Until two are in the race that promise something."""
    reserves = [entrant("third", broken), *(entrant(name, scaled(1e4)) for name in ("fourth", "fifth", "sixth"))]
    held = race([entrant("first", broken), entrant("second", broken)], reserves, lr=1e-6)

    assert outcomes(held).keys() == {"first", "second", "fourth", "fifth"}
    best = held.judgement.best()
    assert best is not None
    assert best.remedy in {"fourth", "fifth"}


def test_reserves_are_called_where_nobody_helps_after_forty_steps() -> None:
    """Two candidates are enough to begin with; when they have done nothing by then, others try."""
    nothing = [entrant(name, scaled(1.0)) for name in ("first", "second")]
    held = race(nothing, [entrant("reserve", scaled(1e7))], lr=1e-9)

    assert outcomes(held)["reserve"] == "best"
    assert held.steps_taken > 3 * 40


def test_reserves_stay_away_where_somebody_helps() -> None:
    """Nobody asks for them."""
    held = race(
        [entrant("helps", scaled(1e4)), entrant("second", scaled(1.0))], [entrant("reserve", scaled(1e4))], lr=1e-6
    )

    assert "reserve" not in outcomes(held)


def squash(x: Tensor) -> Tensor:
    """Return the sigmoid, in code that no class can replace."""
    return torch.sigmoid(x)


class Functional(nn.Module):
    """Twenty layers whose sigmoids are called by a function elsewhere, so that no other can take their place."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(20))
        self.last = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, shape ``[batch, 10]``."""
        for layer in self.layers:
            x = squash(layer(x))
        return self.last(x)


def test_models_that_cannot_be_rewritten_get_what_can_be_done() -> None:
    """The trial says why the others could not be tried."""
    torch.manual_seed(0)
    result = gradguard.trial(Functional(), batches(), classification_loss, adam, run_steps=240)

    why = {run.remedy: run.why for run in result.runs}
    assert "in a function from elsewhere" in why["relu"]
    assert result.best is not None
    assert result.best.remedy == "batch-norm"


def test_a_cure_that_diverges_is_tried_at_a_tenth_of_the_rate_where_nobody_helps() -> None:
    """It mends the layers, and the run's rate is too high for what it made of them."""
    held = race([entrant("fast", scaled(3e9)), entrant("idle", scaled(1.0))], [], lr=1e-9)

    best = held.judgement.best()
    assert best is not None
    assert best.remedy == "fast"
    assert best.arguments["lr_factor"] == 0.1


# ------------------------------------------------------------------------------------------------- what is clear enough


def lane_at(*losses: float, fault: str = "") -> Lane:
    """Return a copy with these losses."""
    model = nn.Linear(1, 1)
    return Lane("", 0, model, torch.optim.SGD(model.parameters(), lr=1.0), losses=list(losses), fault=fault)


@pytest.mark.parametrize(("loss", "clearly"), [(2.21, False), (2.1, True)])
def test_who_is_about_to_leave_chance_has_not_left_it(loss: float, clearly: bool) -> None:
    """2.3 is chance; at 2.21 a classifier may as well stay there."""
    cure = Entrant(prescription=Prescription(remedy="x", reason=""), remedy=entrant("x", scaled(1.0)).remedy)
    cure.lanes = [lane_at(*[loss] * 8)]
    held = Judgement([lane_at(*[2.35] * 8)], [cure], ill=True, mender=None, chance=math.log(10.0))

    assert held.somebody_helps()
    assert held.somebody_helps(clearly=True) is clearly


@pytest.mark.parametrize(("lost", "sure"), [(0, True), (1, True), (3, False)])
def test_a_copy_that_swings_wildly_is_beaten_by_one_below_it_nearly_always(lost: int, sure: bool) -> None:
    """In seven of eight steps, by however much: the median error of such a copy is no measure."""
    wild = [1e-3] * lost + [5.0, 900.0, 7.0, 3e4, 6.0, 80.0, 9.0, 2e3][lost:]
    gain, error = paired_gain([lane_at(*wild)], [lane_at(*[0.3] * 8)])

    assert gain > 0.0
    assert (error == 0.0) is sure


def test_a_copy_whose_first_loss_is_not_finite_is_beaten_by_any_that_trains() -> None:
    """Its gain is infinite, and there is no doubt about it."""
    assert paired_gain([lane_at(math.inf, fault="diverged")], [lane_at(2.0, 1.9)]) == (math.inf, 0.0)


# ------------------------------------------------------------------------------------------------------ evaluation mode


def shifted(count: int = 24, size: int = 32) -> list[tuple[Tensor, Tensor]]:
    """Return batches that are each shifted as a whole: what BatchNorm takes away in training is there in evaluation."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(count, size, 8, generator=random)
    offset = 30.0 * torch.randn(count, 1, 1, generator=random)
    return [(data + shift, data[:, :1]) for data, shift in zip(x, offset, strict=True)]


def squares(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean squared error."""
    return (model(batch[0]) - batch[1]).square().mean()


@pytest.mark.parametrize("shifts", [True, False])
def test_what_only_the_batch_makes_good_does_not_count(shifts: bool) -> None:
    """A loss that is low in training and high in evaluation is the latter; else nothing is added."""
    data = shifted() if shifts else [(y.expand(-1, 8) + 0.1 * torch.randn_like(y), y) for _, y in shifted()]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    lane = Lane("", 0, model, torch.optim.Adam(model.parameters(), lr=1e-2))
    ran = Race(Batches(data, 24), squares, base_seed=0)
    ran.advance(lane, 200)
    before, weights, trained = lane.result, copy.deepcopy(model.state_dict()), model.training
    evaluate(ran, lane)

    assert (lane.beyond > 0.3) is shifts
    assert lane.result == pytest.approx(before + lane.beyond)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model.training is trained
    assert paired_gain([lane_at(*[1.0] * 8)], [lane])[0] == pytest.approx(1.0 - lane.result, abs=0.2 + lane.beyond)


def test_a_model_that_fails_in_evaluation_mode_is_judged_by_training_alone() -> None:
    """Its own code may refuse; that is no fault of the cure."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        if not model.training:
            raise RuntimeError("not in evaluation mode")
        return classification_loss(model, batch)

    model = nn.Sequential(nn.Linear(64, 10), nn.BatchNorm1d(10))
    lane = Lane("", 0, model, sgd(0.01)(model))
    ran = Race(Batches(batches(4), 4), loss, base_seed=0)
    ran.advance(lane, 8)
    evaluate(ran, lane)

    assert (lane.beyond, lane.fault) == (0.0, "")


def normed() -> tuple[Copies, Lane, Race]:
    """Return the copies of a model without BatchNorm, one to which a cure has given it, and their race."""
    ran = Race(Batches(shifted(80), 80), squares, base_seed=0)
    torch.manual_seed(0)
    copies = Copies(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)), ran, sgd(1e-6))
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1))
    return copies, Lane("", 0, model, sgd(0.01)(model)), ran


@pytest.mark.parametrize(("rungs", "looks"), [((40,), [40]), ((16, 80), [16, 64, 72, 80]), ((80, 80), [64, 72, 80])])
def test_a_long_race_evaluates_batch_norm_on_the_way(
    monkeypatch: pytest.MonkeyPatch, rungs: tuple[int, ...], looks: list[int]
) -> None:
    """The mean counts, of this rung alone, and no copy is measured twice at the same step."""
    excess, seen = {16: 9.0, 40: 4.0, 64: math.inf, 72: 0.25, 80: 0.75}, []

    def look(_race: Race, lane: Lane) -> None:
        seen.append(len(lane.losses))
        lane.beyond = excess[seen[-1]]

    monkeypatch.setattr("gradguard._copies.evaluate", look)
    copies, lane, _ = normed()
    for until in rungs:
        copies.advance_to_end(lane, until)

    assert seen == looks
    assert lane.beyond == (4.0 if rungs == (40,) else 0.5)


def test_a_trial_evaluates_batch_norm_that_a_cure_adds_under_every_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only the batch makes good is no cure, whatever the loss in training."""
    seeds: list[int] = []

    def look(_race: Race, lane: Lane) -> None:
        seeds.append(lane.seed)
        lane.beyond = 1000.0

    monkeypatch.setattr("gradguard._copies.evaluate", look)
    torch.manual_seed(0)
    model = net(20, activation=nn.Sigmoid, init="xavier")
    result = gradguard.trial(model, batches(), classification_loss, adam, candidates=["batch-norm", "relu"], steps=16)

    assert seeds == [0, 1]  # where it ends, and not only when all is over
    losses = {run.remedy: (run.loss, run.seeds) for run in result.runs}
    assert losses["batch-norm"][0] > 1000.0  # the mean over both
    assert losses["batch-norm"][1] == 2
    assert losses["relu"][0] < 100.0
    assert result.best is None or result.best.remedy == "relu"


def test_a_cure_that_was_dropped_is_evaluated_before_it_mends(monkeypatch: pytest.MonkeyPatch) -> None:
    """It left the race before anybody looked at it in evaluation mode."""
    monkeypatch.setattr(Health, "_found", lambda _, model: {} if hasattr(model, "treated") else {"GG101": 9.0})
    monkeypatch.setattr("gradguard._copies.evaluate", lambda _, lane: setattr(lane, "beyond", 9.0))
    monkeypatch.setattr(Contest, "_call_back", lambda _: None)

    def mends(target: Target) -> Applied:
        target.model.treated = True  # type: ignore[assignment]
        return scaled(1.0)(target)

    def normalizes(target: Target) -> Applied:
        target.model.treated = True  # type: ignore[assignment]
        target.model[0].spare = nn.BatchNorm1d(3)  # type: ignore[index]
        return scaled(-1e2)(target)  # promises less, and is dropped

    cures = [entrant("normalizes", normalizes), entrant("mends", mends)]
    held = race(cures, [], lr=1e-9, plan=Plan((2, 12), (1,), 1))

    assert outcomes(held) == {"mends": "best", "normalizes": "dropped"}


def test_a_copy_without_batch_norm_is_not_evaluated() -> None:
    """There is nothing that only the batch makes good."""
    copies, _, ran = normed()
    plain = copies.untreated(0)
    copies.advance_to_end(plain, 80)

    assert (len(plain.losses), plain.beyond) == (80, 0.0)
    assert ran.steps_taken == 80


def test_cures_that_leave_the_illness_are_cut_first_where_all_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    """No loss tells one from another there: what does is the flow through them."""
    monkeypatch.setattr(Health, "_found", lambda _, model: {} if hasattr(model, "treated") else {"GG101": 9.0})

    def mends(target: Target) -> Applied:
        target.model.treated = True  # type: ignore[assignment]
        return scaled(-1e2)(target)  # by its loss it promises least

    cures = [*(entrant(name, scaled(1.0)) for name in ("first", "second", "third")), entrant("mends", mends)]
    held = race(cures, [], lr=1e-9, plan=Plan((2, 6, 12), (4, 3), 1, ((20, 3), (40, 0))))

    assert outcomes(held)["mends"] == "best"
    assert sorted(outcomes(held).values()) == ["best", "dropped", "no effect", "no effect"]


@pytest.mark.parametrize(("beyond", "chosen"), [(0.0, "batch-norm"), (0.6, "relu")])
def test_a_cure_that_is_worse_in_evaluation_mode_mends_nothing(beyond: float, chosen: str) -> None:
    """Whatever a check makes of its layers."""
    held, untreated = [entrant(name, scaled(1.0)) for name in ("batch-norm", "relu")], lane_at(*[0.7] * 8)
    for item in held:
        item.lanes = [lane_at(*[0.7] * 8)]
        item.lanes[0].found = 8, {}
    held[0].lanes[0].beyond = beyond
    health = Health(nn.Linear(1, 1), Race(Batches(batches(1), 1), classification_loss, base_seed=0), "GG101")

    mender = first_that_mends(held, untreated, health, {"GG101": 5.0}, "GG101", allowed=0.01)

    assert mender is not None
    assert mender.prescription.remedy == chosen


# ----------------------------------------------------------------------------------------------- what else is looked at


@pytest.mark.parametrize("illness", ["GG111", "GG112"])
def test_a_gradient_that_vanishes_through_time_is_no_cure_for_one_that_explodes(illness: str) -> None:
    """Both count as the illness, by their decades."""
    torch.manual_seed(0)
    model = nn.RNN(4, 24, batch_first=True)
    held = nn.Sequential(model)

    def loss(net: Any, x: Tensor) -> Tensor:
        output: Tensor = net[0](x)[0][:, -1]
        return output.square().mean()

    found = Health(held, Race(Batches([torch.randn(8, 60, 4)], 1), loss, base_seed=0), illness).at_first()

    assert set(found) == {illness}
    assert found[illness] > 5.0


@pytest.mark.parametrize(
    ("code", "scale", "joins"), [("GG101", 300.0, True), ("GG101", 1.0, False), ("GG103", 300.0, False)]
)
def test_raw_features_may_be_behind_any_illness_of_layers(code: str, scale: float, joins: bool) -> None:
    """What drives the first activations to their ends need not be the weights."""
    known = check(net(20), batches(1)[0], classification_loss)
    own = (plain_prescription("he-initialization"),)
    ill = replace(known.findings[0], code=code, severity=Severity.ERROR, prescriptions=own)
    x, y = batches(1)[0]

    cures = _prescribed(replace(known, findings=(ill,)), (scale * x, y), tuple)

    assert ("standardize-input" in [cure.remedy for cure in cures]) is joins


class Columns(nn.Module):
    """An embedding beside raw columns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, kinds: Tensor, columns: Tensor) -> Tensor:
        """Return logits."""
        return self.last(self.first(torch.cat([self.embed(kinds), columns], dim=-1)).tanh())


def test_raw_columns_beside_an_embedding_are_made_standard_and_the_embedding_is_not() -> None:
    """Two of the columns reach far; the third is of usual size, and what an embedding makes is no data."""
    torch.manual_seed(0)
    model = Columns()
    with torch.no_grad():
        model.embed.weight.mul_(100.0)  # far as well, and made by parameters
    columns = torch.randn(64, 3) * torch.tensor([200.0, 1.0, 50.0]) + torch.tensor([1000.0, 0.0, 0.0])
    batch = (torch.randint(0, 5, (64,)), columns)

    applied = gradguard.apply("standardize-input", model, batch=batch)

    first = model.first
    assert isinstance(first, gradguard.remedies.surgery.Standardized)
    assert applied.changes[0].startswith("first: Linear 6>16 reads (x - mean) / deviation of 2 features")
    assert torch.equal(first.mean[[0, 1, 2, 4]], torch.zeros(4))
    assert torch.equal(first.deviation[[0, 1, 2, 4]], torch.ones(4))
    assert float(first.mean[3]) == pytest.approx(float(columns[:, 0].mean()), rel=1e-4)
    assert isinstance(model.last, nn.Linear), "what parameters have made stays as it is"
