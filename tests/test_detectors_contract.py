"""What every detector promises: pure, silent on nothing, catalogue codes, evidence with units, never an exception."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradguard.config import GuardConfig
from gradguard.detectors import DEFAULT_DETECTORS, Detector, run_detectors
from gradguard.diagnosis import diagnose
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.prescriptions import prescribe
from gradguard.records import OptimizerInfo, RunInfo, StepRecord
from gradguard.rules import RULES
from tests.histories import NAN, chain, changed, decaying, falling
from tests.strategies import histories

CONFIG = GuardConfig()
UNITS = {"", "decades", "fraction", "ratio", "steps", "layers", "L2 norm", "parameters", "observations"}
each_detector = pytest.mark.parametrize("detector", DEFAULT_DETECTORS, ids=lambda detector: str(detector.__name__))


def with_parameters(history: History, **columns: float) -> History:
    """Return the history with some parameter columns filled with one number."""

    def edit(record: StepRecord) -> StepRecord:
        values = {name: np.full(len(record.parameters), value) for name, value in columns.items()}
        return replace(record, parameter_values={**record.parameter_values, **values})

    return changed(history, edit)


def through_time(span: float) -> History:
    """Return a run whose first layer is followed through time, at the end of a sequence, and whose loss is flat."""

    def edit(record: StepRecord) -> StepRecord:
        only = np.where(np.arange(len(record.layers)) == 0, 1.0, NAN)
        numbers = {
            "temporal_span": span,
            "temporal_factor": 10 ** (span / 35),
            "temporal_steps": 40.0,
            "temporal_reach": 0.0,
            "gate_mean": 0.5,
        }
        columns = {name: only * value for name, value in numbers.items()}
        columns |= {"temporal_horizon": only * 5.0, "temporal_derivative": only * NAN}
        return replace(record, layer_values={**record.layer_values, **columns})

    return changed(chain(activation="Tanh"), edit)


SICK: dict[str, Callable[[], History]] = {
    "vanishing": decaying,
    "exploding": lambda: chain(gain=2.0, activation="ReLU"),
    "forgetting": lambda: through_time(-7.0),
    "exploding in time": lambda: through_time(7.0),
    "not in the optimizer": lambda: with_parameters(chain(activation="Tanh"), in_optimizer=0.0),
    "too fast": lambda: with_parameters(chain(activation="Tanh"), update_ratio=3.0),
    "too slow": lambda: with_parameters(chain(activation="Tanh"), update_ratio=1e-9),
    "absent": lambda: with_parameters(chain(activation="Tanh", preflight=True, steps=(0,)), absent=1.0, grad_norm=NAN),
    "corrupt": lambda: with_parameters(chain(activation="Tanh"), weight_norm=math.inf, weight_max_abs=NAN),
}


@each_detector
def test_nothing_observed_gives_nothing(detector: Detector) -> None:
    """Below its minimum of observations a detector is silent."""
    assert list(detector(History(), CONFIG)) == []


@each_detector
def test_a_healthy_run_gives_nothing(detector: Detector) -> None:
    """A chain that keeps its gradient's size, with a loss that falls."""
    for activation in ("ReLU", "Tanh", "GELU"):
        assert list(detector(chain(activation=activation, losses=falling(101)), CONFIG)) == []


@each_detector
@pytest.mark.parametrize("build", SICK.values(), ids=SICK.keys())
def test_the_same_history_gives_the_same_findings_and_stays_as_it_was(
    detector: Detector, build: Callable[[], History]
) -> None:
    """Detectors are pure: no state, no change to what they are given."""
    history = build()
    before = copy.deepcopy(history.records)
    first, second = list(detector(history, CONFIG)), list(detector(history, CONFIG))

    assert first == second
    for old, new in zip(before, history.records, strict=True):
        assert old.scalars == new.scalars
        for name, column in old.layer_values.items():
            np.testing.assert_array_equal(column, new.layer_values[name])
        for name, column in old.parameter_values.items():
            np.testing.assert_array_equal(column, new.parameter_values[name])


