"""The direction of the gradient: cosines against plain torch, and GG502 where it is kept."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors._direction import kept_direction
from gradguard.detectors._loss import from_batch_to_batch, has_settled
from gradguard.detectors._updates import leading_ratios
from gradguard.detectors.learning_rate import find_learning_rate
from gradguard.findings import Cause, Diagnosis, Finding, Severity
from gradguard.history import History
from gradguard.monitors import GradientMonitor
from gradguard.monitors._reduce import Readback
from gradguard.prescriptions import prescriptions_for
from gradguard.records import StepRecord
from tests.histories import NAN, chain, changed, falling, flat
from tests.models import classification_loss, digit_batch, mlp

CONFIG = GuardConfig()
SCALARS = {"gradient_cosine", "gradient_cosine_steps"}


class Watched:
    """A monitor driven by hand: gradients are set, read, and compared."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.monitor = model, GradientMonitor(model)

    def see(
        self, gradients: Sequence[Tensor | None], *, step: int, index: int = 0, mine: Sequence[float] = ()
    ) -> float:
        """Return the cosine after one observation, NaN where there is none."""
        for p, gradient in zip(self.model.parameters(), gradients, strict=True):
            p.grad = None if gradient is None else gradient.clone()
        readback = Readback()
        self.monitor.read(readback, gradient_of=lambda p: p.grad, groups=None)
        self.monitor.read_update(readback, index=index, step=step)
        readback.fetch()
        held = np.array(mine) if mine else self.monitor.held_by(None)
        return self.monitor.scalars(readback, mine=held).get("gradient_cosine", math.nan)


def gradients_of(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Return one random gradient for each parameter, of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator) * 10.0 ** (-k) for k, p in enumerate(model.parameters())]


