"""Remedies that act during a run: accumulation, loss scalers, closures, several optimizers, the learning rate."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradguard
from gradguard import clip
from gradguard.findings import Severity
from tests.live import Tilt, back_off, everything, hook_counts, run, same, slopes, train_digits
from tests.models import digit_batch, mlp

pytestmark = pytest.mark.filterwarnings("ignore:gradguard. step.*GG:gradguard.GradGuardWarning")

# -------------------------------------------------------------------------------------- accumulation, scalers, closures


def test_accumulated_gradient_is_clipped_once() -> None:
    """The remedy acts at the optimizer's step, on the sum."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model, 3.0), on_spike="skip", on_error="raise")
    for _ in range(2):
        optimizer.zero_grad()
        for _ in range(4):
            model(torch.ones(3)).backward()
            guard.record()
        optimizer.step()
    (done,) = guard.diagnose().actions

    assert (done.steps, done.clipped) == (2, 2)
    assert guard.actions[0].before == pytest.approx(4.0 * math.sqrt(3.0))
    assert guard.actions[0].after == pytest.approx(3.0)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_loss_scaler_changes_nothing(fused: bool, unscale: bool) -> None:
    """Clips and skips are those of the run without a scaler; norms on record are true to size."""
    acts, ends = [], []
    for scaled in (True, False):
        model = Tilt()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=scaled)
        guard = gradguard.watch(
            model, optimizer, scaler=scaler, clip=partial(clip.Norm, max_norm=3.0), on_spike="skip", on_error="raise"
        )
        for slope in slopes(60, {40: 30.0, 50: 1.9}):
            optimizer.zero_grad()
            scaler.scale(model(slope)).backward()
            if unscale:
                scaler.unscale_(optimizer)
            guard.record()
            scaler.step(optimizer)
            scaler.update()
        acts.append([(act.step, act.kind, round(act.before, 3), round(act.after, 3)) for act in guard.actions])
        ends.append(model.weight.detach())
    assert [act[:2] for act in acts[0]] == [(40, "skip"), (50, "clip")]
    assert acts[0] == acts[1]
    assert torch.allclose(ends[0], ends[1])


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_overflow_is_left_to_the_scaler(fused: bool, unscale: bool) -> None:
    """The scaler skips and lowers its scale as it does alone; that is no act of ours."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard = gradguard.watch(model, optimizer, scaler=scaler, clip="adaptive", on_spike="skip", on_error="raise")
    scaler.scale(model(torch.tensor([1.0, math.inf, 1.0]))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()

    assert guard.actions == ()
    assert scaler.get_scale() == 512.0
    assert torch.equal(model.weight.detach(), torch.ones(3))


def test_closure_is_clipped_after_its_evaluation() -> None:
    """An optimizer that evaluates a closure gets clipped gradients, and a spike in it is left out."""
    model = Tilt()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model, 2.0), on_spike="skip", on_error="raise")
    seen = []
    for slope in slopes(45, {20: 1.9, 40: 30.0}):

        def closure(slope: torch.Tensor = slope) -> torch.Tensor:
            optimizer.zero_grad()
            loss: torch.Tensor = model(slope)
            loss.backward()
            return loss

        optimizer.step(closure)
        seen.append(model.weight.detach().clone())

    assert [(act.step, act.kind) for act in guard.actions] == [(20, "clip"), (40, "skip")]
    assert torch.equal(seen[39], seen[40])


def test_later_evaluations_of_a_closure_are_never_taken_away() -> None:
    """The line search of LBFGS jumps between far points: only the first evaluation of a step may be a spike."""
    model = Tilt()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=1e-3, max_iter=3, tolerance_grad=0.0, tolerance_change=0.0)
    guard = gradguard.watch(model, optimizer, on_spike="skip", on_error="raise")
    gone = []
    for step in range(60):
        evaluations = 0

        def closure(step: int = step) -> torch.Tensor:
            nonlocal evaluations
            evaluations += 1
            gone.append((step, evaluations, model.weight.grad is None))
            optimizer.zero_grad()
            loss: torch.Tensor = model(torch.ones(3) * (100.0 if step > 40 and evaluations == 2 else 1.0))
            loss.backward()
            return loss

        optimizer.step(closure)

    assert max(evaluation for _, evaluation, _ in gone) >= 2
    assert guard.actions == ()


# --------------------------------------------------------------------------------------------------- several optimizers


def test_each_optimizer_has_its_own_history_and_label() -> None:
    """A spike in one network's step does not touch the other's, and the report names them."""
    model = nn.ModuleDict({"g": Tilt(), "d": Tilt()})
    first = torch.optim.SGD(model["g"].parameters(), lr=1e-3)
    second = torch.optim.SGD(model["d"].parameters(), lr=1e-3)
    guard = gradguard.watch(model, [first, second], clip=["adaptive", None], on_spike="skip", on_error="raise")
    for small, large in zip(slopes(50, {40: 30.0}), slopes(50, {45: 30.0}, seed=1), strict=True):
        for name, optimizer, slope in (("g", first, small), ("d", second, large * 100.0)):
            optimizer.zero_grad()
            loss = model[name](slope)
            loss.backward()
            guard.record(loss=loss, name=name)
            optimizer.step()
    done = guard.diagnose().actions

    assert [(act.step, act.optimizer, act.kind) for act in guard.actions] == [(40, "g", "skip"), (45, "d", "skip")]
    assert [(one.optimizer, one.method, one.steps) for one in done] == [("g", "Adaptive", 50), ("d", "", 50)]


def test_one_clipper_for_several_optimizers_is_refused() -> None:
    """The message says what to pass instead; nothing is left behind."""
    model = nn.ModuleDict({"g": Tilt(), "d": Tilt()})
    optimizers = [torch.optim.SGD(model[name].parameters(), lr=0.1) for name in ("g", "d")]

    with pytest.raises(ValueError, match=r"2 optimizers.*what makes a clipper.*one entry for each"):
        gradguard.watch(model, optimizers, clip=clip.Norm(model, 1.0))
    with pytest.raises(ValueError, match="clip must have 2 entries, one for each optimizer, got 3"):
        gradguard.watch(model, optimizers, clip=["adaptive"] * 3)
    assert [hook_counts(optimizer) for optimizer in optimizers] == [(0, 0), (0, 0)]
    with gradguard.watch(model, optimizers, clip=clip.AGC) as guard:
        assert [one.method for one in guard.diagnose().actions] == ["AGC", "AGC"]


def test_parameters_that_join_later_are_clipped_too() -> None:
    """After add_param_group, as when layers are unfrozen, the whole optimizer is clipped."""
    model = nn.ModuleDict({"first": Tilt(), "second": Tilt()})
    optimizer = torch.optim.SGD(model["first"].parameters(), lr=0.1)
    gradguard.watch(model, optimizer, clip=partial(clip.Norm, max_norm=1.0), on_spike="skip", on_error="raise")
    optimizer.add_param_group({"params": list(model["second"].parameters())})
    (model["first"](torch.ones(3)) + model["second"](torch.ones(3))).backward()
    optimizer.step()

    norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    assert float(norm) == pytest.approx(1.0, rel=1e-5)


# -------------------------------------------------------------------------------------------------------- learning rate


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=12),
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.1, total_steps=14),
    "exponential": lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.8),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_backoff_halves_the_step_and_no_schedule_notices(name: str, tensor: bool) -> None:
    """Rates between steps are those of the schedule; the update is half as long from the backoff on."""
    rates, updates = [], []
    for watched in (True, False):
        model = Tilt(1)
        rate: Any = torch.tensor(0.1, dtype=torch.float64) if tensor else 0.1
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        scheduler = SCHEDULES[name](optimizer)
        guard = gradguard.watch(model, optimizer, lr_backoff=True, on_error="raise") if watched else None
        mine, moved = [], []
        for step in range(12):
            if guard is not None and step == 6:
                back_off(guard)
            before = float(model.weight.detach())
            optimizer.zero_grad()
            model(torch.ones(1)).backward()
            optimizer.step()
            moved.append(before - float(model.weight.detach()))
            mine.append(float(optimizer.param_groups[0]["lr"]))
            scheduler.step()
        rates.append(mine)
        updates.append(moved)
    assert rates[0] == rates[1]
    assert updates[0][:6] == updates[1][:6]
    assert updates[0][6:] == pytest.approx([0.5 * update for update in updates[1][6:]], rel=1e-3, abs=1e-7)


def test_backoff_acts_three_times_at_most_with_rests_between() -> None:
    """A finding that stands lowers the rate every hundred steps, three times; each is on record."""
    model = Tilt()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, lr_backoff=0.1, on_error="raise", every=10_000, dense_steps=())
    run(model, optimizer, slopes(500, {}), after=lambda step: back_off(guard))

    assert [(act.step, act.kind) for act in guard.actions] == [(1, "lr"), (101, "lr"), (201, "lr")]
    assert [act.after for act in guard.actions] == pytest.approx([1e-2, 1e-3, 1e-4])
    assert guard.actions[0].why == "GG505 loss-divergence"
    assert guard.diagnose().actions[0].lr_factor == pytest.approx(1e-3)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_other_illnesses_do_not_lower_the_rate() -> None:
    """A vanishing gradient is no matter of the rate, nor is what follows from corrupt data."""
    from gradguard.detectors._finding import make_finding

    model = Tilt()
    guard = gradguard.watch(model, torch.optim.SGD(model.parameters(), lr=0.1), lr_backoff=True, on_error="raise")
    assert guard._live is not None
    divergence = make_finding("GG505", Severity.ERROR, "Made up.", step=0, last_step=0)
    for finding in (
        make_finding("GG101", Severity.ERROR, "Made up.", step=0, last_step=0),
        replace(divergence, consequence_of="GG201"),
        replace(divergence, severity=Severity.INFO),
        replace(divergence, resolved_step=3),
        replace(divergence, optimizer="another"),
    ):
        guard._live.consider(0, [finding])

    assert guard.actions == ()
    guard._live.consider(0, [replace(divergence, consequence_of="GG103")])
    kinds = [act.kind for act in guard.diagnose().actions[0].newest]
    assert kinds == ["lr"]


def test_step_that_raises_does_not_lower_the_rate_twice() -> None:
    """The rate is the schedule's again at the next step, and after detach."""

    class Moody(torch.optim.SGD):
        broken = True

        def step(self, closure: Any = None) -> Any:
            if self.broken:
                raise RuntimeError("broken on purpose")
            return super().step(closure)

    model = Tilt()
    optimizer = Moody(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, lr_backoff=True, on_error="raise")
    back_off(guard)
    model(torch.ones(3)).backward()
    for _ in range(3):
        with pytest.raises(RuntimeError, match="on purpose"):
            optimizer.step()
        assert optimizer.param_groups[0]["lr"] == 0.05
    guard.detach()

    assert optimizer.param_groups[0]["lr"] == 0.1


