"""The contest of a trial: who enters, who is dropped, who wins, and what stands in the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradguard
from gradguard._contest import Contest
from gradguard._entrant import Entrant
from gradguard._health import Health
from gradguard._plan import Plan, make_plan
from gradguard._race import Batches, Lane, Race, paired_gain
from gradguard.errors import UnsupportedModelError
from gradguard.findings import Finding, Prescription, Severity
from gradguard.preflight import check
from gradguard.prescriptions import prescribe
from gradguard.remedies import Applied, catalogue
from gradguard.remedies.catalogue import Remedy, Target
from gradguard.trials import _prescribed
from tests.models import classification_loss
from tests.test_trials import adam, batches, net, sgd

# ------------------------------------------------------------------------------------------- what joins, what is left


def diverged(model: nn.Module, make: Callable[[nn.Module], torch.optim.Optimizer], data: list[Any]) -> Any:
    """Return the diagnosis of a run under a guard."""
    optimizer = make(model)
    with gradguard.watch(model, optimizer, on_finding="silent") as guard:
        for batch in data:
            optimizer.zero_grad()
            loss = classification_loss(model, batch)
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
    return guard.diagnose()


def test_weights_that_are_too_large_are_tried_where_the_rate_is_what_a_guard_sees() -> None:
    """Three times He's weights diverge at the first step: a rate that is too high, and new weights cure it."""

    def large() -> nn.Module:
        model = net(5, init="he")
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, nn.Linear):
                    layer.weight.mul_(3.0)
        return model

    diagnosis = diverged(large(), sgd(0.02), batches(20))

    result = gradguard.trial(large(), batches(), classification_loss, sgd(0.02), diagnosis=diagnosis, run_steps=240)

    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG501"
    assert result.best is not None
    assert result.best.remedy == "lsuv"


@pytest.mark.parametrize(("code", "joined"), [("GG501", True), ("GG103", False)])
def test_what_a_check_remarks_on_the_first_weights_joins_illnesses_of_training(code: str, joined: bool) -> None:
    """At most six are tried in all; a spike is no matter of the weights."""
    known = prescribe(check(net(20), batches(1)[0], classification_loss))
    remarks = replace(known.findings[0], severity=Severity.INFO)
    own = tuple(Prescription(remedy=name, reason="") for name in ("lower-learning-rate", "clip-norm", "warm-up"))
    ill = replace(remarks, code=code, severity=Severity.ERROR, prescriptions=own)

    cures = _prescribed(replace(known, findings=(ill,)), batches(1)[0], lambda: (remarks,))

    names = [cure.remedy for cure in cures]
    assert names[:3] == ["lower-learning-rate", "clip-norm", "warm-up"]
    assert names[3:] == ([cure.remedy for cure in remarks.prescriptions][:4] if joined else [])
    assert len([name for name in names if catalogue.find(name) is not None]) == (6 if joined else 2)


def test_raw_features_are_made_standard_where_the_rate_is_what_a_guard_sees() -> None:
    """Pixels from 0 to 255 under SGD."""
    raw = [(120.0 * x + 128.0, y) for x, y in batches()]
    diagnosis = diverged(net(init="he"), sgd(0.02), raw[:20])

    result = gradguard.trial(net(init="he"), raw, classification_loss, sgd(0.02), diagnosis=diagnosis, run_steps=240)

    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG501"
    assert result.best is not None
    assert result.best.remedy == "standardize-input"


def test_an_event_that_does_not_show_leaves_what_prevents_it() -> None:
    """A spike at step 900 is not in these batches: layers are not changed for it, and clipping does no harm."""
    found = check(net(20), batches(1)[0], classification_loss)
    names = ("batch-norm", "clip-norm", "lower-learning-rate")
    spike = replace(
        found.findings[0],
        code="GG103",
        step=900,
        severity=Severity.WARNING,
        consequence_of=None,
        prescriptions=tuple(Prescription(remedy=name, reason="", arguments={"max_norm": 50.0}) for name in names),
    )
    spike = replace(
        spike,
        prescriptions=tuple(
            cure if cure.remedy == "clip-norm" else replace(cure, arguments={}) for cure in spike.prescriptions
        ),
    )

    result = gradguard.trial(
        net(init="he"), batches(), classification_loss, adam, diagnosis=replace(found, findings=(spike,)), run_steps=240
    )

    outcomes = {run.remedy: (run.outcome, run.why) for run in result.runs}
    assert outcomes["batch-norm"] == ("dropped", "what began at step 900 does not show here")
    assert result.best is not None
    assert result.best.remedy == "clip-norm"
    assert "does not show in them" in result.note
    assert result.cost_steps <= 60


def test_against_a_copy_that_diverged_the_best_cure_counts_and_not_the_mildest() -> None:
    """All gain the same against infinity."""
    held = contest([("little", 0, scaled(1e-13)), ("much", 4, scaled(1e-8))], lr=1e6)
    best = held.judgement.best()

    assert held.judgement.control_run().why == "diverged"
    assert best is not None
    assert best.remedy == "much"


