"""GG104 on made-up histories: detached, unused, cut off, and the structural zeros that are none of these."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors.no_gradient import find_missing_gradients
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.records import ParameterTable, StepRecord
from tests.histories import DENSE, NAN, chain, changed, decaying, falling

CONFIG = GuardConfig()


def net(steps: Sequence[int] = DENSE, layers: int = 6, **arguments: object) -> History:
    """Return a healthy ReLU chain: layers in the even rows 0 to 10, each with a weight and a bias."""
    return chain(layers=layers, activation="ReLU", steps=steps, **arguments)  # type: ignore[arg-type]  # kwargs of chain


def without_gradient(
    history: History, modules: Collection[str], *, ran: bool = True, at: Callable[[int], bool] = lambda _: True
) -> History:
    """Return the history with gradients absent from some modules, at the steps chosen.

    Args:
        history: A healthy history.
        modules: Modules with weights; their activations go with them.
        ran: Whether they took part in the forward pass; otherwise they have no row.
        at: Whether a step is affected.
    """

    def edit(record: StepRecord) -> StepRecord:
        if not at(record.step):
            return record
        table = record.layers
        rows = np.array([name in modules for name in table.names])
        rows |= np.roll(rows, 1) & (np.array(table.roles) == "activation")
        values = dict(record.layer_values)
        for name in ("delta_norm", "delta_max_abs", "input_delta_norm", "input_delta_max_abs"):
            values[name] = np.where(rows, NAN, values[name])
        values["gradient_calls"] = np.where(rows, 0.0, 1.0)
        if not ran:
            values["calls"] = np.where(rows, NAN, 1.0)
        owned = np.array([layer in modules for layer in record.parameters.layers])
        parameters = dict(record.parameter_values)
        for name in ("grad_norm", "grad_max_abs", "update_ratio", "moved_fraction"):
            parameters[name] = np.where(owned, NAN, parameters[name])
        parameters["absent"] = owned * 1.0
        return replace(record, layer_values=values, parameter_values=parameters)

    return changed(history, edit)


def with_zeros(history: History, rows: Collection[int], *, at: Callable[[int], bool] = lambda _: True) -> History:
    """Return the history with an exact zero delta at some rows, at the steps chosen."""

    def edit(record: StepRecord) -> StepRecord:
        if not at(record.step):
            return record
        chosen = np.isin(np.arange(len(record.layers)), list(rows))
        below = np.isin(np.arange(len(record.layers)), [row + 1 for row in rows])
        values = dict(record.layer_values)
        for name in ("delta_norm", "delta_max_abs"):
            values[name] = np.where(chosen, 0.0, values[name])
        for name in ("input_delta_norm", "input_delta_max_abs"):
            values[name] = np.where(below, 0.0, values[name])
        return replace(record, layer_values=values)

    return changed(history, edit)


def with_layer(history: History, name: str, row: int, value: float) -> History:
    """Return the history with one entry of a layer column replaced at every observation."""

    def edit(record: StepRecord) -> StepRecord:
        column = record.layer_values[name].copy()
        column[row] = value
        return replace(record, layer_values={**record.layer_values, name: column})

    return changed(history, edit)


def only(history: History) -> Finding:
    """Return the one finding of a history."""
    (finding,) = find_missing_gradients(history, CONFIG)
    return finding


# ------------------------------------------------------------------------------------------------- absent


def test_a_detached_part_is_named_by_its_last_module() -> None:
    """``encoder(x).detach()``: the modules ran, and no gradient came back."""
    finding = only(without_gradient(net(), {"0", "2"}))

    assert (finding.code, finding.name, finding.severity) == ("GG104", "no-gradient", Severity.WARNING)
    assert (finding.layer, finding.layers, finding.cause) == ("2", ("0", "2"), Cause.WIRING)
    assert finding.message == (
        "No gradient comes back to 2: its output is cut off from the loss, and 33 % of the trainable entries "
        "(4 parameters) get no gradient."
    )
    assert finding.evidence["share"].value == pytest.approx(1 / 3)


def test_a_cut_that_takes_half_of_the_model_is_an_error() -> None:
    """Most of the model does not learn."""
    assert only(without_gradient(net(), {"0", "2", "4"})).severity is Severity.ERROR


def test_a_cut_must_recur_in_a_run_and_not_in_a_check() -> None:
    """Two consecutive observations; a check has only one."""
    assert find_missing_gradients(without_gradient(net(steps=(0,)), {"0"}), CONFIG) == []
    assert only(without_gradient(net(steps=(0, 1)), {"0"})).step == 0
    assert only(without_gradient(net(steps=(0,), preflight=True), {"0"})).code == "GG104"


@pytest.mark.parametrize(("layers", "severity"), [(6, Severity.WARNING), (30, Severity.INFO)])
def test_an_unused_module_counts_by_its_size(layers: int, severity: Severity) -> None:
    """A sixth of the model is worth a warning, a thirtieth a mention."""
    finding = only(without_gradient(net(layers=layers), {"4"}, ran=False))

    assert finding.severity is severity
    assert finding.message.startswith("4.weight and 4.bias are trainable but took no part in the loss")
    assert finding.evidence["kind"].value == "unused"


@pytest.mark.parametrize(("layers", "severity"), [(6, Severity.WARNING), (30, Severity.INFO)])
def test_a_head_whose_output_is_not_used_counts_by_its_size(layers: int, severity: Severity) -> None:
    """A pooler runs and nobody asks for its output: the trunk before it learns, so nothing is cut off."""
    finding = only(without_gradient(net(layers=layers), {"8"}))

    assert finding.severity is severity
    assert finding.evidence["kind"].value == "output unused"
    assert finding.message.startswith("8.weight and 8.bias are trainable but took no part in the loss")


def test_modules_that_start_to_be_passed_over_are_a_matter_of_routing() -> None:
    """An expert that got its examples, and gets none for eight observations: INFO, however large."""
    history = without_gradient(net(steps=range(20)), {"4"}, ran=False, at=lambda step: step >= 10)

    assert only(history).severity is Severity.INFO


def test_modules_that_are_missing_for_one_reason_make_one_finding() -> None:
    """Two experts passed over, one since step 8 and one since step 10."""
    history = without_gradient(net(steps=range(20), layers=10), {"4"}, ran=False, at=lambda step: step >= 8)
    history = without_gradient(history, {"4", "8"}, ran=False, at=lambda step: step >= 10)
    finding = only(history)

    assert finding.layers == ("4.weight", "4.bias", "8.weight", "8.bias")
    assert (finding.step, finding.last_step) == (8, 19)


def test_a_single_unused_parameter_is_info() -> None:
    """A mask token whose module ran and got its gradient."""

    def edit(record: StepRecord) -> StepRecord:
        absent, gradient = np.zeros(12), record.parameter_values["grad_norm"].copy()
        absent[3], gradient[3] = 1.0, NAN
        return replace(record, parameter_values={**record.parameter_values, "absent": absent, "grad_norm": gradient})

    finding = only(changed(net(), edit))

    assert (finding.severity, finding.layer) == (Severity.INFO, "2.bias")
    assert finding.message.startswith("2.bias is trainable but took no part in the loss: 0.3 % of")


def test_a_parameter_on_the_container_of_what_was_cut_off_belongs_to_it() -> None:
    """A position embedding sits on the model itself; it is cut off with the encoder, not unused."""
    history = without_gradient(net(), {"0", "2"})

    def edit(record: StepRecord) -> StepRecord:
        old = record.parameters
        table = ParameterTable(
            names=("position", *old.names),
            aliases=((), *old.aliases),
            layers=("", *old.layers),
            sizes=(64, *old.sizes),
            dims=(2, *old.dims),
        )
        first = {"grad_norm": NAN, "absent": 1.0, "trainable": 1.0}
        values = {k: np.concatenate([[first.get(k, NAN)], v]) for k, v in record.parameter_values.items()}
        return replace(record, parameters=table, parameter_values=values)

    finding = only(changed(history, edit))

    assert finding.layers == ("", "0", "2")
    assert finding.layer == "2"


def test_stochastic_depth_is_silent() -> None:
    """A block that is skipped at some steps gets its gradient at others."""
    skipped = without_gradient(net(steps=range(12)), {"4"}, ran=False, at=lambda step: step % 4 != 3)

    assert find_missing_gradients(skipped, CONFIG) == []


def test_heads_that_take_turns_are_silent() -> None:
    """Two tasks, one head each: each is absent at every second step."""
    history = without_gradient(net(), {"10"}, ran=False, at=lambda step: step % 2 == 0)
    history = without_gradient(history, {"8"}, ran=False, at=lambda step: step % 2 == 1)

    assert find_missing_gradients(history, CONFIG) == []


def test_a_gradient_that_stops_coming_is_given_time() -> None:
    """It used to arrive: eight observations must pass before its absence counts."""
    soon = without_gradient(net(steps=range(20)), {"4"}, at=lambda step: step >= 10)
    late = without_gradient(net(steps=range(15)), {"4"}, at=lambda step: step >= 10)

    assert only(soon).step == 10
    assert find_missing_gradients(late, CONFIG) == []


def test_a_part_that_is_connected_later_leaves_a_resolved_finding() -> None:
    """It was cut off for the first steps, and is not any more."""
    finding = only(without_gradient(net(), {"0", "2"}, at=lambda step: step < 10))

    assert (finding.severity, finding.step, finding.resolved_step) == (Severity.INFO, 0, 10)


@pytest.mark.parametrize("column", ["trainable", "absent"])
def test_what_is_frozen_or_not_due_is_silent(column: str) -> None:
    """Frozen parameters, and those of another optimizer, have no gradient and need none."""
    frozen = without_gradient(net(), {"0", "2"})

    def edit(record: StepRecord) -> StepRecord:
        owned = np.array([layer in {"0", "2"} for layer in record.parameters.layers])
        values = {**record.parameter_values, "absent": np.zeros(12), column: np.where(owned, 0.0, 1.0)}
        values["absent"] = np.zeros(12)
        return replace(record, parameter_values=values)

    assert find_missing_gradients(changed(frozen, edit), CONFIG) == []


def test_a_loss_that_depends_on_nothing_is_an_error_in_a_check() -> None:
    """No gradient at all: the loss does not reach the model."""
    everything = {str(row) for row in range(0, 11, 2)}
    finding = only(without_gradient(net(steps=(0,), preflight=True), everything))

    assert finding.severity is Severity.ERROR
    assert finding.message == "No gradient reaches any of the 12 parameters: the loss does not depend on them."


def test_gradients_read_at_the_wrong_moment_are_no_finding() -> None:
    """In a run ``backward`` would have failed: all absent means that they had been cleared already."""
    everything = {str(row) for row in range(0, 11, 2)}

    assert find_missing_gradients(without_gradient(net(), everything), CONFIG) == []


# ------------------------------------------------------------------------------------------------- zeros

PREFIX = (0, 1, 2, 3, 4, 5)


def test_an_operation_without_slope_cuts_the_gradient_off() -> None:
    """``torch.sign`` between two layers: exact zeros from there to the input, with no decay towards them."""
    finding = only(with_zeros(net(), PREFIX))

    assert (finding.code, finding.severity, finding.cause) == ("GG104", Severity.ERROR, Cause.WIRING)
    assert finding.message == (
        "The gradient is cut off in 6: it is exactly zero at all 3 layers from the input up to 4."
    )
    assert (finding.layer, finding.layers) == ("6", ("0", "2", "4"))
    assert {item.cause for item in finding.ruled_out} == {Cause.DEAD_UNITS, Cause.PRECISION}


def test_a_cut_is_looked_at_again_after_the_first_steps() -> None:
    """Before step 5 it may be an initialization with zeros that nobody can see."""
    assert find_missing_gradients(with_zeros(net(steps=(0, 1, 2)), PREFIX), CONFIG) == []
    assert only(with_zeros(net(steps=(0, 1, 2, 5, 10)), PREFIX)).step == 5


def test_a_cut_between_two_modules_is_placed_before_the_next_one() -> None:
    """The next layer's input still has a gradient: plain code lost it."""
    finding = only(with_layer(with_zeros(net(), PREFIX), "input_delta_norm", 6, 0.1))

    assert finding.message.startswith("The gradient is cut off before 6:")


