"""GG101 and GG102 on made-up histories: culprit, cause, exact zeros, and what is no depth finding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from gradguard.config import GuardConfig
from gradguard.detectors.depth import find_depth, observed_spans
from gradguard.findings import Cause, Finding
from gradguard.history import History
from gradguard.records import FloatArray, StepRecord
from tests.histories import (
    NAN,
    backward,
    chain,
    changed,
    decaying,
    flat,
    observation,
    run_of,
    sequential,
)

CONFIG = GuardConfig()


def only(history: History) -> Finding:
    """Return the one finding of a history."""
    (finding,) = find_depth(history, CONFIG)
    return finding


def with_delta(history: History, change: Callable[[FloatArray], FloatArray]) -> History:
    """Return the history with delta changed at every observation; gradients at inputs are unknown then."""

    def edit(record: StepRecord) -> StepRecord:
        delta = change(record.layer_values["delta_norm"].copy())
        unknown = np.full(len(delta), NAN)
        values = {
            **record.layer_values,
            "delta_norm": delta,
            "delta_max_abs": delta * 0.1,
            "input_delta_norm": unknown,
            "input_delta_max_abs": unknown,
        }
        return replace(record, layer_values=values)

    return changed(history, edit)


# ------------------------------------------------------------------------------------------------- cause, culprit


def test_sigmoid_derivatives_are_the_cause_of_a_deep_sigmoid_net() -> None:
    """The weights pass 1.02, the activation 0.235: the derivative is to blame, everything else is ruled out."""
    finding = only(decaying(0.24, weight_gain=1.02))

    assert finding.cause is Cause.ACTIVATION_DERIVATIVE
    assert finding.evidence["activation_gain"].value == pytest.approx(0.24 / 1.02)
    assert finding.evidence["activation_gain"].note == "Sigmoid: at most 0.25"
    assert finding.evidence["weight_gain"].value == pytest.approx(1.02)
    assert finding.evidence["span"].unit == "decades"
    assert finding.evidence["layers"].value == 20
    assert {item.cause: item.reason for item in finding.ruled_out} == {
        Cause.LEARNING_RATE: "there at step 0, before any update",
        Cause.DATA: "finite, largest entry 3",
        Cause.PRECISION: "no underflow: no layer's gradient is zero",
        Cause.DEAD_UNITS: "no ReLU-like units",
    }


@pytest.mark.parametrize(
    ("activation", "weight_gain", "gain", "cause"),
    [
        ("ReLU", 0.577, 0.408, Cause.WEIGHT_SCALE),
        ("ReLU", 0.707, 0.5, Cause.WEIGHT_SCALE),
        ("ReLU", 0.9, 0.636, Cause.WEIGHT_SCALE),
        ("Tanh", 0.577, 0.54, Cause.WEIGHT_SCALE),
        ("GELU", 0.577, 0.39, Cause.WEIGHT_SCALE),
        ("Sigmoid", 0.577, 0.144, Cause.ACTIVATION_DERIVATIVE),
        ("Tanh", 1.0, 0.6, Cause.ACTIVATION_DERIVATIVE),
    ],
)
def test_cause_is_told_apart_by_what_weights_and_activations_pass(
    activation: str, weight_gain: float, gain: float, cause: Cause
) -> None:
    """Half of He is a matter of weights although ReLU passes as little: 0.707 is what ReLU passes in health."""
    finding = only(chain(gain=gain, weight_gain=weight_gain, activation=activation))

    assert finding.cause is cause
    assert cause not in {item.cause for item in finding.ruled_out}


def test_functional_activations_are_seen_between_layers() -> None:
    """With ``F.sigmoid`` no row is an activation: what lies between output and next input tells."""
    finding = only(chain(gain=0.24, activation="", weight_gain=1.0))

    assert finding.cause is Cause.ACTIVATION_DERIVATIVE
    assert finding.evidence["activation_gain"].value == pytest.approx(0.24)


def test_saturated_units_are_the_cause_where_the_derivative_is_far_below_its_bound() -> None:
    """A tanh net driven into its flat ends."""
    history = chain(gain=0.2, activation="Tanh", weight_gain=1.0)
    table = history.records[0].layers
    slope = np.array([0.1 if kind == "Tanh" else NAN for kind in table.types])
    edited = changed(history, lambda r: replace(r, layer_values={**r.layer_values, "derivative_mean": slope}))

    assert only(edited).cause is Cause.SATURATION


def test_batch_norm_and_relu_without_skips_explode_by_normalization() -> None:
    """A factor of 1.21 per layer, whatever the scale of the weights: Yang et al. 2019."""
    table = sequential(50, activation="ReLU", norm="BatchNorm1d")
    delta, at_input = backward(table, weight_gain=1.4, activation_gain=0.707, norm_gain=1.223)
    finding = only(run_of([observation(0, table, delta, at_input)], flat(1)))

    assert finding.code == "GG102"
    assert finding.cause is Cause.NORMALIZATION
    assert finding.evidence["layers"].value == 50
    assert finding.evidence["gain_per_layer"].value == pytest.approx(1.21, rel=0.01)


def test_one_module_that_loses_most_is_the_culprit() -> None:
    """Five decades in one layer of an otherwise healthy net."""
    table = sequential(12, activation="ReLU")
    delta, at_input = backward(table, weight_gain=1.414, activation_gain=0.707)
    bad = table.names.index("16")
    delta[:bad] *= 1e-5
    at_input[: bad + 1] *= 1e-5
    finding = only(run_of([observation(0, table, delta, at_input)], flat(1)))

    assert finding.layer == "16"
    assert finding.cause is Cause.WEIGHT_SCALE
    assert finding.message.endswith("5.0 decades over 12 layers, most of it in 16.")
    assert finding.evidence["culprit_gain"].value == pytest.approx(1.414e-5, rel=1e-3)


def test_a_uniform_decay_names_all_layers_and_a_typical_one() -> None:
    """No layer stands out: the span's layers stand in ``layers``."""
    finding = only(decaying())

    assert finding.layers == tuple(str(i) for i in range(0, 39, 2))
    assert finding.layer in finding.layers


