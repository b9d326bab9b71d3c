"""What a trial makes of its race: who guesses, who is called back, what is named where nothing tells."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import gradguard
from gradguard._entrant import Entrant
from gradguard._judgement import Judgement
from gradguard._race import Batches, Lane, Race
from gradguard.findings import Diagnosis, Evidence, Finding, Prescription, Severity
from gradguard.prescriptions import plain_prescription
from gradguard.remedies import catalogue
from gradguard.remedies.catalogue import Remedy
from tests.models import classification_loss
from tests.test_contest import broken, contest, scaled
from tests.test_trials import batches, net, sgd


def found_in_a_run(code: str, remedies: Sequence[str], *, step: int, last_step: int, **evidence: float) -> Diagnosis:
    """Return what a guard may have made of a run: one warning with cures."""
    finding = Finding(
        code=code,
        name="",
        family="",
        severity=Severity.WARNING,
        message="",
        step=step,
        last_step=last_step,
        evidence={name: Evidence(value=value) for name, value in evidence.items()},
        prescriptions=tuple(plain_prescription(name) for name in remedies),
    )
    return Diagnosis(findings=(finding,), verdict="", observations=9, sufficient=True)


@pytest.mark.parametrize(("last_step", "recommended"), [(100, "clip-norm"), (0, None)])
def test_where_nothing_tells_the_first_cure_without_harm_is_named_for_a_run_that_was_ill(
    last_step: int, recommended: str | None
) -> None:
    """At a rate of 1e-9 no loss moves, and no check sees a rate. A check alone, without a run, recommends nothing."""
    diagnosis = found_in_a_run("GG501", ["clip-norm", "adaptive-clip"], step=0, last_step=last_step)
    result = gradguard.trial(net(init="he"), batches(), classification_loss, sgd(1e-9), diagnosis=diagnosis, steps=16)

    assert (None if result.best is None else result.best.remedy) == recommended
    assert ("whether it helps shows in a run" in result.note) is (recommended is not None)


def test_copies_are_trained_at_the_rate_that_the_run_had_climbed_to() -> None:
    """From 1e-4 to 100: what the first steps do not show the trial sees, and lowers the rate of the whole schedule."""
    given: dict[str, Any] = {
        "batches": batches(),
        "compute_loss": classification_loss,
        "make_optimizer": sgd(1e-2),
        "run_steps": 400,
    }
    climbed = found_in_a_run("GG505", ["lower-learning-rate"], step=130, last_step=200, first_lr=1e-2, climbed_lr=100.0)
    level = found_in_a_run("GG505", ["lower-learning-rate"], step=130, last_step=200)

    high = gradguard.trial(net(init="he"), diagnosis=climbed, **given)
    usual = gradguard.trial(net(init="he"), diagnosis=level, **given)

    assert not high.control.loss < 2.5
    assert usual.control.loss < 2.5
    assert high.best is not None
    assert high.best.arguments["factor"] <= 1e-2


def lane_at(loss: float, *, seed: int = 0) -> Lane:
    """Return a copy that has trained for 16 steps and stands at a loss."""
    model = nn.Linear(1, 1)
    losses = [loss * (1.0 + 0.001 * (step % 3)) for step in range(16)]
    return Lane("", seed, model, torch.optim.SGD(model.parameters(), lr=1e-3), losses=losses)


def entrant_at(loss: float, name: str, level: int) -> Entrant:
    """Return a candidate that stands at a loss."""
    remedy = Remedy(name=name, level=level, acts_on="model", run=broken)
    return Entrant(prescription=Prescription(remedy=name, reason=""), remedy=remedy, lanes=[lane_at(loss)])


@pytest.mark.parametrize(
    ("untreated", "invasive", "mild", "best"),
    [
        (2.46, 2.30, 2.31, None),
        (2.46, 2.10, 2.31, "invasive"),
        (4.00, 2.28, 2.31, "mild"),
        (1.50, 1.20, 1.40, "invasive"),
    ],
)
def test_who_guesses_is_as_good_as_any_other_who_does(
    untreated: float, invasive: float, mild: float, best: str | None
) -> None:
    """Ten classes: between 2.23 and 2.53 a classifier has learnt nothing but its last bias."""
    held = Judgement(
        [lane_at(untreated)],
        [entrant_at(mild, "mild", 0), entrant_at(invasive, "invasive", 4)],
        ill=True,
        mender=None,
        chance=math.log(10.0),
    )

    found = held.best()
    assert (None if found is None else found.remedy) == best


def chance_known_to_a_race(model: nn.Module, compute_loss: Callable[[Any, Any], Any]) -> float:
    """Return it after one step of a copy."""
    race = Race(Batches(batches(4), 4), compute_loss, base_seed=0)
    copied = copy.deepcopy(model)
    race.advance(Lane("", 0, copied, sgd(1e-3)(copied)), 1)
    return race.chance


@pytest.mark.parametrize(
    ("remedy", "losses", "chance", "is_open"),
    [
        ("layer-norm", (0.5, 0.6, 1.0), math.nan, True),
        ("layer-norm", (0.3, 0.6, 1.0), math.nan, True),
        ("layer-norm", (0.2, 0.6, 1.0), math.nan, False),
        ("layer-norm", (0.2, 0.6, math.inf), math.nan, False),
        ("xavier-initialization", (0.5, 0.6, 1.0), math.nan, False),
        ("layer-norm", (0.5, 0.6, 1.0), 2.3, False),
        ("layer-norm", (0.999, 1.0, 1.0), math.nan, False),
    ],
    ids=["leads", "others near", "far ahead", "of a diverged one", "adds nothing", "classifier", "helps nobody"],
)
def test_a_regression_that_a_new_module_leads_is_open_until_it_leads_by_far(
    remedy: str, losses: tuple[float, float, float], chance: float, is_open: bool
) -> None:
    """By far ahead of all others, not of the untreated copy alone."""

    def lane(loss: float) -> Lane:
        model = nn.Linear(1, 1)
        return Lane("", 0, model, sgd(0.1)(model), losses=[loss] * 8, fault="" if math.isfinite(loss) else "diverged")

    def entered(name: str, loss: float) -> Entrant:
        known = catalogue.find(name)
        assert known is not None
        return Entrant(prescription=plain_prescription(name), remedy=known, lanes=[lane(loss)])

    leader, other, control = entered(remedy, losses[0]), entered("lsuv", losses[1]), lane(losses[2])
    judgement = Judgement([control], [leader, other], ill=True, mender=None, chance=chance)

    assert judgement.is_open(leader) is is_open


def test_a_loss_that_no_classifier_has_tells_nothing_of_guessing() -> None:
    """The race knows the classes from a cross-entropy alone, and only of nets that begin untrained."""
    model = net(init="he")
    assert chance_known_to_a_race(model, classification_loss) == pytest.approx(math.log(10.0))
    trained = Race(Batches(batches(4), 4), classification_loss, base_seed=0)
    trained.advance(Lane("", 0, model, torch.optim.Adam(model.parameters(), lr=1e-2)), 100)
    assert math.isnan(chance_known_to_a_race(model, classification_loss))
    assert math.isnan(chance_known_to_a_race(model, lambda net, batch: net(batch[0]).square().mean()))


def test_who_was_dropped_and_stood_better_than_the_winner_ends_is_called_back() -> None:
    """One batch in mid-race throws the winner far up, after others were left behind."""
    held = contest([("thrown", 0, scaled(1.0)), ("left", 0, scaled(1e4)), ("worse", 0, scaled(1.0))])
    thrown, left, worse = held._entrants
    thrown.outcome, thrown.out, thrown.lanes[0].losses[:] = "", "", [50.0] * 20
    left.outcome, left.out, left.lanes[0].losses[10:] = "dropped", "behind the others after 10 steps", []
    worse.outcome, worse.out, worse.lanes[0].losses[:] = "dropped", "behind the others after 4 steps", [60.0] * 4
    held._call_back()

    assert not left.out
    assert len(left.lanes[0].losses) == 20
    assert worse.out


def test_what_is_applied_are_the_weights_that_were_measured() -> None:
    """Whatever the state of torch's generator is by then, which stays as it is."""
    model = net(20, activation=nn.Tanh, init="default")
    found = gradguard.trial(model, batches(), classification_loss, sgd(1e-2), candidates=["xavier-initialization"])
    assert found.best is not None
    weights = []
    for seed in (1, 2):
        twin = copy.deepcopy(model)
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        optimizer = sgd(1e-2)(twin)
        gradguard.apply(found.best, twin, optimizer=optimizer, batch=batches(1)[0], compute_loss=classification_loss)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(twin.get_parameter("0.weight"))

    assert torch.equal(*weights)
    assert not torch.equal(weights[0], model.get_parameter("0.weight"))


def test_a_rate_that_is_a_tensor_of_the_callers_stays_as_it_is() -> None:
    """Copies get rates of their own."""
    rate = torch.tensor(1e-2)

    def make(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.Adam(model.parameters(), lr=rate, capturable=False, foreach=False)

    climbed = found_in_a_run("GG505", ["clip-norm"], step=130, last_step=200, first_lr=1e-2, climbed_lr=1.0)
    gradguard.trial(net(init="he"), batches(), classification_loss, make, diagnosis=climbed, steps=8)

    assert float(rate) == pytest.approx(1e-2)
