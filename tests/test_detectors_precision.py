"""GG211 to GG213: half precision, on made-up histories and on real training runs on the CPU."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors.precision import find_loss_scale_collapse, find_lost_updates, find_underflow
from gradguard.findings import Finding, Severity
from gradguard.history import History
from gradguard.records import StepRecord
from tests.driving import observe
from tests.histories import DENSE, NAN, chain, changed, falling, flat, run_of
from tests.models import classification_loss, digit_batch, mlp

CONFIG = GuardConfig()


def only(findings: Sequence[Finding]) -> Finding:
    """Return the one finding."""
    (finding,) = findings
    return finding


def with_columns(steps: Sequence[int] = DENSE, losses: Sequence[float] | None = None, **columns: float) -> History:
    """Return a healthy chain of six layers with some parameter columns filled with one number."""
    history = chain(layers=6, activation="Tanh", steps=steps, losses=losses)

    def edit(record: StepRecord) -> StepRecord:
        values = {name: np.full(len(record.parameters), value) for name, value in columns.items()}
        return replace(record, parameter_values={**record.parameter_values, **values})

    return changed(history, edit)


# -------------------------------------------------------------------------------------------------------- underflow


def test_gradients_that_float16_rounds_away_are_found() -> None:
    """Four fifths of the entries are lost, and the loss does not fall."""
    finding = only(find_underflow(with_columns(underflow_fraction=0.8), CONFIG))

    assert (finding.code, finding.severity, finding.step) == ("GG211", Severity.WARNING, 0)
    assert finding.message.startswith(
        "float16 rounds gradients away: 80 % of the entries are 0 or have at most three bits"
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: with_columns(underflow_fraction=0.3),
        lambda: with_columns(underflow_fraction=NAN, grad_norm=0.0),
        lambda: with_columns(underflow_fraction=0.8, losses=falling(101)),
        lambda: with_columns(underflow_fraction=0.8, losses=falling(101, end=1e-4)),
        lambda: with_columns(underflow_fraction=0.8, steps=(0, 1)),
        lambda: with_columns(underflow_fraction=0.0, grad_norm=0.0),
    ],
    ids=["few", "structural zeros", "the loss falls", "converged", "two observations", "normal numbers and zeros"],
)
def test_small_gradients_that_are_no_underflow(build: Callable[[], History]) -> None:
    """Dead branches, LoRA's A, frozen halves and converged runs have zeros or tiny gradients in float32 as well."""
    assert find_underflow(build(), CONFIG) == []


# ----------------------------------------------------------------------------------------------------- lost updates


def test_updates_that_rounding_swallows_are_found() -> None:
    """bfloat16 weights, four fifths of the entries never move."""
    finding = only(find_lost_updates(with_columns(moved_fraction=0.2, rounding_unit=2.0**-7), CONFIG))

    assert (finding.code, finding.severity) == ("GG212", Severity.WARNING)
    assert finding.message == (
        "Rounding swallows the updates: a step leaves 80 % of the weights with a gradient as they are "
        "(their type has steps of 0.0078 of a weight)."
    )


@pytest.mark.parametrize(
    ("scalars", "found"),
    [
        ({"float16": 1.0, "loss_scale": 1.0}, True),
        ({"float16": 1.0, "loss_scale": 1024.0}, False),
        ({"loss_scale": 1.0}, False),
    ],
    ids=["float16 without a scaler", "a scaler at work", "float32"],
)
def test_gradients_that_are_all_zero_in_float16(scalars: dict[str, float], found: bool) -> None:
    """Nothing is left to measure; that float16 computed it and that nothing scaled the loss is known."""

    def edit(record: StepRecord) -> StepRecord:
        zeros = np.zeros(len(record.layers))
        values = {**record.layer_values, "delta_norm": zeros, "input_delta_norm": zeros}
        return replace(record, layer_values=values, scalars={**record.scalars, **scalars})

    history = changed(chain(layers=6, activation="Tanh"), edit)

    assert [finding.severity for finding in find_underflow(history, CONFIG)] == [Severity.ERROR] * found


@pytest.mark.parametrize(("share", "found"), [(0.7, False), (0.95, True)])
def test_half_of_the_gradients_is_told_once_the_loss_is_known(share: float, found: bool) -> None:
    """Three observations after a few steps: only where next to nothing is left."""
    history = with_columns((0, 1, 2), flat(3), underflow_fraction=share)

    assert bool(find_underflow(history, CONFIG)) is found


