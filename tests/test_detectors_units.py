"""GG301 and GG302 on made-up histories: dead and saturated units, and the healthy nets that show some of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors.dead_units import find_dead_units
from gradguard.detectors.saturated_units import find_saturated_units
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.records import StepRecord
from tests.histories import DENSE, NAN, chain, changed, falling, flat

CONFIG = GuardConfig()
LONG = (*DENSE, 150, 200)


def relu(steps: Sequence[int] = LONG, **arguments: object) -> History:
    """Return a healthy chain of six layers with ReLU in the odd rows 1 to 9."""
    return chain(layers=6, activation="ReLU", steps=steps, **arguments)  # type: ignore[arg-type]  # kwargs of chain


def filled(
    history: History,
    entries: Mapping[str, Mapping[int, float]],
    *,
    at: Callable[[int], bool] = lambda _: True,
    parameters: Mapping[str, float] | None = None,
) -> History:
    """Return the history with entries of layer columns, and whole parameter columns, replaced at the steps chosen."""

    def edit(record: StepRecord) -> StepRecord:
        if not at(record.step):
            return record
        values = dict(record.layer_values)
        for name, rows in entries.items():
            values[name] = values[name].copy()
            for row, value in rows.items():
                values[name][row] = value
        owned = {name: np.full(len(record.parameters), value) for name, value in (parameters or {}).items()}
        return replace(record, layer_values=values, parameter_values={**record.parameter_values, **owned})

    return changed(history, edit)


def dead(history: History, share: float, *rows: int, since: int = 0) -> History:
    """Return the history with a share of units inactive from ``since`` on, and proven dead 20 steps later."""
    silent = filled(history, {"inactive_fraction": dict.fromkeys(rows, share)}, at=lambda step: step >= since)
    return filled(silent, {"dead_fraction": dict.fromkeys(rows, share)}, at=lambda step: step >= since + 20)


def one_dead(history: History) -> Finding:
    """Return the one finding of dead units."""
    (finding,) = find_dead_units(history, CONFIG)
    return finding


# ------------------------------------------------------------------------------------------------- dead


def test_a_dead_layer_is_an_error_and_named() -> None:
    """More than 90 % of a layer for 20 steps."""
    finding = one_dead(dead(relu(), 0.97, 3, 5))

    assert (finding.code, finding.name, finding.severity) == ("GG301", "dead-units", Severity.ERROR)
    assert (finding.layer, finding.layers, finding.step) == ("3", ("3", "5"), 0)
    assert finding.message == (
        "97 % of the units of 3 are dead: they output zero and get no gradient; 2 layers are above 50 %."
    )
    assert finding.evidence["dead_fraction"].unit == "fraction"


@pytest.mark.parametrize(("steps", "fires"), [(LONG, True), (DENSE[:6], False)])
def test_half_of_a_layer_is_a_warning_once_it_has_lasted(steps: Sequence[int], fires: bool) -> None:
    """Nets that train show up to 62 % in their first steps: the share must stand 20 steps beyond the proof."""
    found = find_dead_units(dead(relu(steps=steps), 0.6, 3), CONFIG)

    assert [f.severity for f in found] == ([Severity.WARNING] if fires else [])


def test_a_loss_that_fell_from_far_above_and_is_still_worse_than_chance_takes_nothing_off() -> None:
    """Raw data far from 0: 93 at first, 6 after 200 steps, where three classes have 1.1 by guessing."""
    assert one_dead(dead(relu(losses=falling(201, 93.0, 6.0), classes=3), 0.6, 3)).severity is Severity.WARNING
    assert one_dead(dead(relu(losses=falling(201, 93.0, 0.4), classes=3), 0.6, 3)).severity is Severity.INFO


@pytest.mark.parametrize(("share", "severity"), [(0.6, Severity.INFO), (0.97, Severity.WARNING)])
def test_a_loss_that_has_fallen_takes_one_level_off(share: float, severity: Severity) -> None:
    """Some nets that train end with more than half of a layer dead."""
    assert one_dead(dead(relu(losses=falling(201)), share, 3)).severity is severity


@pytest.mark.parametrize(("share", "severity"), [(0.62, None), (0.95, Severity.WARNING), (1.0, Severity.ERROR)])
def test_a_check_before_the_first_step_speaks_above_90_percent_only(share: float, severity: Severity | None) -> None:
    """One batch cannot tell dead units from unlucky ones; a layer without any active unit passes nothing."""
    history = filled(relu(steps=(0,), preflight=True), {"inactive_fraction": {3: share}, "dead_fraction": {3: NAN}})

    assert [f.severity for f in find_dead_units(history, CONFIG)] == ([] if severity is None else [severity])


def test_the_first_steps_of_a_run_are_looked_at_like_a_check() -> None:
    """Until units can be proven dead, more than 90 % inactive units are a warning."""
    finding = one_dead(dead(relu(steps=(0, 1, 2)), 1.0, 3))

    assert finding.severity is Severity.WARNING
    assert "inactive for the whole batch" in finding.message


@pytest.mark.parametrize("share", [0.3, 0.5])
def test_healthy_shares_are_silent(share: float) -> None:
    """A ReLU net at rest has a third of its units off; half is the limit, and not beyond it."""
    assert find_dead_units(dead(relu(), share, 3), CONFIG) == []


def test_nets_without_relu_are_silent() -> None:
    """The share does not apply to sigmoid or tanh."""
    assert find_dead_units(chain(activation="Tanh"), CONFIG) == []


def test_units_that_come_back_leave_a_resolved_finding() -> None:
    """Dead from step 0 to 100, active at 150."""
    history = filled(
        dead(relu(), 0.95, 3), {"inactive_fraction": {3: 0.3}, "dead_fraction": {3: 0.0}}, at=lambda s: s > 100
    )
    finding = one_dead(history)

    assert (finding.severity, finding.resolved_step) == (Severity.INFO, 150)
    assert finding.message == "Units of 3 had died (up to 95 % of a layer) and are active again."


def test_updates_that_were_too_large_before_are_the_cause() -> None:
    """One step of twice the weights' size, and the layer is dead."""
    fast = filled(relu(), {}, parameters={"update_ratio": 2.0}, at=lambda step: step == 0)
    finding = one_dead(dead(fast, 0.97, 3, since=1))

    assert (finding.cause, finding.step) == (Cause.LEARNING_RATE, 1)
    assert finding.evidence["update_ratio"].value == pytest.approx(2.0)
    assert finding.ruled_out == ()


