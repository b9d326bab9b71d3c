"""Remedies that act during a run: they act on the sick, leave the healthy alone, and say what they did."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradguard
from gradguard import clip
from gradguard.remedies.live._spikes import SpikeJudge
from tests.live import ALL, Tilt, everything, hook_counts, run, same, slopes, train_digits
from tests.models import digit_batch, mlp

pytestmark = pytest.mark.filterwarnings("ignore:gradguard. step.*GG:gradguard.GradGuardWarning")

# ------------------------------------------------------------------------------------------------- off, and the healthy


def test_nothing_is_done_and_no_hook_added_by_default() -> None:
    """Without options a guard has the one hook that counts, and no actions."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, dense_steps=(), every=1000)
    run(model, optimizer, slopes(2, {}), guard=guard)

    assert hook_counts(optimizer) == (0, 1)
    assert (guard.actions, guard.diagnose().actions, guard.remedy_state) == ((), (), {})
    with pytest.raises(AttributeError, match=r"frozen|assign"):
        gradguard.watch(model, optimizer).diagnose().actions = ()  # type: ignore[misc]  # that is the point


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["Adam", "SGD"])
def test_healthy_run_is_left_alone(seed: int, kind: str) -> None:
    """With all remedies on, a healthy run skips nothing, keeps its rate, and is clipped in under 1 % of the steps."""
    torch.manual_seed(seed)
    model = mlp(4, init="he")
    make = {"Adam": partial(torch.optim.Adam, lr=1e-3), "SGD": partial(torch.optim.SGD, lr=0.05, momentum=0.9)}[kind]
    guard = train_digits(model, make(model.parameters()), 300, **ALL)
    assert guard is not None
    (done,) = guard.diagnose().actions

    assert (done.steps, done.spikes, done.non_finite, done.lr_factor) == (300, 0, 0, 1.0)
    assert done.clipped < 0.01 * 300


def test_run_in_which_nothing_had_to_be_done_is_bit_identical() -> None:
    """Remedies that never act leave no trace: parameters and state are those of a run without them."""
    results, guard = [], None
    for options in ({}, {**ALL, "every": 7}):
        torch.manual_seed(1)
        model = mlp(3, init="he")
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        guard = train_digits(model, optimizer, 60, **options)
        results.append(everything(model, optimizer))
    assert guard is not None
    assert guard.actions == ()
    assert same(*results)


# ------------------------------------------------------------------------------------------------------------- skipping