def test_a_cut_beside_a_branch_that_is_given_raw_data_is_placed_behind_its_own_end() -> None:
    """What runs next takes none of it: the cut is not before that."""
    finding = only(with_layer(with_zeros(net(), PREFIX), "input_delta_norm", 6, NAN))

    assert finding.message.startswith(f"The gradient is cut off behind {finding.layer}:")
    assert finding.layer == "4"


@pytest.mark.parametrize(
    ("name", "row", "value"),
    [
        ("inactive_fraction", 5, 1.0),
        ("input_inactive_fraction", 6, 1.0),
        ("saturated_fraction", 5, 1.0),
        ("derivative_mean", 5, 0.0),
    ],
)
def test_zeros_of_a_dead_or_saturated_layer_are_its_own(name: str, row: int, value: float) -> None:
    """GG301 and GG302 own them."""
    assert find_missing_gradients(with_layer(with_zeros(net(), PREFIX), name, row, value), CONFIG) == []


def test_zeros_that_continue_a_decay_are_the_vanishing_gradients_own() -> None:
    """GG101 owns them."""
    assert find_missing_gradients(with_zeros(decaying(), range(20)), CONFIG) == []


def zero_weight(history: History, row: int, *, at: Callable[[int], bool] = lambda _: True) -> History:
    """Return the history with one weight of norm zero at the steps chosen."""

    def edit(record: StepRecord) -> StepRecord:
        if not at(record.step):
            return record
        norms = record.parameter_values["weight_norm"].copy()
        norms[row] = 0.0
        return replace(record, parameter_values={**record.parameter_values, "weight_norm": norms})

    return changed(history, edit)