def test_a_layer_dead_from_the_start_was_initialized_so() -> None:
    """At step 0 no update can be to blame, and the input is of ordinary size."""
    finding = one_dead(dead(relu(), 0.97, 3))

    assert finding.cause is Cause.WEIGHT_SCALE
    assert [(item.cause, item.reason) for item in finding.ruled_out] == [
        (Cause.LEARNING_RATE, "there at step 0, before any update")
    ]


def test_huge_inputs_are_the_cause_where_they_are_huge() -> None:
    """Raw pixel sums of a million."""
    assert one_dead(filled(dead(relu(), 0.97, 1), {"input_max_abs": {0: 1e6}})).cause is Cause.DATA


def test_functional_activations_are_attributed_to_the_layer_before() -> None:
    """``F.relu`` has no row: its units are those of the layer whose output it takes."""
    history = chain(layers=6, activation="", steps=LONG)
    history = filled(history, {"input_inactive_fraction": {3: 1.0}, "input_dead_fraction": {3: 1.0}})
    finding = one_dead(history)

    assert finding.layer == "2"
    assert finding.severity is Severity.ERROR


def test_what_is_not_finite_is_not_dead() -> None:
    """A comparison with NaN calls every unit inactive."""
    lost = {"inactive_fraction": {3: 1.0}, "dead_fraction": {3: 1.0}, "forward_rms": {3: np.inf}}

    assert find_dead_units(filled(relu(), lost), CONFIG) == []


# ------------------------------------------------------------------------------------------------- saturated


def tanh(steps: Sequence[int] = LONG, **arguments: object) -> History:
    """Return a healthy chain of six layers with tanh in the odd rows 1 to 9."""
    return chain(layers=6, activation="Tanh", steps=steps, **arguments)  # type: ignore[arg-type]  # kwargs of chain