@pytest.mark.parametrize(
    ("columns", "losses"),
    [
        ({"moved_fraction": 0.2, "rounding_unit": 2.0**-23}, None),
        ({"moved_fraction": 0.8, "rounding_unit": 2.0**-7}, None),
        ({"moved_fraction": 0.0, "rounding_unit": 2.0**-7, "lr": 0.0}, None),
        ({"moved_fraction": NAN, "rounding_unit": 2.0**-7}, None),
        ({"moved_fraction": 0.2, "rounding_unit": 2.0**-7}, flat(101, 0.01, 0.003)),
    ],
    ids=["float32 late in training", "most move", "rate 0", "no gradient", "converged"],
)
def test_what_does_not_move_for_other_reasons(columns: dict[str, float], losses: list[float] | None) -> None:
    """Convergence in float32, warm-up from 0, embedding rows without a gradient."""
    assert find_lost_updates(with_columns(DENSE, losses, **columns), CONFIG) == []


def test_a_loss_that_falls_excuses_lost_updates_unless_nearly_all_are() -> None:
    """Half precision that learns is INFO; nine tenths lost is a warning."""
    some = with_columns(moved_fraction=0.4, rounding_unit=2.0**-7, losses=falling(101, end=1.3))
    most = with_columns(moved_fraction=0.05, rounding_unit=2.0**-7, losses=falling(101, end=1.3))

    assert only(find_lost_updates(some, CONFIG)).severity is Severity.INFO
    assert only(find_lost_updates(most, CONFIG)).severity is Severity.WARNING


# ------------------------------------------------------------------------------------------------------- loss scale


def scaled(*, steps: int = 200, skipped: int = 0, row: int = 0, scale: float = 65536.0) -> History:
    """Return a run whose loss scaler has skipped some steps."""
    history = run_of((), flat(steps))
    history.info = replace(history.info, skipped_steps=skipped, skipped_in_a_row=row, loss_scale=scale)
    return history


def test_a_scaler_that_skips_every_eighth_step_is_a_warning() -> None:
    """30 of 229."""
    finding = only(find_loss_scale_collapse(scaled(skipped=30, scale=4.0), CONFIG))

    assert (finding.code, finding.severity) == ("GG213", Severity.WARNING)
    assert finding.message == (
        "The loss scaler finds no scale that lasts: 30 of 229 steps were skipped (13 %), and it is now 4."
    )


def test_a_scaler_that_skips_every_step_is_an_error() -> None:
    """Below 2^-4 and still falling: no scale helps."""
    finding = only(find_loss_scale_collapse(scaled(steps=1, row=20, scale=0.06), CONFIG))

    assert finding.severity is Severity.ERROR
    assert "the last 20 steps were all skipped" in finding.message


@pytest.mark.parametrize(
    "history",
    [scaled(), scaled(skipped=4), scaled(steps=5, skipped=5), scaled(row=16), scaled(skipped=30, scale=NAN)],
    ids=["none", "a few", "too few tried", "the search at the start", "no scaler"],
)
def test_a_scaler_at_work_is_left_alone(history: History) -> None:
    """A single lowering is normal: the scaler searches."""
    assert find_loss_scale_collapse(history, CONFIG) == []


# --------------------------------------------------------------------------------------------------------- real runs


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    scaler: torch.amp.GradScaler | None = None,
    autocast: torch.dtype | None = None,
    factor: float = 1.0,
    spoil: Callable[[int], bool] = lambda _: False,
) -> gradguard.Diagnosis:
    """Train on digits under a guard, and return the verdict; ``spoil`` says which batches overflow."""
    dtype = next(model.parameters()).dtype
    with gradguard.watch(model, optimizer, scaler=scaler, on_finding="silent", on_error="raise") as guard:
        for step in range(steps):
            x, y = digit_batch(64, seed=step)
            optimizer.zero_grad()
            with torch.autocast("cpu", autocast, enabled=autocast is not None):
                loss = factor * nn.functional.cross_entropy(model(x.to(dtype)).float(), y)
            if spoil(step):
                loss = loss + 0.0 * sum(p.sum() for p in model.parameters()) * 1e38 * 1e38
            (loss if scaler is None else scaler.scale(loss)).backward()
            guard.record(loss=loss)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        return guard.diagnose()


def codes(diagnosis: gradguard.Diagnosis, least: Severity = Severity.WARNING) -> set[str]:
    """Return the codes that stand at a severity or above."""
    return {f.code for f in diagnosis.findings if f.standing and f.severity >= least}


def test_a_loss_too_small_for_float16_is_found_and_a_scaler_cures_it() -> None:
    """Gradients near 2^-24 under fp16 autocast: without a scaler they are lost, with one they are not."""
    verdicts = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**18)):
        torch.manual_seed(0)
        model = mlp(4, nn.Tanh, init="xavier")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005 / 4e-6)
        verdicts.append(train(model, optimizer, 60, scaler=scaler, autocast=torch.float16, factor=4e-6))
    sick, healthy = verdicts

    assert "GG211" in codes(sick)
    assert codes(healthy) == set()