def test_a_zero_initialized_head_is_silent() -> None:
    """At step 0 everything before it gets exactly nothing; from step 1 on it does not. A check sees step 0 only."""
    start = with_zeros(net(), range(10), at=lambda step: step == 0)
    assert find_missing_gradients(zero_weight(start, 10, at=lambda step: step == 0), CONFIG) == []

    check = with_zeros(net(steps=(0,), preflight=True), range(10))
    assert find_missing_gradients(zero_weight(check, 10), CONFIG) == []
    assert only(check).severity is Severity.ERROR


def test_a_head_that_stays_zero_is_not_silent() -> None:
    """Looked at again after 5 steps: weights that never leave zero keep the gradient from everyone."""
    stuck = zero_weight(with_zeros(net(), range(10)), 10)

    assert only(stuck).severity is Severity.ERROR


def test_zero_biases_do_not_count_as_zero_initialized_modules() -> None:
    """Biases begin at zero in every second net."""
    check = zero_weight(with_zeros(net(steps=(0,), preflight=True), PREFIX), 7)

    assert only(check).layer == "6"


BRANCH = (4, 5, 6)


def test_zero_initialized_branches_are_silent_at_first() -> None:
    """Zeros between live layers: a residual branch that starts at nothing."""
    first = with_zeros(net(), BRANCH, at=lambda step: step < 5)

    assert find_missing_gradients(first, CONFIG) == []
    assert find_missing_gradients(with_zeros(net(steps=(0,), preflight=True), BRANCH), CONFIG) == []