OPTIMIZERS = {
    "AdamW": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1),
    "AdamW fused": partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1, fused=True),
    "SGD": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("factor", [50.0, math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:gradguard. 1 of . gradients:gradguard.GradGuardWarning")
def test_skipped_step_changes_no_bit_and_is_counted(name: str, factor: float) -> None:
    """A spike and a gradient that is not finite leave weights and state as they are; the count of steps goes on."""
    model = Tilt()
    optimizer = OPTIMIZERS[name](model.parameters())
    guard = gradguard.watch(model, optimizer, on_spike="skip", on_error="raise")
    snapshots = []
    run(
        model,
        optimizer,
        slopes(45, {40: factor}),
        guard=guard,
        after=lambda step: snapshots.append(everything(model, optimizer)),
    )

    assert same(snapshots[39], snapshots[40])
    assert not same(snapshots[40], snapshots[41])
    assert guard.steps == 45
    (act,) = guard.actions
    assert (act.step, act.kind, act.after) == (40, "skip", 0.0)
    assert ("spike, 5" in act.why) == (factor == 50.0)
    (done,) = guard.diagnose().actions
    assert (done.spikes, done.non_finite) == ((1, 0) if factor == 50.0 else (0, 1))


@pytest.mark.filterwarnings("ignore:gradguard. 1 of . gradients:gradguard.GradGuardWarning")
def test_skipped_step_is_observed_and_tells_nothing_of_updates() -> None:
    """The norm of a skipped step is in the history; an update that was not made is not measured as one of size 0."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, on_spike="skip", every=1, on_error="raise")
    run(model, optimizer, slopes(45, {40: 50.0}), guard=guard)
    ratios = guard.history.parameter("update_ratio")[:, 0]

    assert guard.history.scalar("grad_norm")[40] > 50.0
    assert [step for step in range(45) if math.isnan(ratios[step])] == [40]
    assert math.isnan(guard.history.scalar("grad_norm_at_step")[40])


def test_budget_bounds_the_skips_and_is_said_once() -> None:
    """Ever larger spikes are skipped as the budget allows; the rest goes through, with one warning."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    guard = gradguard.watch(model, optimizer, on_spike="skip", spike_budget=0.02, on_error="raise")
    spikes = {30 + 4 * i: 10.0 * 4.0**i for i in range(6)}
    with pytest.warns(gradguard.GradGuardWarning, match="2 of the newest 100 steps.*spike_budget") as caught:
        run(model, optimizer, slopes(80, spikes), guard=guard)
    (done,) = guard.diagnose().actions

    assert [act.step for act in guard.actions] == [30, 34]
    assert (done.spikes, done.let_through) == (2, 4)
    assert len([w for w in caught if "spike_budget" in str(w.message)]) == 1


def test_budget_frees_up() -> None:
    """A hundred steps after a skip the next may follow."""
    judge = SpikeJudge(gradguard.GuardConfig(), budget=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", gradguard.GradGuardWarning)
        refused = [
            step
            for step in range(300)
            if judge.refuse((50.0 + step) if step in (40, 80, 160) else 1.0 + 0.01 * (step % 7))
        ]

    assert refused == [40, 160]


@pytest.mark.parametrize("factor", [5.0, 1000.0])
def test_norms_that_rise_for_good_do_not_stall_the_run(factor: float) -> None:
    """A change of level costs a few steps at most, without exhausting the budget."""
    judge = SpikeJudge(gradguard.GuardConfig(), budget=0.05)
    levels = [1.0] * 100 + [factor] * 100
    refused = [step for step, level in enumerate(levels) if judge.refuse(level * (1.0 + 0.01 * (step % 5)))]

    assert refused
    assert all(100 <= step < 105 for step in refused)
    assert judge.let_through == 0


def test_zero_norms_are_no_history() -> None:
    """Steps with a gradient of zero neither make the others spikes nor switch the rule off."""
    judge = SpikeJudge(gradguard.GuardConfig(), budget=0.05)
    norms = [0.0, 1.0, 1.05] * 30 + [50.0]

    assert [judge.refuse(norm) for norm in norms].count(True) == 1


def test_below_the_level_of_the_start_nothing_is_a_spike() -> None:
    """The wobble of a run that has converged is let be, however far it stands out there."""
    judge = SpikeJudge(gradguard.GuardConfig(), budget=0.05)
    norms = [10.0] * 5 + [1e-6 * (1.0 + 0.01 * (i % 7)) for i in range(100)] + [1e-3]

    assert not any(judge.refuse(norm) for norm in norms)


# ------------------------------------------------------------------------------------------------------------- clipping


def test_adaptive_is_the_clipper_of_that_name() -> None:
    """Training is bit for bit that with an attached Adaptive, and each cut is on record with both norms."""
    results: list[Any] = []
    acts: Any = ()
    for watched in (True, False):
        model = Tilt()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = gradguard.watch(model, optimizer, clip="adaptive", on_error="raise") if watched else None
        if not watched:
            clip.Adaptive(model).attach(optimizer)
        run(model, optimizer, slopes(60, {40: 30.0, 50: 8.0}), guard=guard)
        results.append(everything(model, optimizer))
        if guard is not None:
            acts = guard.actions
    assert same(*results)
    assert [(act.step, act.kind, act.why) for act in acts] == [(40, "clip", "Adaptive"), (50, "clip", "Adaptive")]
    assert acts[0].before > 50.0
    assert 3.0 < acts[0].after < 4.0


GIVEN: dict[str, Callable[[nn.Module], Any]] = {
    "clipper": lambda model: clip.Norm(model, 0.5),
    "maker": lambda model: partial(clip.Norm, max_norm=0.5),
    "one in a sequence": lambda model: [partial(clip.Norm, max_norm=0.5)],
}


@pytest.mark.parametrize("name", GIVEN)
def test_any_clipper_clips_before_the_step(name: str) -> None:
    """A clipper, or what makes one, gives what clip_grad_norm_ gives; history and report know both norms."""
    results: list[Any] = []
    watching: gradguard.Guard | None = None
    for watched in (True, False):
        torch.manual_seed(0)
        model = mlp(3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = gradguard.watch(model, optimizer, clip=GIVEN[name](model), every=1) if watched else None
        for step in range(25):
            x, y = digit_batch(32, seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            if not watched:
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
        results.append(everything(model, optimizer))
        watching = watching or guard
    assert same(*results)
    assert watching is not None
    assert watching.clip_norm == 0.5
    before, at_step = (watching.history.scalar(name) for name in ("grad_norm", "grad_norm_at_step"))
    assert watching.diagnose().summary.clip_known
    assert at_step.max() == pytest.approx(0.5, rel=1e-4)
    assert before.max() > 0.55
    assert watching.diagnose().actions[0].clipped == (before > 0.5).sum() > 0


def test_results_on_the_device_are_counted_later() -> None:
    """A clipper that never waits for the device is not made to: its results are read in one go."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model, 1.0, non_finite="zero"))
    run(model, optimizer, slopes(70, {}), guard=guard)
    hand = guard._live._hands[0]

    assert len(hand.ledger._pending) == 6
    assert guard.diagnose().actions[0].clipped == 70
    assert len(guard.actions) == 70


def test_memory_is_bounded_and_counts_go_on() -> None:
    """The newest 256 acts are kept, a few of them in the diagnosis; all are counted."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model, 1.0), dense_steps=(), every=10_000)
    run(model, optimizer, slopes(300, {}))
    (done,) = guard.diagnose().actions

    assert (done.clipped, len(guard.actions), len(done.newest)) == (300, 256, 5)
    assert guard.actions[-1].step == 299


def test_clip_and_skip_go_together() -> None:
    """What is far out is left out, what is somewhat out is clipped."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = gradguard.watch(model, optimizer, clip="adaptive", on_spike="skip", on_error="raise")
    given = slopes(80, {40: 30.0, 60: 30.0})
    run(model, optimizer, given, guard=guard)

    assert [(act.step, act.kind) for act in guard.actions] == [(40, "skip"), (60, "skip")]

    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model, 2.0), on_spike="skip", on_error="raise")
    run(model, optimizer, slopes(80, {40: 30.0, 60: 1.9}), guard=guard)

    assert [(act.step, act.kind) for act in guard.actions] == [(40, "skip"), (60, "clip")]


@pytest.mark.filterwarnings("ignore:gradguard. 1 of . gradients:gradguard.GradGuardWarning")
def test_clipper_of_some_parameters_does_not_hide_the_others() -> None:
    """With a clipper of one layer, a NaN in another still makes the whole step be left out."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": Tilt(), "second": Tilt()})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model["first"], 1.0), on_spike="skip", on_error="raise")
    before = everything(model, optimizer)
    (model["first"](torch.ones(3)) + model["second"](torch.full((3,), math.nan))).backward()
    optimizer.step()

    assert same(before, everything(model, optimizer))
    assert [act.kind for act in guard.actions] == ["skip"]


def test_error_that_a_clipper_was_asked_for_reaches_the_loop() -> None:
    """``non_finite="raise"`` raises through the guard, and nothing is switched off."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model, 1.0, non_finite="raise"))
    model(torch.full((3,), math.nan)).backward()
    with pytest.raises(gradguard.NonFiniteGradientsError):
        optimizer.step()

    assert guard.attached
    run(model, optimizer, slopes(1, {}))
    assert guard.actions[-1].kind == "clip"