def test_bfloat16_weights_that_cannot_move_are_found_and_float32_ones_are_not() -> None:
    """An update of 2e-4 of the weights, in two types."""
    torch.manual_seed(0)
    verdicts = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = mlp(4, nn.Tanh, init="xavier").to(dtype)
        verdicts[dtype] = train(model, torch.optim.Adam(model.parameters(), lr=5e-5), 60)

    assert "GG212" in codes(verdicts[torch.bfloat16])
    assert codes(verdicts[torch.float32], Severity.INFO) == set()


@pytest.mark.parametrize("interval", [1, 2000])
def test_skipped_steps_are_counted_from_the_falling_scale(interval: int) -> None:
    """A scale that doubles at each clean step overflows at every other; the usual interval skips nothing after it."""
    torch.manual_seed(0)
    model = mlp(3, init="he")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=interval)
    diagnosis = train(model, optimizer, 120, scaler=scaler, autocast=torch.float16)

    assert ("GG213" in codes(diagnosis)) == (interval == 1)


def test_a_scaler_that_never_finds_a_scale_is_told_without_a_single_step() -> None:
    """Every batch overflows at every scale: no optimizer step, no observation, and yet a verdict."""
    torch.manual_seed(0)
    model = mlp(3, init="he")
    scaler = torch.amp.GradScaler("cpu")
    diagnosis = train(model, torch.optim.SGD(model.parameters(), lr=0.1), 30, scaler=scaler, spoil=lambda _: True)

    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG213"
    assert diagnosis.primary.severity is Severity.ERROR


def test_a_scaler_that_never_finds_a_scale_is_announced_while_it_searches() -> None:
    """No step is ever completed: the backward passes are what counts."""
    torch.manual_seed(0)
    model = mlp(3, init="he")
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    told: list[Finding] = []
    with gradguard.watch(model, optimizer, scaler=scaler, on_finding=told.append, on_error="raise") as guard:
        for step in range(45):
            optimizer.zero_grad()
            loss = classification_loss(model, digit_batch(8, seed=step))
            scaler.scale(loss * math.inf).backward()
            guard.record(loss=loss)
            scaler.step(optimizer)
            scaler.update()

    assert [finding.code for finding in told] == ["GG213"]


# --------------------------------------------------------------------------------------------------- what is measured


def float16_model(factor: float) -> tuple[nn.Module, Callable[[], None]]:
    """Return a layer, and what gives it a gradient that float16 has held."""
    model = nn.Linear(64, 64, bias=False)

    def run() -> None:
        generator = torch.Generator().manual_seed(0)
        model.weight.grad = (torch.randn(64, 64, generator=generator) * factor).half().float()

    return model, run


@pytest.mark.parametrize(("factor", "low", "high"), [(1.0, 0.0, 0.0), (2e-7, 0.8, 1.0), (5e-6, 0.0, 0.2)])
def test_underflow_fraction_of_a_float16_gradient(factor: float, low: float, high: float) -> None:
    """Entries of standard deviation 1 are normal numbers, of 2e-7 mostly lost, of 5e-6 in the subnormal range."""
    model, run = float16_model(factor)
    run()
    seen = observe(model, run, optimizer=torch.optim.SGD(model.parameters(), lr=0.1)).parameter("weight")

    assert low <= seen["underflow_fraction"] <= high
    assert seen["rounding_unit"] == 2.0**-23


@pytest.mark.parametrize("factor", [1.0, 1e-6, 0.0])
def test_underflow_fraction_is_unknown_for_a_float32_gradient_and_for_zeros(factor: float) -> None:
    """float32 keeps what float16 rounds away; zeros alone have other owners."""
    model = nn.Linear(64, 64, bias=False)

    def run() -> None:
        model.weight.grad = torch.randn(64, 64) * factor

    assert math.isnan(observe(model, run).parameter("weight")["underflow_fraction"])


def test_reading_is_the_same_under_a_scaler() -> None:
    """A scaler's factor is taken into account: what matters is the number that float16 held."""
    torch.manual_seed(0)
    model = mlp(3, init="he")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with gradguard.watch(model, optimizer, scaler=scaler, every=1, on_error="raise") as guard:
        for unscale in (False, True):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = classification_loss(model, digit_batch(64))
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            guard.record(loss=loss)
            scaler.step(optimizer)
            scaler.update()
        fractions = guard.history.parameter("underflow_fraction")

    np.testing.assert_array_equal(fractions[:, 0], [0.0, 0.0])