def test_layers_that_all_lose_much_have_no_culprit_among_them() -> None:
    """Four layers of 1.5 decades each: a third of the span, and like all the others."""
    assert "culprit_gain" not in only(chain(gain=0.03, layers=4)).evidence


def test_a_branch_that_loses_much_is_no_culprit_while_the_trunk_goes_on() -> None:
    """The culprit's loss must show in the trunk: a branch behind a tiny gate stands beside it."""
    history = decaying(0.6, steps=(0,))
    record = history.records[0]
    at_input = record.layer_values["input_delta_norm"].copy()
    at_input[20] *= 1e-6
    edited = changed(history, lambda r: replace(r, layer_values={**r.layer_values, "input_delta_norm": at_input}))

    assert only(edited).evidence.get("culprit_gain") is None


# ------------------------------------------------------------------------------------------------- zeros, false alarms


def zeroed(history: History, rows: slice) -> History:
    """Return the history with an exact zero in some rows, at every observation."""

    def change(delta: FloatArray) -> FloatArray:
        delta[rows] = 0.0
        return delta

    return with_delta(history, change)


def test_zeros_that_continue_a_decay_are_underflow() -> None:
    """A 50-layer sigmoid net in float32: the first layers get exactly nothing, and it is still a vanishing gradient."""
    finding = only(zeroed(decaying(layers=50), slice(0, 30)))

    assert finding.code == "GG101"
    assert finding.message.endswith("At the first 15 layers it is exactly zero.")
    assert finding.evidence["zero_layers"].value == 15
    assert finding.evidence["last_finite_delta"].value == pytest.approx(0.1 * 0.24**34)
    assert finding.evidence["span"].value == pytest.approx((31 + 15) * math.log10(0.24))
    assert Cause.PRECISION not in {item.cause for item in finding.ruled_out}


