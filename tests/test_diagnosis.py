"""Findings to a verdict: one illness first, consequences under it, what was too little, and the words."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from gradguard.config import GuardConfig
from gradguard.detectors import run_detectors
from gradguard.diagnosis import diagnose
from gradguard.findings import Cause, Diagnosis, Evidence, Finding, Severity, Unobserved
from gradguard.history import History
from gradguard.records import OptimizerInfo, RunInfo, StepRecord
from gradguard.rules import RULES
from tests.histories import DENSE, NAN, chain, changed, decaying, falling, flat

CONFIG = GuardConfig()


def found(
    code: str, step: int = 0, severity: Severity = Severity.WARNING, *, resolved: int | None = None, **more: object
) -> Finding:
    """Return a made-up finding."""
    rule = RULES[code]
    return Finding(
        code=code,
        name=rule.name,
        family=rule.family,
        severity=Severity.INFO if resolved is not None else severity,
        message=f"{rule.name}.",
        step=step,
        last_step=step,
        resolved_step=resolved,
        **more,  # type: ignore[arg-type]  # fields of Finding
    )


def judged(history: History, *, steps: int = 101, batches: int = 101, overhead: float = 0.01) -> Diagnosis:
    """Return the diagnosis of a history."""
    findings = run_detectors(history, CONFIG)
    return diagnose(history, findings, config=CONFIG, steps=steps, batches=batches, overhead=overhead)


# ------------------------------------------------------------------------------------------------- verdicts


def test_a_sick_run() -> None:
    """The message of the primary finding, and its cause."""
    diagnosis = judged(decaying())

    assert diagnosis.healthy is False
    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG101"
    assert diagnosis.verdict == (
        "The gradient vanishes on its way to the input: 11.2 decades over 20 layers, a factor of 0.24 per layer. "
        "Cause: Sigmoid derivatives."
    )
    assert diagnosis.observations == len(DENSE)


def test_a_healthy_run() -> None:
    """The span with its limit, the number of layers, and that there is nothing to do."""
    diagnosis = judged(chain(gain=0.95, activation="Tanh", losses=falling(101)), steps=240)

    assert diagnosis.healthy is True
    assert diagnosis.verdict == (
        "240 steps, 8 observed. The gradient keeps its size through 20 layers (0.4 decades; 3 would worry us). "
        "Nothing to do."
    )


def test_a_healthy_check() -> None:
    """One observation is enough before the first step."""
    history = chain(activation="Tanh", steps=(0,), preflight=True, losses=[2.3])
    diagnosis = diagnose(history, [], config=CONFIG, batches=1)

    assert diagnosis.healthy is True
    assert diagnosis.verdict.startswith("One forward and one backward pass. The gradient keeps its size")
    assert diagnosis.summary.kind == "check"


def test_a_finding_that_cleared_leaves_the_run_healthy() -> None:
    """Alarm at step 0, over by step 100: healthy, and on record."""
    history = decaying(lambda step: 0.408 if step < 100 else 0.9, adaptive=True, activation="ReLU", weight_gain=0.577)
    diagnosis = judged(history)

    assert diagnosis.healthy is True
    assert [(f.code, f.severity, f.resolved_step) for f in diagnosis.findings] == [("GG101", Severity.INFO, 100)]


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (Cause.WEIGHT_SCALE, " Cause: the scale of the weights."),
        (Cause.ACTIVATION_DERIVATIVE, " Cause: the activation's derivative."),
        (Cause.UNKNOWN, ""),
        (Cause.WIRING, ""),
    ],
)
def test_causes_in_words(cause: Cause, words: str) -> None:
    """A cause that is not known, or that the message has named already, is not repeated."""
    history = chain(activation="Tanh")
    diagnosis = diagnose(history, [found("GG101", 0, cause=cause)], config=CONFIG)

    assert diagnosis.verdict == f"vanishing-gradient.{words}"


# ------------------------------------------------------------------------------------------------- too little


@pytest.mark.parametrize(
    ("steps", "batches", "verdict"),
    [
        (0, 0, "Nothing was observed: no backward pass and no optimizer step was seen."),
        (
            0,
            200,
            (
                "0 optimizer steps seen after 200 backward passes. Pass the optimizer that updates this model to "
                "gradguard.watch, or call guard.step() after each update."
            ),
        ),
        (
            0,
            1,
            (
                "0 optimizer steps seen after 1 backward pass. Pass the optimizer that updates this model to "
                "gradguard.watch, or call guard.step() after each update."
            ),
        ),
        (
            40,
            40,
            (
                "40 optimizer steps seen, and no gradient at any of them. Call guard.record(loss=loss) after "
                "backward() and before zero_grad()."
            ),
        ),
    ],
)
def test_nothing_observed_is_no_verdict(steps: int, batches: int, verdict: str) -> None:
    """Never "healthy" where nothing was seen: the reason is worded exactly."""
    diagnosis = diagnose(History(), [], steps=steps, batches=batches, config=CONFIG)

    assert diagnosis.healthy is None
    assert diagnosis.primary is None
    assert diagnosis.verdict == verdict
    assert diagnosis.layers == ()


@pytest.mark.parametrize(("steps", "healthy"), [((0,), None), ((0, 1), None), ((0, 1, 2), True)])
def test_too_few_observations_are_no_verdict(steps: Sequence[int], healthy: bool | None) -> None:
    """Three observations are needed to call a run healthy."""
    diagnosis = judged(chain(activation="Tanh", steps=steps), steps=len(steps))

    assert diagnosis.healthy is healthy
    if healthy is None:
        plural = "s" if len(steps) != 1 else ""
        assert diagnosis.verdict == (
            f"{len(steps)} observation{plural} with gradients, over {len(steps)} optimizer steps: at least 3 are "
            "needed to call a run healthy."
        )


def test_few_observations_are_enough_to_call_a_run_sick() -> None:
    """What is there is there."""
    assert judged(decaying(steps=(0,)), steps=1).healthy is False


def blank(history: History, *, layers: bool, parameters: bool) -> History:
    """Return the history without gradients at layers, at parameters, or at both."""

    def edit(record: StepRecord) -> StepRecord:
        delta, gradient = np.full(len(record.layers), NAN), np.full(len(record.parameters), NAN)
        return replace(
            record,
            layer_values={**record.layer_values, **({"delta_norm": delta} if layers else {})},
            parameter_values={
                **record.parameter_values,
                **({"grad_norm": gradient, "grad_max_abs": gradient} if parameters else {}),
            },
        )

    return changed(history, edit)


def test_gradients_read_at_the_wrong_moment_are_no_verdict() -> None:
    """All of them absent at every observation: they had been cleared."""
    diagnosis = judged(blank(chain(activation="Tanh"), layers=True, parameters=True))

    assert diagnosis.healthy is None
    assert diagnosis.verdict == (
        "8 observations, and no parameter had a gradient at any of them. They were read too early or too late: call "
        "guard.record(loss=loss) after backward() and before zero_grad()."
    )


def test_a_model_whose_layers_cannot_be_seen_is_not_called_healthy() -> None:
    """A compiled model is watched through its parameters alone: depth was not seen."""
    diagnosis = judged(blank(chain(activation="Tanh"), layers=True, parameters=False))

    assert diagnosis.healthy is None
    assert diagnosis.verdict.startswith("Gradients of parameters were read, none at the output of a layer")


def test_every_optimizer_must_have_been_observed() -> None:
    """A GAN whose second optimizer stepped once."""
    history = History(RunInfo(optimizers=(OptimizerInfo(name="Adam"), OptimizerInfo(name="Adam"))))
    for record in chain(activation="Tanh").records:
        history.append(record)
    history.append(replace(history.records[0], optimizer=1))

    assert judged(history).healthy is None


def test_what_was_not_observed_is_passed_on() -> None:
    """The report says it; the verdict stands."""
    note = Unobserved(what="layer signals inside decoder", why="it is compiled")

    assert diagnose(History(), [], unobserved=[note]).unobserved == (note,)


# ------------------------------------------------------------------------------------------------- layers, summary


def test_layers_stand_in_execution_order_with_the_gain_to_the_one_before() -> None:
    """Gain: from this row's output to the previous trunk row's; activations are shown and do not count."""
    layers = judged(decaying(0.24, layers=3, weight_gain=1.0)).layers

    assert [layer.name for layer in layers] == ["0", "1", "2", "3", "4"]
    assert [layer.trunk for layer in layers] == [True, False, True, False, True]
    assert [layer.kind for layer in layers][::2] == ["Linear 64>64"] * 3
    assert [round(layer.gain, 3) for layer in layers if layer.trunk][1:] == [0.24, 0.24]
    assert math.isnan(layers[0].gain)
    assert math.isnan(layers[1].gain)
    assert layers[4].delta_norm == pytest.approx(0.1)


def test_a_layer_shows_how_many_units_are_active_behind_it() -> None:
    """The share stands at the activation and at the layer that feeds it; functional code is seen at the next layer."""
    modules = judged(chain(layers=3, activation="ReLU")).layers
    assert [layer.active_fraction for layer in modules][:4] == pytest.approx([0.7] * 4)
    assert math.isnan(modules[4].active_fraction)

    def functional(record: StepRecord) -> StepRecord:
        share = np.array([NAN, 0.25, 0.5])
        return replace(record, layer_values={**record.layer_values, "input_inactive_fraction": share})

    rows = judged(changed(chain(layers=3, activation=""), functional)).layers
    assert [row.active_fraction for row in rows[:2]] == pytest.approx([0.75, 0.5])
    assert math.isnan(rows[2].active_fraction)


def test_culprits_are_marked_in_the_table_by_module_also_where_a_parameter_is_named() -> None:
    """Only standing findings mark; the first one wins."""
    history = chain(layers=3, activation="Tanh")
    findings = [found("GG503", layer="2.weight"), found("GG101", layer="2", resolved=5), found("GG104", layer="4")]
    marks = {layer.name: layer.mark for layer in diagnose(history, findings, config=CONFIG).layers}

    assert marks == {"0": "", "1": "", "2": "GG503", "3": "", "4": "GG104"}


def test_the_run_in_numbers() -> None:
    """Losses, norms, ratio, span, dead units, overhead: medians and percentiles of what was seen."""
    summary = judged(chain(activation="ReLU", adaptive=True, losses=falling(101))).summary

    assert (summary.kind, summary.steps, summary.batches, summary.layer_count) == ("run", 101, 101, 20)
    assert summary.optimizers == ("Adam",)
    assert summary.loss_first == pytest.approx(2.303, rel=0.05)
    assert summary.loss_last == pytest.approx(0.055, rel=0.2)
    assert summary.grad_norm_median == summary.grad_norm_p5 == summary.grad_norm_p95 == 0.5
    assert summary.update_ratio_log10 == pytest.approx(-3.0)
    assert summary.span_decades == pytest.approx(0.0, abs=1e-9)
    assert (summary.dead_fraction, summary.dead_layer) == (0.0, "1")
    assert summary.overhead_fraction == 0.01
    assert summary.clip_known


def test_norms_read_at_the_optimizer_alone_are_said_to_be_so() -> None:
    """Whether the caller clipped before is not known then."""

    def at_step(record: StepRecord) -> StepRecord:
        return replace(record, scalars={**record.scalars, "read_before_clipping": 0.0})

    assert not judged(changed(chain(activation="Tanh"), at_step)).summary.clip_known


def test_a_newest_observation_without_layers_does_not_blank_the_report() -> None:
    """After a NaN only parameters may have been read; the layers are those of the observation before."""
    history = decaying()
    history.append(StepRecord(step=150, parameters=history.parameters))
    diagnosis = judged(history)

    assert len(diagnosis.layers) == 39
    assert diagnosis.summary.layer_count == 20
    assert diagnosis.summary.span_decades == pytest.approx(-11.2, abs=0.1)


def test_the_layers_shown_are_those_of_the_optimizer_that_is_ill() -> None:
    """In a GAN the table is that of the part that the primary finding is about."""
    info = RunInfo(optimizers=(OptimizerInfo(name="Adam", label="g"), OptimizerInfo(name="SGD", label="d")))
    history = History(info)
    for healthy, sick in zip(chain(activation="Tanh").records, decaying(layers=12).records, strict=True):
        history.append(replace(sick, optimizer=1))
        history.append(replace(healthy, optimizer=0))
    diagnosis = judged(history)

    assert diagnosis.primary is not None
    assert diagnosis.primary.optimizer == "d"
    assert len(diagnosis.layers) == 23


def test_a_diagnosis_can_be_written_as_json_whatever_it_holds() -> None:
    """Non-finite numbers become strings; the schema has a version."""
    finding = found("GG202", evidence={"loss": Evidence(value=math.inf)})
    data = json.loads(diagnose(chain(activation="Tanh", losses=flat(5)), [finding], config=CONFIG).to_json())

    assert data["schema_version"] == 1
    assert data["primary"] == "GG202"
    assert data["findings"][0]["evidence"]["loss"]["value"] == "Infinity"
    assert data["layers"][0]["gain"] == "NaN"
