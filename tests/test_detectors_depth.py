"""GG101 and GG102 on made-up histories: the span, its levels by optimizer, culprit, cause, zeros, false alarms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradguard.config import GuardConfig
from gradguard.detectors.depth import find_depth, span_decades, supported_span, theil_sen_gain, trunk
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.records import LayerTable
from tests.histories import (
    DENSE,
    NAN,
    chain,
    decaying,
    falling,
    flat,
)

CONFIG = GuardConfig()


def only(history: History) -> Finding:
    """Return the one finding of a history."""
    (finding,) = find_depth(history, CONFIG)
    return finding


# ------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    ("gain", "layers", "span"),
    [(0.24, 20, -11.2), (0.408, 20, -7.0), (1.0, 20, 0.0), (2.0, 20, 5.4), (1.211, 50, 3.7)],
)
def test_span_of_a_uniform_chain_is_what_theory_says(gain: float, layers: int, span: float) -> None:
    """Sigmoid, default-initialized ReLU, healthy, twice He and BatchNorm-ReLU nets have the spans of algorithms.md."""
    delta = gain ** np.arange(layers - 1.0, -1.0, -1.0)

    assert span_decades(delta) == pytest.approx(span, abs=0.15)
    assert theil_sen_gain(delta) == pytest.approx(gain, rel=1e-9)


@pytest.mark.parametrize(("layers", "used"), [(2, 1), (5, 1), (6, 1), (15, 1), (16, 2), (24, 3), (1000, 125)])
def test_span_compares_the_first_and_the_last_eighth(layers: int, used: int) -> None:
    """An eighth is at least one layer, and one layer below the minimum."""
    delta = np.ones(layers)
    delta[:used] = 1e-4

    assert span_decades(delta) == pytest.approx(-4.0)


def test_span_leaves_out_zeros_and_what_is_not_finite() -> None:
    """Exact zeros have owners of their own; NaN and infinity say nothing about depth."""
    assert span_decades(np.array([0.0, NAN, 1e-3, math.inf, 1e-1, 1.0])) == pytest.approx(-3.0)
    assert math.isnan(span_decades(np.array([0.0, 1.0])))
    assert math.isnan(theil_sen_gain(np.array([1.0])))
    assert math.isnan(span_decades(np.array([])))


def test_gain_ignores_a_quarter_of_outlying_layers() -> None:
    """Branches decades below the trunk do not move the slope."""
    delta = 0.5 ** np.arange(20.0, 0.0, -1.0)
    delta[[3, 8, 12, 17]] *= 1e-6

    assert theil_sen_gain(delta) == pytest.approx(0.5, rel=0.02)


def test_gain_of_a_thousand_layers_is_fitted_on_a_thinned_trunk() -> None:
    """Pairs grow with the square: a very deep trunk is thinned, its slope per layer stays the same."""
    assert theil_sen_gain(0.99 ** np.arange(1000.0, 0.0, -1.0)) == pytest.approx(0.99, rel=1e-6)


def test_a_single_branch_cannot_make_a_supported_span() -> None:
    """A LayerScale branch among the first two rows pulls the span by 3 decades, and the supported span by none."""
    delta = np.ones(20)
    delta[1] = 1e-6

    assert span_decades(delta) == pytest.approx(-3.0)
    assert supported_span(delta) == 0.0
    assert supported_span(np.flip(delta)) == 0.0


@given(st.lists(st.floats(min_value=1e-30, max_value=1e30), min_size=2, max_size=80))
def test_supported_span_never_exceeds_the_span_and_keeps_its_sign(values: list[float]) -> None:
    """It can only take alarms away."""
    delta = np.array(values)
    span, supported = span_decades(delta), supported_span(delta)

    assert abs(supported) <= abs(span) + 1e-9
    assert supported * span >= 0.0


@given(
    st.lists(st.floats(min_value=1e-20, max_value=1e20), min_size=2, max_size=40),
    st.floats(min_value=1e-3, max_value=1e3),
)
def test_span_and_gain_do_not_depend_on_the_scale_of_the_loss(values: list[float], factor: float) -> None:
    """All gradients times k give the same span and gain."""
    delta = np.array(values)

    assert span_decades(delta * factor) == pytest.approx(span_decades(delta), abs=1e-6)
    assert theil_sen_gain(delta * factor) == pytest.approx(theil_sen_gain(delta), rel=1e-6)


def test_trunk_holds_the_layers_with_weights_and_a_live_gradient() -> None:
    """Activations, containers without weights, zeros and absent gradients do not count."""
    roles = ("embedding", "affine", "activation", "norm", "attention", "recurrent", "other", "affine", "affine")
    table = LayerTable(
        names=tuple("abcdefghi"), types=roles, kinds=roles, roles=roles, derivative_bounds=(NAN,) * len(roles)
    )

    assert trunk(table, np.array([1, 1, 1, 1, 1, 1, 1, 0, NAN], dtype=float)).tolist() == [0, 1, 3, 4, 5]


# ------------------------------------------------------------------------------------------------- levels


def test_vanishing_is_an_error_at_once_without_an_adaptive_optimizer() -> None:
    """SGD rescues no net: the first observation counts."""
    finding = only(decaying(steps=(0,), adaptive=False))

    assert (finding.code, finding.name, finding.family) == ("GG101", "vanishing-gradient", "vanishing")
    assert finding.severity is Severity.ERROR
    assert finding.message == (
        "The gradient vanishes on its way to the input: 11.2 decades over 20 layers, a factor of 0.24 per layer."
    )


@pytest.mark.parametrize(
    ("steps", "severity"), [((0,), Severity.WARNING), (DENSE[:-1], Severity.WARNING), (DENSE, Severity.ERROR)]
)
def test_vanishing_is_an_error_after_100_steps_with_an_adaptive_optimizer(
    steps: tuple[int, ...], severity: Severity
) -> None:
    """Adam rescues many nets within about 100 steps: until then it is a warning."""
    finding = only(decaying(steps=steps, adaptive=True))

    assert finding.severity is severity
    assert ("may still recover by step 100" in finding.message) == (severity is Severity.WARNING)


def test_an_unknown_optimizer_is_given_the_patience_of_an_adaptive_one() -> None:
    """Without an optimizer object there is no reason to be sure at step 0."""
    assert only(decaying(steps=(0,), adaptive=None)).severity is Severity.WARNING
    assert only(decaying(steps=DENSE, adaptive=None)).severity is Severity.ERROR


@pytest.mark.parametrize(("adaptive", "severity"), [(True, Severity.WARNING), (False, Severity.ERROR)])
def test_a_check_before_the_first_step_speaks_after_one_look(adaptive: bool, severity: Severity) -> None:
    """Preflight: one observation, and less confidence where an adaptive optimizer may put it right."""
    finding = only(decaying(steps=(0,), adaptive=adaptive, preflight=True, losses=[2.6]))

    assert finding.severity is severity
    assert "may still recover" not in finding.message
    assert finding.confidence <= (0.6 if adaptive else 0.9)


def test_a_finding_that_clears_is_info_with_the_step() -> None:
    """A default-initialized 20-layer net under Adam: alarm at step 0, over by step 100."""
    history = decaying(lambda step: 0.408 if step < 100 else 0.9, adaptive=True, activation="ReLU", weight_gain=0.577)
    finding = only(history)

    assert finding.severity is Severity.INFO
    assert (finding.step, finding.last_step, finding.resolved_step) == (0, 50, 100)
    assert finding.message == (
        "The gradient vanished on its way to the input (7.0 decades over 20 layers at step 0); "
        "it has recovered since step 100."
    )


def test_the_same_history_alarms_before_it_clears() -> None:
    """Seen at step 50, the run that recovers by step 100 has a standing warning."""
    finding = only(decaying(0.408, steps=DENSE[:-1], adaptive=True))

    assert finding.standing
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize("gain", [0.8, 0.9, 1.0, 1.1, 1.25])
def test_healthy_chains_are_silent(gain: float) -> None:
    """Two decades either way are normal."""
    assert find_depth(chain(gain=gain, activation="Tanh"), CONFIG) == []


@pytest.mark.parametrize(("gain", "code", "verb"), [(0.74, "GG101", "shrinks"), (1.35, "GG102", "grows")])
def test_between_two_and_three_decades_is_mentioned_and_no_more(gain: float, code: str, verb: str) -> None:
    """The held-out zoo has one healthy net at 2.5."""
    finding = only(chain(gain=gain, steps=DENSE[:-1], activation="Tanh"))

    assert (finding.code, finding.severity) == (code, Severity.INFO)
    assert f"The gradient {verb} on its way" in finding.message


@pytest.mark.parametrize(
    ("losses", "classes", "severity"),
    [(flat(101), 10, Severity.WARNING), (falling(101), 10, Severity.INFO), (flat(101), 0, Severity.INFO)],
    ids=["at chance", "learns", "no classes"],
)
def test_between_two_and_three_decades_is_a_warning_where_a_classifier_stays_at_chance(
    losses: list[float], classes: int, severity: Severity
) -> None:
    """A LeNet with sigmoid units loses 2.6 decades, and after 240 steps it names 11 % of the digits."""
    assert only(chain(gain=0.74, activation="Tanh", losses=losses, classes=classes)).severity is severity


def test_a_mention_that_passed_leaves_no_trace() -> None:
    """A span of 2.5 decades for a few steps is nothing to report afterwards."""
    assert find_depth(chain(gain=lambda step: 0.74 if step < 20 else 1.0, activation="Tanh"), CONFIG) == []


def test_a_span_that_hovers_at_the_limit_stays_one_finding() -> None:
    """Hysteresis: it begins beyond 3 decades and ends within 2, so that it does not flicker."""
    finding = only(decaying(lambda step: 0.65 if step % 2 == 0 else 0.75, activation="Tanh", adaptive=False))

    assert (finding.step, finding.resolved_step) == (0, None)


@pytest.mark.parametrize(
    ("losses", "severity"), [(flat(101), Severity.WARNING), (falling(101, 2.3, 2.0), Severity.INFO)]
)
def test_a_span_that_has_come_back_within_the_warning_counts_only_where_the_loss_is_stuck(
    losses: list[float], severity: Severity
) -> None:
    """From 4 decades to 2.2: on its way back, if the loss says so."""
    assert only(decaying(lambda step: 0.6 if step < 50 else 0.75, losses=losses)).severity is severity


@pytest.mark.parametrize(
    ("gain", "losses", "classes", "severity"),
    [
        (0.63, falling(101), 10, Severity.INFO),
        (0.63, flat(101), 10, Severity.ERROR),
        (0.63, falling(101), 0, Severity.WARNING),
        (0.24, falling(101), 10, Severity.WARNING),
    ],
    ids=["fallen", "stuck", "regression", "far beyond"],
)
def test_a_fallen_loss_excuses_a_vanishing_gradient_only_so_far(
    gain: float, losses: list[float], classes: int, severity: Severity
) -> None:
    """Adam divides the scale out; yet a loss may fall by its last layers, a squared error by its last bias alone."""
    assert only(decaying(gain, adaptive=True, losses=losses, classes=classes)).severity is severity


def test_a_vanishing_gradient_in_a_net_that_learns_is_a_warning_under_sgd() -> None:
    """The first layers get next to nothing from SGD, even where the last ones learn."""
    assert only(decaying(0.6, adaptive=False, losses=falling(101))).severity is Severity.WARNING


@pytest.mark.parametrize(("adaptive", "severity"), [(True, Severity.WARNING), (False, Severity.ERROR)])
def test_explosion_at_the_start(adaptive: bool, severity: Severity) -> None:
    """Twice the He scale: five decades of growth."""
    finding = only(chain(gain=2.0, steps=(0,), activation="ReLU", weight_gain=2.83, adaptive=adaptive))

    assert (finding.code, finding.name) == ("GG102", "exploding-gradient")
    assert finding.severity is severity
    assert finding.cause is Cause.WEIGHT_SCALE
    assert finding.message.startswith("The gradient explodes on its way to the input: 5.4 decades over 20 layers")


LATE = (0, 50, 100, 150, 200)


@pytest.mark.parametrize(
    ("losses", "classes", "severity"),
    [
        (flat(201), 10, Severity.ERROR),
        (falling(201), 10, Severity.INFO),
        ([], 10, Severity.INFO),
        (flat(201, level=0.4), 10, Severity.INFO),
        (flat(201, level=0.4), 0, Severity.ERROR),
    ],
    ids=["stuck", "fallen", "unknown", "learnt before", "stuck, no classes"],
)
def test_late_growth_of_more_than_two_decades_is_an_error_only_where_the_loss_is_stuck(
    losses: list[float], classes: int, severity: Severity
) -> None:
    """The convergence gate: a healthy net's span grows late in its run."""
    history = chain(gain=1.4, activation="Tanh", steps=LATE, losses=losses, classes=classes, adaptive=True)

    assert only(history).severity is severity


def test_late_growth_must_show_twice() -> None:
    """One noisy observation late in a run is only mentioned."""
    history = chain(gain=lambda step: 1.4 if step == 200 else 1.0, activation="Tanh", steps=LATE, adaptive=True)

    assert only(history).severity is Severity.INFO


def test_a_large_explosion_stays_a_warning_when_the_loss_falls_from_a_huge_value() -> None:
    """A net at twice the He scale begins with a loss of 1e5 and ends at 400: fallen, and sick."""
    history = chain(gain=2.0, steps=LATE, activation="ReLU", losses=falling(201, 1e5, 400.0), adaptive=True)

    assert only(history).severity is Severity.WARNING


def test_confidence_grows_with_distance_and_repetition() -> None:
    """One look near the limit is worth less than many far beyond it."""
    near = only(decaying(0.66, steps=(0,), adaptive=True))
    far = only(decaying(0.24, steps=DENSE, adaptive=False))

    assert near.confidence <= 0.6
    assert far.confidence == pytest.approx(0.98)