# --------------------------------------------------------------------------------------------------------- the contest


def scaled(factor: float) -> Callable[[Target], Applied]:
    """Return a remedy that multiplies the learning rate, whatever it is called."""

    def run(target: Target) -> Applied:
        assert target.optimizer is not None
        for group in target.optimizer.param_groups:
            group["lr"] *= factor
        return Applied(model=target.model, remedy="test", changes=(), changed=())

    return run


def broken(_: Target) -> Applied:
    """Fail as a remedy may."""
    raise UnsupportedModelError("this model has no place for it")


def contest(
    entrants: list[tuple[str, int, Callable[[Target], Applied]]],
    *,
    lr: float = 1e-6,
    illness: str = "",
    onset: int = 0,
    plan: Plan | None = None,
) -> Contest:
    """Run remedies of the test's own against each other."""
    model = net(init="he")
    held = Contest(
        model,
        Race(Batches(batches(), 40), classification_loss, base_seed=0),
        sgd(lr),
        plan=make_plan(3, steps=20) if plan is None else plan,
        illness=None
        if not illness
        else Finding(
            code=illness, name="", family="", severity=Severity.WARNING, message="", step=onset, last_step=onset
        ),
    )
    held.run(
        [
            Entrant(
                prescription=Prescription(remedy=name, reason=""),
                remedy=Remedy(name=name, level=level, acts_on="optimizer", run=run),
            )
            for name, level, run in entrants
        ]
    )
    return held


def test_one_huge_loss_is_an_outlier_and_two_are_a_divergence() -> None:
    """A batch with a wild target must not end the copy that clipping has saved."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    wild = [(x, (1e4 if step == 4 else 1.0) * x[:, :1]) for step in range(16)]
    torch.manual_seed(0)

    result = gradguard.trial(
        nn.Linear(8, 1),
        wild,
        lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        sgd(0.02),
        candidates=["clip-norm"],
        steps=16,
    )

    assert result.best is not None
    assert result.best.remedy == "clip-norm"
    assert result.control.loss > 100.0 * result.runs[0].loss


@pytest.mark.parametrize(("lr", "recommended"), [(1e-9, True), (0.05, False)])
def test_an_untreated_copy_that_learns_needs_no_cure_by_health_alone(
    monkeypatch: pytest.MonkeyPatch, lr: float, recommended: bool
) -> None:
    """What a check finds before the first step counts only where no loss moves: who learns outgrows it."""
    begun = net(init="he").state_dict()["0.weight"]

    def found(_self: Contest, model: nn.Module) -> dict[str, float]:
        untrained = bool(torch.allclose(model.get_parameter("0.weight"), begun, atol=1e-4))
        return {"GG101": 4.0} if untrained and not hasattr(model, "treated") else {}

    monkeypatch.setattr(Health, "_found", found)

    def treat(target: Target) -> Applied:
        target.model.treated = True  # type: ignore[assignment]
        return Applied(model=target.model, remedy="test", changes=(), changed=())

    held = contest([("mends", 0, treat)], lr=lr, illness="GG101")

    assert (held.judgement.best() is not None) is recommended
    assert held.goes_by_health is recommended


def test_of_cures_that_do_the_same_the_least_invasive_is_recommended() -> None:
    """Equal effects, different depths of intervention."""
    held = contest([("surgery", 4, scaled(1e4)), ("rate", 0, scaled(1e4)), ("weights", 1, scaled(1e4))])
    best = held.judgement.best()

    assert best is not None
    assert best.remedy == "rate"


def test_a_cure_that_does_clearly_more_wins_however_invasive() -> None:
    """A tenth of the rate is worth less than the whole."""
    held = contest([("surgery", 4, scaled(1e4)), ("rate", 0, scaled(30.0))])
    best = held.judgement.best()

    assert best is not None
    assert best.remedy == "surgery"


def test_a_remedy_that_fails_is_told_and_stops_nobody() -> None:
    """It does not fit this model; the others run."""
    held = contest([("broken", 2, broken), ("rate", 0, scaled(1e4))])
    outcomes = {run.remedy: (run.outcome, run.why) for run in held.judgement.runs()}

    assert outcomes["broken"] == ("not possible", "this model has no place for it")
    assert outcomes["rate"][0] == "best"


def test_a_copy_that_blows_up_is_out() -> None:
    """A rate of 10^9 times the usual."""
    outcomes = {
        run.remedy: run.outcome
        for run in contest([("wild", 0, scaled(1e12)), ("rate", 0, scaled(1e4))]).judgement.runs()
    }

    assert outcomes == {"rate": "best", "wild": "diverged"}


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (lambda loss: loss.detach(), "UnsupportedModelError: the loss depends on no trainable parameter"),
        (lambda loss: {"loss": loss.expand(3)}, "ValueError: compute_loss must return a scalar, got a tensor of shape"),
        (lambda loss: {"value": loss}, "TypeError: compute_loss must return a scalar tensor"),
    ],
    ids=["detached", "not a scalar", "no loss"],
)
def test_a_loss_that_cannot_be_used_stops_the_copy_and_says_so(given: Callable[[Tensor], Any], why: str) -> None:
    """In the words of a check; nothing is raised, as another copy may be well."""
    model = net()
    lane = Lane("", 0, model, adam(model))
    race = Race(Batches(batches(2), 2), lambda m, b: given(classification_loss(m, b)), base_seed=0)

    race.advance(lane, 4)

    assert lane.fault.startswith(why)
    assert not lane.losses


def test_gain_is_paired_by_step_and_infinite_losses_do_not_count_as_gain() -> None:
    """A control that diverged is taken at its worst finite loss."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    control = Lane("", 0, model, optimizer, losses=[3.0, 2.0, 4.0, math.inf], fault="diverged")
    treated = Lane("x", 0, model, optimizer, losses=[3.0, 1.0, 1.0, 1.0])

    gain, _ = paired_gain([control], [treated])
    assert gain == pytest.approx(4.0 - 1.0)
    assert paired_gain([treated], [control])[0] == -math.inf