def saturated(history: History, share: float, passed: float, *rows: int, **more: Callable[[int], bool]) -> History:
    """Return the history with a share of saturated units in some activations, and a gain across them."""

    def edit(record: StepRecord) -> StepRecord:
        if "at" in more and not more["at"](record.step):
            return record
        values = {name: column.copy() for name, column in record.layer_values.items()}
        for row in rows:
            values["saturated_fraction"][row] = share
            values["derivative_mean"][row] = passed
            values["input_delta_norm"][row] = values["delta_norm"][row] * passed
        return replace(record, layer_values=values)

    return changed(history, edit)


def one_saturated(history: History) -> Finding:
    """Return the one finding of saturated units."""
    (finding,) = find_saturated_units(history, CONFIG)
    return finding


def test_saturation_that_costs_the_gradient_is_a_warning() -> None:
    """Nine units in ten at the flat ends, a tenth of the gradient passes, the loss does not fall."""
    finding = one_saturated(saturated(tanh(losses=flat(201)), 0.9, 0.1, 1, 3))

    assert (finding.code, finding.name, finding.severity) == ("GG302", "saturated-units", Severity.WARNING)
    assert (finding.layer, finding.layers, finding.cause) == ("1", ("1", "3"), Cause.WEIGHT_SCALE)
    assert finding.message == (
        "90 % of the units of 1 are saturated, and the gradient passes with 10 % of the largest derivative."
    )
    assert finding.evidence["activation_gain"].note == "Tanh: at most 1"


def test_far_inputs_are_the_cause_where_they_are_far() -> None:
    """Raw data of size 300 into tanh."""
    history = filled(saturated(tanh(losses=flat(201)), 0.9, 0.1, 1), {"input_max_abs": {0: 300.0}})

    assert one_saturated(history).cause is Cause.DATA


@pytest.mark.parametrize(
    "build",
    [
        lambda: tanh(losses=flat(201)),
        lambda: saturated(tanh(losses=falling(201)), 0.9, 0.1, 3),
        lambda: saturated(tanh(losses=falling(201, 2.3, 2.0, noise=0.001)), 0.9, 0.1, 3),
        lambda: saturated(tanh(losses=flat(201)), 0.9, 0.5, 3),
        lambda: saturated(tanh(losses=flat(201)), 0.2, 0.1, 3),
        lambda: saturated(tanh(losses=flat(201)), 0.9, 0.1, 3, at=lambda step: step in {0, 1, 5, 20}),
        lambda: saturated(tanh(losses=flat(201)), 0.9, 0.1, 3, at=lambda step: step < 100),
        lambda: saturated(tanh(losses=flat(201)), 0.9, 0.1, 3, at=lambda step: step >= 150),
        lambda: chain(layers=6, activation="ReLU", losses=flat(101)),
    ],
    ids=["healthy", "fallen", "falling", "gradient passes", "few units", "flickering", "over", "new", "relu"],
)
def test_saturation_that_costs_nothing_is_no_finding(build: Callable[[], History]) -> None:
    """Trained tanh nets hold saturated units in good health."""
    assert find_saturated_units(build(), CONFIG) == []


def patched(monkeypatch: pytest.MonkeyPatch, scale: float) -> None:
    """Let the weights before every activation have this scale."""
    name = "gradguard.detectors.saturated_units.deviations_before"
    monkeypatch.setattr(name, lambda record: np.full(len(record.layers), scale))


@pytest.mark.parametrize(
    ("share", "passed", "since", "scale", "found"),
    [
        (0.4, 0.25, 0, 7.0, True),
        (0.4, 0.25, 0, 5.0, False),
        (0.4, 0.35, 0, 7.0, False),
        (0.2, 0.25, 0, 7.0, False),
        (0.4, 0.25, 1, 7.0, False),
        (0.4, 0.1, 1, 7.0, False),
    ],
    ids=["at first", "weights as trained", "passes enough", "few", "since training", "few since training"],
)
@pytest.mark.parametrize("preflight", [False, True])
def test_before_training_milder_saturation_is_the_fault_of_weights_or_data(
    monkeypatch: pytest.MonkeyPatch,
    share: float,
    passed: float,
    since: int,
    scale: float,
    found: bool,
    preflight: bool,
) -> None:
    """First weights leave healthy units off their ends; what training has made of them may lie there in good health."""
    patched(monkeypatch, scale)
    steps = (0,) if preflight else (0, 1, 2, 5, 10, 20, 50, 100, 150, 200)
    history = tanh(losses=[2.3] if preflight else flat(201), steps=steps, preflight=preflight)

    ill = saturated(history, share, passed, 3, at=lambda step: step >= since)

    assert bool(find_saturated_units(ill, CONFIG)) is found