@pytest.mark.parametrize("build", SICK.values(), ids=SICK.keys())
def test_findings_name_rules_of_the_catalogue_and_units_of_the_field(build: Callable[[], History]) -> None:
    """Code, name and family come from the catalogue; every evidence has a known unit; steps are in order."""
    findings = run_detectors(build(), CONFIG)

    assert findings
    for finding in findings:
        rule = RULES[finding.code]
        assert (finding.name, finding.family) == (rule.name, rule.family)
        assert finding.message.endswith(".")
        assert finding.evidence
        assert {evidence.unit for evidence in finding.evidence.values()} <= UNITS
        assert finding.step <= finding.last_step
        assert isinstance(finding.cause, Cause)


@given(histories())
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_no_numbers_raise_and_every_verdict_can_be_written_down(history: History) -> None:
    """NaN, infinities, zeros, missing columns, several optimizers, odd losses: a verdict or none, never an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagnosis = prescribe(diagnose(history, run_detectors(history, CONFIG), config=CONFIG, batches=3, steps=3))

    assert diagnosis.to_json()
    assert diagnosis.verdict
    for finding in diagnosis.findings:
        assert finding.code in RULES
        assert finding.severity is Severity.INFO or finding.standing


@given(st.floats(min_value=1e-3, max_value=1e3), st.sampled_from(sorted(SICK)))
@settings(max_examples=30)
def test_the_scale_of_the_loss_changes_no_verdict(factor: float, name: str) -> None:
    """All gradients and losses times k give the same findings: mean or sum, weighted or not."""

    def scale(record: StepRecord) -> StepRecord:
        scaled = {"delta_norm", "delta_max_abs", "input_delta_norm", "input_delta_max_abs", "grad_norm", "grad_max_abs"}
        return replace(
            record,
            scalars={key: value * factor if key == "grad_norm" else value for key, value in record.scalars.items()},
            layer_values={k: v * factor if k in scaled else v for k, v in record.layer_values.items()},
            parameter_values={k: v * factor if k in scaled else v for k, v in record.parameter_values.items()},
        )

    history = SICK[name]()
    history.info = replace(history.info, classes=0)
    losses = [float(loss) * factor for loss in history.losses[1]]

    def judged(findings: list[Finding]) -> list[tuple[object, ...]]:
        return [(f.code, f.severity, f.cause, f.layer, f.step, f.message) for f in findings]

    scaled = run_detectors(changed(history, scale, losses), CONFIG)
    assert judged(scaled) == judged(run_detectors(history, CONFIG))


def test_select_and_ignore_let_rules_speak_or_not() -> None:
    """Codes, names and families, as linters take them."""
    sick = decaying()

    assert [f.code for f in run_detectors(sick, GuardConfig(select=("vanishing",)))] == ["GG101"]
    assert run_detectors(sick, GuardConfig(ignore=("GG101",))) == []
    assert run_detectors(sick, GuardConfig(select=("dead-units",))) == []


def test_each_optimizer_is_judged_by_itself_and_named() -> None:
    """A GAN: the discriminator's gradient vanishes, the generator's does not."""
    info = RunInfo(optimizers=(OptimizerInfo(name="Adam", label="generator", adaptive=True), OptimizerInfo(name="SGD")))
    history = History(info)
    for healthy, sick in zip(chain(activation="Tanh").records, decaying().records, strict=True):
        history.append(replace(healthy, optimizer=0))
        history.append(replace(sick, optimizer=1))

    (finding,) = run_detectors(history, CONFIG)

    assert (finding.code, finding.optimizer) == ("GG101", "SGD 1")
    assert finding.severity is Severity.ERROR


def test_detectors_are_given_as_an_argument() -> None:
    """Nothing registers itself: what runs is what is passed."""
    assert run_detectors(decaying(), CONFIG, detectors=()) == []