def cosine_of(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """Return the cosine between two whole gradients."""
    return float(
        F.cosine_similarity(
            torch.cat([g.flatten().double() for g in one]), torch.cat([g.flatten().double() for g in other]), dim=0
        )
    )


# --------------------------------------------------------------------------------------------------- measuring


@pytest.mark.parametrize(("factor", "expected"), [(1.0, 1.0), (1e-12, 1.0), (1e12, 1.0), (-1.0, -1.0)])
def test_the_same_way_is_one_and_back_is_minus_one(factor: float, expected: float) -> None:
    """However large the gradients are, also beyond what squares in float32 can hold."""
    watched = Watched(mlp(3))
    first = gradients_of(watched.model)

    assert math.isnan(watched.see(first, step=0))
    assert watched.see([g * factor for g in first], step=10) == pytest.approx(expected, abs=1e-6)


def test_small_tensors_are_compared_whole() -> None:
    """Up to 64 entries of each tensor the cosine is exactly that of the whole gradient."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 3))
    watched = Watched(model)
    first, second = (
        gradients_of(model),
        [a + b for a, b in zip(gradients_of(model), gradients_of(model, 1), strict=True)],
    )
    watched.see(first, step=0)

    assert watched.see(second, step=10) == pytest.approx(cosine_of(first, second), abs=1e-6)


def test_the_sketch_is_close_to_the_whole_gradient() -> None:
    """On a real net, by naive autograd: 64 entries of each tensor stand for all of them."""
    torch.manual_seed(0)
    model = mlp(4, width=128)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    guard = gradguard.watch(model, optimizer, on_error="raise", on_finding="silent")
    whole: dict[int, list[Tensor]] = {}
    for step in range(101):
        optimizer.zero_grad()
        classification_loss(model, digit_batch(256, seed=step)).backward()
        if step in {0, 10, 20, 50, 100}:
            whole[step] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        optimizer.step()
    guard.detach()

    seen = dict(zip(guard.history.steps, guard.history.scalar("gradient_cosine"), strict=True))
    for before, step in ((0, 10), (10, 20), (20, 50), (50, 100)):
        assert seen[step] == pytest.approx(cosine_of(whole[before], whole[step]), abs=0.08)


def test_neighbours_are_compared_with_one_gradient_until_ten_steps_have_passed() -> None:
    """With every=1 each observation is compared with the last one at a multiple of ten."""
    torch.manual_seed(0)
    model = mlp(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradguard.watch(model, optimizer, every=1, on_error="raise", on_finding="silent") as guard:
        for step in range(25):
            optimizer.zero_grad()
            classification_loss(model, digit_batch(16, seed=step)).backward()
            optimizer.step()

    distances = guard.history.scalar("gradient_cosine_steps")
    np.testing.assert_array_equal(distances, [NAN, *range(1, 11), *range(1, 11), *range(1, 5)])
    assert guard.history.records[3].scalars.keys() >= SCALARS
    assert not guard.history.records[0].scalars.keys() & SCALARS


def test_parameters_that_come_and_go_and_change() -> None:
    """Frozen, replaced and resized ones are left out; those that stayed are compared, wherever they stand."""
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    watched = Watched(model)
    a, b, c = gradients_of(model)
    watched.see([a, b, c], step=0)
    model[0].requires_grad_(False)
    model[1] = nn.Linear(6, 6, bias=False)

    assert watched.see([None, b, -c], step=1) == pytest.approx(-1.0)

    model[2].weight.data = torch.zeros(6, 2)
    assert math.isnan(watched.see([None, None, torch.ones(6, 2)], step=2))
    assert watched.see([None, None, torch.ones(6, 2)], step=3) == pytest.approx(1.0)


@pytest.mark.parametrize("broken", [NAN, math.inf])
def test_a_gradient_that_is_not_finite_is_compared_with_nothing(broken: float) -> None:
    """The next one is compared with what was before it."""
    watched = Watched(mlp(2))
    first = gradients_of(watched.model)
    watched.see(first, step=0)

    assert math.isnan(watched.see([g * broken for g in first], step=10))
    assert watched.see(first, step=20) == pytest.approx(1.0)


def test_each_optimizer_has_a_direction_of_its_own() -> None:
    """What the other one's gradients do, also if they are not finite, makes no difference."""
    model = nn.Sequential(nn.Linear(5, 5, bias=False), nn.Linear(5, 5, bias=False))
    watched = Watched(model)
    a, b = gradients_of(model)
    watched.see([a, b], step=0, index=0, mine=[1, 0])
    assert math.isnan(watched.see([-a, b], step=0, index=1, mine=[0, 1]))

    assert watched.see([a, b * NAN], step=10, index=0, mine=[1, 0]) == pytest.approx(1.0)
    assert watched.see([a * NAN, -b], step=10, index=1, mine=[0, 1]) == pytest.approx(-1.0)


@pytest.mark.parametrize(
    "gradients",
    [[torch.zeros(3, 3)], [None], [torch.eye(3).to_sparse()]],
    ids=["zero", "absent", "sparse"],
)
def test_what_has_no_direction_has_no_cosine(gradients: list[Tensor | None]) -> None:
    """Zeros, missing gradients and layouts that are not sampled."""
    watched = Watched(nn.Linear(3, 3, bias=False))
    watched.see(gradients, step=0)

    assert math.isnan(watched.see(gradients, step=10))


def test_nothing_is_kept_after_close() -> None:
    """Neither gradients nor parameters."""
    watched = Watched(mlp(2))
    watched.see(gradients_of(watched.model), step=0)
    parameter = weakref.ref(next(watched.model.parameters()))
    watched.monitor.close()
    watched.model = watched.monitor._model = nn.Identity()
    gc.collect()

    assert parameter() is None
    assert watched.monitor._direction._kept == {}


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)])
def test_empty_parameters_are_passed_over(shape: tuple[int, ...]) -> None:
    """A parameter without entries has a gradient without entries."""
    model = nn.Module()
    model.empty = nn.Parameter(torch.zeros(shape))
    watched = Watched(model)

    assert math.isnan(watched.see([torch.zeros(shape)], step=0))
    assert math.isnan(watched.see([torch.zeros(shape)], step=10))


# --------------------------------------------------------------------------------------------------- judging


def noisy(steps: int, start: float = 3.0, end: float = 2.0) -> list[float]:
    """Return losses that fall in a straight line, with the noise of batches."""
    rng = np.random.default_rng(0)
    return [float(x) for x in np.linspace(start, end, steps) * (1.0 + 0.05 * rng.standard_normal(steps))]