def test_an_underflow_of_squares_is_no_zero() -> None:
    """Where the L2 norm underflowed and the largest entry did not, the gradient is tiny, not absent."""

    def edit(record: StepRecord) -> StepRecord:
        delta = record.layer_values["delta_norm"].copy()
        delta[:10] = 0.0
        return replace(record, layer_values={**record.layer_values, "delta_norm": delta})

    spans = observed_spans(changed(decaying(), edit), CONFIG)

    assert spans == pytest.approx(observed_spans(decaying(), CONFIG), abs=1.1)


def test_zeros_without_a_decay_are_no_vanishing_gradient() -> None:
    """They have owners of their own: dead units, a cut, a zero-initialized head."""
    assert find_depth(zeroed(chain(gain=1.0, activation="Tanh"), slice(0, 10)), CONFIG) == []


def test_zero_initialized_branches_are_silent() -> None:
    """ReZero, zero-gamma residual nets: zeros interspersed between live layers at the first steps."""
    assert find_depth(zeroed(chain(gain=1.0, activation="Tanh"), slice(2, 38, 4)), CONFIG) == []


@pytest.mark.parametrize("layers", [6, 12, 18, 24, 40])
def test_layer_scale_branches_are_silent(layers: int) -> None:
    """Rows inside branches lie six decades below the trunk: at the second row of a short net as well."""

    def branches(delta: FloatArray) -> FloatArray:
        inside = np.arange(len(delta)) % 12 != 0
        inside[-4:] = False
        delta[inside] *= 1e-6
        return delta

    assert find_depth(with_delta(chain(gain=1.0, layers=layers, activation="Tanh"), branches), CONFIG) == []


@pytest.mark.parametrize("factor", [1e-12, 1e-3, 1e3, 1e12])
@pytest.mark.parametrize("gain", [0.24, 1.0, 2.0])
def test_the_scale_of_the_loss_changes_no_verdict(gain: float, factor: float) -> None:
    """Losses by sum or by mean, scaled by anything: the same findings, causes and layers."""
    usual, scaled = (find_depth(chain(gain=gain, activation="Tanh", top=top), CONFIG) for top in (0.1, 0.1 * factor))

    def judged(findings: object) -> list[tuple[object, ...]]:
        return [(f.code, f.severity, f.cause, f.layer, f.message) for f in findings]  # type: ignore[attr-defined]  # Findings

    assert judged(usual) == judged(scaled)


def test_frozen_layers_without_a_gradient_are_left_out() -> None:
    """The first half is frozen: no gradient arrives there, and none is due."""

    def freeze(delta: FloatArray) -> FloatArray:
        delta[:20] = NAN
        return delta

    assert find_depth(with_delta(chain(gain=1.0, activation="Tanh"), freeze), CONFIG) == []


def test_nothing_observed_says_nothing() -> None:
    """An empty history, and one without a second layer."""
    assert find_depth(History(), CONFIG) == []
    assert find_depth(chain(gain=0.1, layers=1), CONFIG) == []


def test_a_diverged_run_keeps_the_verdict_of_its_last_finite_observation() -> None:
    """After the numbers cease to be finite there is no span: an explosion that stood before still stands."""

    def diverge(record: StepRecord) -> StepRecord:
        if record.step < 5:
            return record
        lost = np.full(len(record.layers), math.inf)
        values = {**record.layer_values, "delta_norm": lost, "delta_max_abs": np.full(len(lost), NAN)}
        return replace(record, layer_values=values)

    finding = only(changed(chain(gain=2.0, activation="ReLU"), diverge))

    assert (finding.step, finding.last_step, finding.resolved_step) == (0, 2, None)