@pytest.mark.parametrize(("layers", "severity"), [(6, Severity.WARNING), (40, Severity.INFO)])
def test_a_branch_that_never_comes_alive_is_mentioned_or_warned_of(layers: int, severity: Severity) -> None:
    """Looked at again after 5 steps, over six observations."""
    finding = only(with_zeros(net(steps=(0, 5, 10, 20, 50, 100, 150), layers=layers), BRANCH))

    assert finding.severity is severity
    assert "get a gradient of exactly zero while layers before and after learn" in finding.message


def test_a_branch_of_dead_units_is_the_dead_layers_own() -> None:
    """GG301 owns it."""
    dead = with_layer(with_zeros(net(steps=(5, 10, 20, 50, 100, 150)), BRANCH), "inactive_fraction", 5, 1.0)

    assert find_missing_gradients(dead, CONFIG) == []


def test_a_loss_without_a_slope_is_an_error() -> None:
    """Zero at every layer from the first observation on: argmax, or a weight of 0."""
    finding = only(with_zeros(net(), range(11)))

    assert (finding.severity, finding.cause) == (Severity.ERROR, Cause.LOSS)
    assert finding.message == "The loss gives no gradient: it is exactly zero at every layer."


@pytest.mark.parametrize(
    ("losses", "found"), [([0.0] * 2 + [1.0] * 98, False), ([0.0] * 3, False), ([0.0] * 100, True)]
)
def test_a_batch_that_is_right_by_chance_has_a_loss_of_zero_and_no_slope(losses: list[float], found: bool) -> None:
    """One example of a class that the first weights give already; a loss that is zero for good is another matter."""
    history = with_zeros(net(losses=losses), range(11), at=lambda step: step < 2 or found)

    assert bool(find_missing_gradients(history, CONFIG)) is found