def test_milder_saturation_at_the_start_of_a_run_that_goes_on_is_none_of_first_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A run resumed at step 100 begins with trained weights."""
    patched(monkeypatch, 7.0)
    history = saturated(tanh(losses=flat(101), steps=tuple(range(100, 200, 10))), 0.4, 0.25, 3)

    assert find_saturated_units(history, CONFIG) == []


class Late(nn.Module):
    """A tanh net, one of whose layers does not run at first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.late, self.last = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 1)
        self.squash, self.bend, self.steps = nn.Tanh(), nn.Tanh(), 0
        nn.init.normal_(self.first.weight, std=20.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return one value."""
        hidden = self.squash(self.first(x))
        hidden = self.bend(self.late(hidden)) if self.steps else hidden
        self.steps += 1
        value: torch.Tensor = self.last(hidden)
        return value


def test_layers_that_run_only_later_have_no_first_weights() -> None:
    """As under stochastic depth, or of experts that are chosen by the data."""
    torch.manual_seed(0)
    model = Late()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    with gradguard.watch(model, optimizer, on_error="raise", on_finding="silent") as guard:
        for _ in range(12):
            optimizer.zero_grad()
            loss = model(torch.randn(16, 4)).square().mean()
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        codes = {finding.code: finding.layers for finding in guard.diagnose().findings}

    assert codes.get("GG302") == ("squash",)


def test_an_output_activation_may_saturate() -> None:
    """A sigmoid before the loss is meant to reach its ends: no layer follows it."""
    history = saturated(tanh(losses=flat(201)), 0.9, 0.01, 9)

    def end_there(record: StepRecord) -> StepRecord:
        roles = (*record.layers.roles[:10], "other")
        return replace(record, layers=replace(record.layers, roles=roles))

    assert find_saturated_units(history, CONFIG) != []
    assert find_saturated_units(changed(history, end_there), CONFIG) == []


@pytest.mark.parametrize(("first", "severity"), [(0, Severity.WARNING), (200, Severity.INFO)])
def test_an_unknown_loss_makes_it_a_mention_unless_it_began_so(first: int, severity: Severity) -> None:
    """Without losses nobody can say that it does harm; before any training it is what a check would say."""
    steps = tuple(range(first, first + 40, 10))

    assert one_saturated(saturated(tanh(losses=[], steps=steps), 0.9, 0.1, 3)).severity is severity


@pytest.mark.parametrize(("passed", "found"), [(0.1, False), (0.001, True)])
def test_a_loss_that_falls_behind_a_layer_that_passes_nothing_excuses_nothing(passed: float, found: bool) -> None:
    """What falls is the work of the layers behind it."""
    losses = [2.4 - 0.0006 * step for step in range(101)]
    history = saturated(tanh(losses=losses, classes=0), 1.0, passed, 3)

    assert bool(find_saturated_units(history, CONFIG)) is found


def test_a_check_speaks_after_one_look_with_less_confidence() -> None:
    """Raw data into tanh shows before the first step."""
    finding = one_saturated(saturated(tanh(steps=(0,), preflight=True, losses=[2.3]), 0.9, 0.1, 1))

    assert (finding.severity, finding.confidence) == (Severity.WARNING, 0.6)


def test_the_measured_derivative_stands_in_where_no_gradient_was_seen_at_the_input() -> None:
    """An in-place activation has overwritten its input; the derivative is known all the same."""
    history = filled(saturated(tanh(losses=flat(201)), 0.9, 0.1, 3), {"input_delta_norm": {3: NAN}})

    assert one_saturated(history).layer == "3"