def going(
    cosine: float | Callable[[int], float] = 0.9,
    *,
    ratio: float = 1e-4,
    losses: Sequence[float] | None = None,
    steps: Sequence[int] = (0, 1, 2, 5, 10, 20, 50, 100),
    lr: Callable[[int], float] = lambda _: 1e-4,
    classes: int = 0,
) -> History:
    """Return a run whose gradient has a cosine with the one before, by step."""
    history = chain(layers=6, activation="Tanh", steps=steps, losses=noisy(max(steps) + 1), classes=classes)
    before = dict(zip(steps[1:], steps[:-1], strict=True))

    def edit(record: StepRecord) -> StepRecord:
        step, scalars = record.step, {**record.scalars, "lr": lr(record.step)}
        if step in before:
            here = cosine(step) if callable(cosine) else cosine
            scalars |= {"gradient_cosine": here, "gradient_cosine_steps": float(step - before[step])}
        size = len(record.parameters)
        columns = {"update_ratio": np.full(size, ratio), "lr": np.full(size, lr(step))}
        return replace(record, scalars=scalars, parameter_values={**record.parameter_values, **columns})

    return changed(history, edit, None if losses is None else list(losses))


def found(history: History) -> list[Finding]:
    """Return what is said of the learning rate."""
    return list(find_learning_rate(history, CONFIG))


def test_small_steps_along_one_gradient_are_too_small() -> None:
    """A loss that falls by a third, batches of 5 % noise, a ratio of 1e-4, a cosine of 0.9 for 90 steps."""
    (finding,) = found(going())

    assert (finding.code, finding.severity, finding.cause) == ("GG502", Severity.WARNING, Cause.LEARNING_RATE)
    assert finding.message == (
        "The learning rate is too low: a step changes the weights by 10^-4.0 of their size (median over matrices; "
        "about 10^-3.0 is usual), and the gradient has kept its direction over 90 steps (cosine 0.90 from one "
        "observation to the next)."
    )
    assert finding.evidence["gradient_cosine"].value == pytest.approx(0.9)
    assert finding.evidence["suggested_lr"].value == pytest.approx(1e-3)
    assert (finding.step, finding.last_step) == (20, 100)
    (first, *_) = prescriptions_for(finding)
    assert (first.remedy, first.arguments) == ("higher-learning-rate", {"factor": 10.0})


@pytest.mark.parametrize(
    "build",
    [
        lambda: going(0.5),
        lambda: going(lambda step: 0.2 if step == 50 else 0.9),
        lambda: going(ratio=3e-4),
        lambda: going(steps=(0, 1, 2, 5, 10, 20, 50)),
        lambda: going(steps=range(80, 181)),
        lambda: going(lambda step: 0.2 if step == 70 else 0.9, steps=(0, 70, 80, 90, 100)),
        lambda: going(lr=lambda step: 1e-6 * (1 + step)),
        lambda: going(lr=lambda step: 1e-2 if step < 10 else 1e-4),
        lambda: going(losses=falling(101, 3.0, 2.0, noise=0.0)),
        lambda: going(losses=[2.0 + math.exp(-step / 8.0) + 0.01 * math.sin(7.0 * step) for step in range(101)]),
        lambda: going(losses=noisy(101, 2.0, 3.0)),
        lambda: going(losses=noisy(101, 1.1, 0.9), classes=10),
        lambda: going(losses=[]),
        lambda: going(lambda _: NAN),
    ],
    ids=[
        "gradient turns",
        "turned once",
        "steps of usual size",
        "too early",
        "neighbours only",
        "too short",
        "warm-up",
        "end of a schedule",
        "one batch",
        "settled",
        "rising",
        "learnt",
        "no losses",
        "unknown",
    ],
)
def test_gradients_that_keep_their_direction_in_good_health(build: Callable[[], History]) -> None:
    """Neighbours, single batches, schedules, and nets at their end: a cosine alone says nothing."""
    assert found(build()) == []


def test_one_batch_for_the_whole_run_needs_smaller_steps() -> None:
    """Then gradients turn slowly at the best of rates."""
    losses = falling(101, 3.0, 2.0, noise=0.0)

    assert from_batch_to_batch(np.array(losses)) < 3e-4 < from_batch_to_batch(np.array(noisy(101)))
    assert [finding.code for finding in found(going(ratio=3e-5, losses=losses))] == ["GG502"]