def test_half_of_the_decades_count_where_no_cure_takes_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cures that leave something of the illness the one that leaves less, and neither where that is much."""
    left = {"": 15.5, "little": 3.7, "some": 5.0, "much": 12.0}
    monkeypatch.setattr(Health, "_found", lambda _, model: {"GG111": left[getattr(model, "treated", "")]})

    def treat(name: str) -> Callable[[Target], Applied]:
        def run(target: Target) -> Applied:
            target.model.treated = name  # type: ignore[assignment]
            return Applied(model=target.model, remedy="test", changes=(), changed=())

        return run

    several = contest([(name, 0, treat(name)) for name in ("much", "some", "little")], lr=1e-9, illness="GG111")
    useless = contest([("much", 0, treat("much"))], lr=1e-9, illness="GG111")

    best = several.judgement.best()
    assert best is not None
    assert best.remedy == "little"
    assert {run.remedy: run.healthy for run in several.judgement.runs()}["little"] is False
    assert several.steps_taken == 2 * 4 * 20, "memory takes hundreds of steps: no overtime where a check tells"
    assert useless.judgement.best() is None


def test_random_states_of_the_devices_of_the_model_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A seed is set on every device, so that of each device of the model is kept; none is at hand here."""
    forked: list[list[int]] = []
    fork = torch.random.fork_rng

    def recorded(devices: list[int]) -> Any:
        forked.append(devices)
        return fork(devices=[])

    for module in ("gradguard._copies", "gradguard._race"):
        monkeypatch.setattr(f"{module}.cuda_devices", lambda model: [5])
    monkeypatch.setattr(torch.random, "fork_rng", recorded)

    contest([("rate", 0, scaled(1e4))])

    assert len(forked) > 20
    assert all(devices == [5] for devices in forked)


def test_a_model_that_cannot_be_checked_is_tried_all_the_same() -> None:
    """Its diagnosis is known; what a check would add is not, and that is no reason to stop."""
    found = check(net(20), batches(1)[0], classification_loss)
    cures = (Prescription(remedy="lower-learning-rate", reason=""), Prescription(remedy="clip-norm", reason=""))
    ill = replace(found.findings[0], code="GG501", severity=Severity.ERROR, prescriptions=cures)

    result = gradguard.trial(
        net(init="he"),
        batches(),
        lambda _model, _batch: torch.zeros(3),
        adam,
        diagnosis=replace(found, findings=(ill,)),
        steps=4,
    )

    assert result.best is None
    assert {run.outcome for run in result.runs} == {"diverged"}
    assert all("compute_loss must return a scalar" in run.why for run in result.runs)


@pytest.mark.parametrize(("illness", "overtime"), [("GG111", False), ("GG101", True)])
def test_memory_is_judged_by_a_check_without_overtime(
    monkeypatch: pytest.MonkeyPatch, illness: str, overtime: bool
) -> None:
    """Hundreds of steps would not show it; a net that stands still in depth may move after fifty."""
    monkeypatch.setattr(Health, "_found", lambda _, model: {} if getattr(model, "treated", False) else {illness: 9.0})

    def treat(target: Target) -> Applied:
        target.model.treated = True  # type: ignore[assignment]
        return Applied(model=target.model, remedy="test", changes=(), changed=())

    plan = make_plan(1, run_steps=240)
    held = contest([("mends", 0, treat)], lr=1e-9, illness=illness, plan=plan)
    best = held.judgement.best()

    assert plan.overtime
    assert (held.steps_taken > 2 * plan.length) is overtime
    assert best is not None
    assert best.remedy == "mends"


def test_the_result_of_a_copy_is_not_that_of_one_heavy_batch() -> None:
    """One loss of a million among the last eight."""
    model = nn.Linear(1, 1)
    lane = Lane("", 0, model, torch.optim.SGD(model.parameters(), lr=1.0), losses=[1.0] * 7 + [1e6])

    assert lane.result == 1.0
    assert lane.halves(8) == (1.0, 1.0)