def test_a_check_tells_of_a_loss_that_is_zero_whatever_comes_out() -> None:
    """The cross-entropy of one class: its softmax is 1."""
    model = torch.nn.Linear(4, 1)
    diagnosis = gradguard.check(
        model,
        (torch.randn(8, 4), torch.zeros(8, dtype=torch.long)),
        lambda net, batch: torch.nn.functional.cross_entropy(net(batch[0]), batch[1]),
    )

    assert [finding.code for finding in diagnosis.findings if finding.severity is Severity.ERROR] == ["GG104"]


def test_a_loss_at_its_minimum_is_no_illness() -> None:
    """A hinge loss that is satisfied gives no gradient either, later in the run."""
    for losses in (falling(101), []):
        late = with_zeros(net(losses=losses), range(11), at=lambda step: step >= 20)
        assert find_missing_gradients(late, CONFIG) == []


# ------------------------------------------------------------------------------------------------ several optimizers


class Adversaries(nn.Module):
    """A generator of points in the plane and its discriminator."""

    def __init__(self) -> None:
        super().__init__()
        self.generator = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))
        self.discriminator = nn.Sequential(nn.Linear(2, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))


@pytest.mark.parametrize("cut", [True, False])
def test_an_optimizer_that_steps_without_gradients_while_others_have_theirs(cut: bool) -> None:
    """The generator's output is detached in its own step: it stands still, and the discriminator learns on."""
    torch.manual_seed(0)
    model = Adversaries()
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (model.generator, model.discriminator)]
    with gradguard.watch(model, optimizers, every=5, on_finding="silent", on_error="raise") as guard:
        for _ in range(30):
            real, noise = 0.3 * torch.randn(32, 2) + 1.0, torch.randn(32, 4)
            optimizers[1].zero_grad()
            fake = model.generator(noise).detach()
            loss = F.softplus(-model.discriminator(real)).mean() + F.softplus(model.discriminator(fake)).mean()
            loss.backward()
            guard.record(loss=loss, name="discriminator")
            optimizers[1].step()
            optimizers[0].zero_grad()
            fake = model.generator(noise)
            loss = F.softplus(-model.discriminator(fake.detach() if cut else fake)).mean()
            loss.backward()
            guard.record(loss=loss, name="generator")
            optimizers[0].step()
        diagnosis = guard.diagnose()

    found = [(f.code, f.optimizer, f.layer) for f in diagnosis.findings if f.severity >= Severity.WARNING]
    assert found == ([("GG104", "generator", "generator.2")] if cut else [])
    assert diagnosis.healthy is not cut