@pytest.mark.parametrize(("noise", "fires"), [(0.08, True), (0.0, False)])
def test_a_loss_multiplied_by_a_small_number_is_not_that_of_a_net_that_has_learnt(noise: float, fires: bool) -> None:
    """Far below chance from the start: scaled down where batches differ, an old optimum where there is only one."""
    wave = [1.0 + noise * math.sin(7.0 * step * step) for step in range(101)]
    losses = [level * here for level, here in zip(np.linspace(3.5e-3, 2.7e-3, 101), wave, strict=True)]

    assert bool(found(going(ratio=4e-5, losses=losses, classes=10))) is fires


def test_a_trunk_that_is_spared_says_nothing_of_the_head() -> None:
    """Ratios of 1e-5 at a hundredth of the rate, and a head at 1e-3: only the head counts."""
    history = going(ratio=1e-5)

    def edit(record: StepRecord) -> StepRecord:
        rates, ratios = (record.parameter_values[name].copy() for name in ("lr", "update_ratio"))
        rates[-2:], ratios[-2:] = 100.0 * rates[-2:], 1e-3
        return replace(record, parameter_values={**record.parameter_values, "lr": rates, "update_ratio": ratios})

    spared = changed(history, edit)

    assert found(history) != []
    assert found(spared) == []
    np.testing.assert_allclose(leading_ratios(spared), 1e-3)


def test_it_lasts_through_a_batch_that_agrees_less_and_ends_where_the_gradient_turns() -> None:
    """A cosine of 0.3 is the noise of one batch; at 0.1 the run has got somewhere."""
    steps = (0, 10, 20, 50, 100, 200)

    assert kept_direction(going(lambda step: 0.3 if step == 200 else 0.9, steps=steps)) is not None
    assert kept_direction(going(lambda step: 0.1 if step == 200 else 0.9, steps=steps)) is None


@given(st.floats(min_value=1e-6, max_value=1e6), st.floats(min_value=-3.0, max_value=3.0))
@settings(max_examples=40)
def test_the_scale_of_the_loss_makes_no_difference(factor: float, shift: float) -> None:
    """Losses times k settle and scatter alike; settling does not depend on a constant added either."""
    for losses in (np.array(noisy(101)), np.array(flat(101)), 1.0 + np.exp(-np.arange(101.0) / 8.0)):
        assert has_settled(losses * factor + shift * factor) == has_settled(losses)
        assert from_batch_to_batch(losses * factor) == pytest.approx(from_batch_to_batch(losses), rel=1e-6)


@given(st.floats(min_value=1e-4, max_value=1e4))
@settings(max_examples=15, deadline=None)
def test_the_scale_of_the_gradient_makes_no_difference(factor: float) -> None:
    """A loss that is scaled between two observations leaves the cosine as it is."""
    model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 2))
    first, second = gradients_of(model), gradients_of(model, 1)
    plain, scaled = Watched(model), Watched(model)
    plain.see(first, step=0)
    scaled.see(first, step=0)

    expected = plain.see(second, step=10)
    assert scaled.see([g * factor for g in second], step=10) == pytest.approx(expected, abs=1e-5)


# --------------------------------------------------------------------------------------------------- together


def regression(lr: float) -> Diagnosis:
    """Train a small net to a smooth function of digits for 201 steps, and return the verdict."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    direction = torch.randn(64, 1, generator=torch.Generator().manual_seed(1)) / 8.0
    with gradguard.watch(model, optimizer, on_error="raise", on_finding="silent") as guard:
        for step in range(201):
            x, _ = digit_batch(64, seed=step)
            loss = F.mse_loss(model(x), torch.sin(x @ direction) + 1.0)
            optimizer.zero_grad()
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        return guard.diagnose()


def test_a_regression_at_a_fraction_of_its_rate_is_told_and_its_twin_is_silent() -> None:
    """Its loss falls, and there is no chance to compare it with: only the gradient's direction tells."""
    sick, healthy = regression(2e-4), regression(5e-2)

    assert sick.primary is not None
    assert (sick.primary.code, sick.primary.evidence["loss_trend"].value != "flat") == ("GG502", True)
    assert "gradient_cosine" in sick.to_json()
    assert healthy.healthy