def test_diverging_run_is_slowed_down() -> None:
    """A real run whose rate is far too high is found, lowered, and ends with a smaller loss than without."""
    ends = []
    rounds: tuple[dict[str, Any], ...] = ({"lr_backoff": True}, {})
    for options in rounds:
        torch.manual_seed(0)
        model = mlp(6, nn.Tanh, init="xavier")
        guard = train_digits(
            model, torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9), 120, every=100, **options
        )
        assert guard is not None
        with torch.no_grad():
            x, y = digit_batch(512, seed=1000)
            ends.append(float(F.cross_entropy(model(x), y)))
        if options:
            assert {act.kind for act in guard.actions} == {"lr"}
            assert guard.actions[0].why.split()[0] in {"GG102", "GG501", "GG505"}

    assert ends[0] < 0.5 * ends[1]


def test_skip_reaches_parameters_that_the_given_clipper_does_not_hold() -> None:
    """A clipper made by the user keeps its parameters; a spike it sees is skipped for the whole optimizer."""
    model = nn.ModuleDict({"first": Tilt(), "second": Tilt()})
    optimizer = torch.optim.SGD(model["first"].parameters(), lr=1e-3)
    guard = gradguard.watch(model, optimizer, clip=clip.Norm(model["first"], 10.0), on_spike="skip", on_error="raise")
    optimizer.add_param_group({"params": list(model["second"].parameters())})
    seen = []
    for slope in slopes(45, {40: 30.0}):
        optimizer.zero_grad()
        (model["first"](slope) + model["second"](torch.ones(3))).backward()
        optimizer.step()
        seen.append(everything(model, optimizer))

    assert [(act.step, act.kind) for act in guard.actions] == [(40, "skip")]
    assert same(seen[39], seen[40])
    assert not same(seen[40], seen[41])
