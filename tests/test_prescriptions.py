"""Prescriptions: every rule has cures for every cause, each with a reason, lines that run, and a source."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn

from gradguard.config import GuardConfig
from gradguard.detectors import run_detectors
from gradguard.diagnosis import diagnose
from gradguard.findings import Cause, Evidence, Finding, Severity
from gradguard.prescriptions import prescribe, prescriptions_for
from gradguard.rules import RULES
from tests.histories import chain, decaying

JUDGED = sorted(RULES)


def found(code: str, cause: Cause = Cause.UNKNOWN, **evidence: float | str) -> Finding:
    """Return a made-up standing finding."""
    rule = RULES[code]
    return Finding(
        code=code,
        name=rule.name,
        family=rule.family,
        severity=Severity.ERROR,
        message=".",
        step=0,
        last_step=10,
        layer="0",
        layers=("0.weight", "0.bias"),
        cause=cause,
        evidence={name: Evidence(value=value) for name, value in evidence.items()},
    )


def remedies(finding: Finding) -> list[str]:
    """Return the names of the remedies, best first."""
    return [prescription.remedy for prescription in prescriptions_for(finding)]


class Net(nn.Sequential):
    """Two layers, an activation of each kind that a remedy may replace."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))


def namespace() -> dict[str, object]:
    """Return the names of a usual training loop, in working order."""
    model, batch, target = Net(), torch.randn(8, 4), torch.randint(0, 3, (8,))
    optimizer = torch.optim.SGD(list(model.parameters())[2:], lr=0.1)
    output = model(batch)
    return {
        "torch": torch,
        "model": model,
        "optimizer": optimizer,
        "batch": batch,
        "target": target,
        "output": output,
        "logits": output,
        "x": batch.abs(),
        "soft": torch.rand(8, requires_grad=True),
        "checkpoint": {"model": model.state_dict(), "optimizer": optimizer.state_dict()},
        "compute_loss": lambda m, b: m(b).square().mean(),
    }


@pytest.mark.parametrize("code", JUDGED)
@pytest.mark.parametrize("cause", list(Cause), ids=lambda cause: cause.name)
def test_every_rule_has_cures_whatever_the_cause_and_their_lines_run(code: str, cause: Cause) -> None:
    """Reason, source, and Python that runs as it stands in a usual training loop. Nothing was tried yet."""
    for prescription in prescriptions_for(found(code, cause, update_ratio=2.0, activation="Sigmoid")):
        assert prescription.reason.endswith(".")
        assert prescription.reference
        assert prescription.effect is None
        assert "{" not in prescription.reason
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # anomaly mode warns that it is slow
            exec(prescription.code, namespace())  # noqa: S102  # the lines are ours, and meant to be run
    assert remedies(found(code, cause))


def test_sigmoid_derivatives_call_for_normalization_or_another_activation() -> None:
    """No initialization makes a sigmoid critical: it is not advised."""
    names = remedies(found("GG101", Cause.ACTIVATION_DERIVATIVE, activation="Sigmoid"))

    assert names == ["batch-norm", "relu", "layer-norm", "residual"]


@pytest.mark.parametrize(("activation", "first"), [("ReLU", "he-initialization"), ("Tanh", "xavier-initialization")])
def test_weights_of_the_wrong_scale_call_for_the_initialization_of_their_activation(
    activation: str, first: str
) -> None:
    """He for ReLU, Xavier for tanh."""
    assert remedies(found("GG101", Cause.WEIGHT_SCALE, activation=activation))[0] == first
    assert remedies(found("GG102", Cause.WEIGHT_SCALE, activation=activation))[0] == first


@pytest.mark.parametrize(
    ("code", "cause", "first"),
    [
        ("GG102", Cause.NORMALIZATION, "residual"),
        ("GG201", Cause.DATA, "input-check"),
        ("GG202", Cause.OPERATION, "safe-op"),
        ("GG202", Cause.LOSS, "logits-loss"),
        ("GG202", Cause.PRECISION, "bfloat16"),
        ("GG203", Cause.OPERATION, "safe-op"),
        ("GG204", Cause.CORRUPT_WEIGHTS, "restore-checkpoint"),
        ("GG204", Cause.LEARNING_RATE, "lower-learning-rate"),
        ("GG301", Cause.LEARNING_RATE, "lower-learning-rate"),
        ("GG301", Cause.DATA, "standardize-input"),
        ("GG302", Cause.DATA, "standardize-input"),
        ("GG501", Cause.LEARNING_RATE, "lower-learning-rate"),
        ("GG502", Cause.LEARNING_RATE, "higher-learning-rate"),
        ("GG503", Cause.WIRING, "add-to-optimizer"),
        ("GG503", Cause.LEARNING_RATE, "set-learning-rate"),
    ],
)
def test_the_first_cure_goes_for_the_cause(code: str, cause: Cause, first: str) -> None:
    """Treat what is wrong, not what it looks like."""
    assert remedies(found(code, cause))[0] == first


def test_missing_gradients_are_cured_by_where_they_are_lost() -> None:
    """Detached: find the cut. Unused: freeze it on purpose. No slope: another operation."""
    assert remedies(found("GG104", Cause.WIRING, kind="detached")) == ["remove-detach", "freeze-module"]
    assert remedies(found("GG104", Cause.WIRING, kind="unused")) == ["freeze"]
    assert "differentiable-op" in remedies(found("GG104", Cause.WIRING))


@pytest.mark.parametrize(
    ("code", "ratio", "factor"),
    [("GG501", 0.5, 0.002), ("GG501", 1e9, 1e-4), ("GG502", 1e-9, 1e4), ("GG502", 1e-7, 1e4), ("GG502", 4e-7, 2500.0)],
)
def test_learning_rates_are_changed_towards_the_usual_ratio_within_bounds(
    code: str, ratio: float, factor: float
) -> None:
    """A ratio of 1e-3, by at most a factor of 1e4 at once."""
    first = prescriptions_for(found(code, Cause.LEARNING_RATE, update_ratio=ratio))[0]

    assert first.arguments["factor"] == pytest.approx(factor)
    assert f'group["lr"] *= {factor:.2g}' in first.code


def test_a_cure_changes_what_it_says() -> None:
    """Pasted into a loop, the lines freeze, replace, initialize and register what they promise."""
    names = namespace()
    model, optimizer = names["model"], names["optimizer"]
    assert isinstance(model, nn.Sequential)
    assert isinstance(optimizer, torch.optim.Optimizer)
    first = model[0]
    assert isinstance(first, nn.Linear)
    before = first.weight.clone()
    lines = {
        p.remedy: p.code for p in prescriptions_for(found("GG101", Cause.ACTIVATION_DERIVATIVE, activation="Sigmoid"))
    }
    exec(lines["relu"], names)  # noqa: S102  # the lines are ours, and meant to be run
    exec(prescriptions_for(found("GG503", Cause.WIRING))[0].code, names)  # noqa: S102  # as above
    exec(prescriptions_for(found("GG104", Cause.WIRING, kind="unused"))[0].code, names)  # noqa: S102  # as above

    assert isinstance(model[1], nn.ReLU)
    assert not torch.equal(first.weight, before)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    assert not first.weight.requires_grad


def test_what_follows_from_another_finding_or_has_cleared_gets_no_cure() -> None:
    """It goes away with its cause."""
    finding = found("GG301", Cause.LEARNING_RATE)

    assert prescriptions_for(finding)
    assert prescriptions_for(replace(finding, consequence_of="GG501")) == ()
    assert prescriptions_for(replace(finding, resolved_step=12)) == ()


def test_a_diagnosis_is_prescribed_for_as_a_whole() -> None:
    """A sick run gets cures, a healthy one none, and nothing else of the diagnosis changes."""
    config = GuardConfig()
    sick, healthy = decaying(), chain(activation="Tanh")
    before = diagnose(sick, run_detectors(sick, config), config=config)
    after = prescribe(before)

    assert after.primary is not None
    assert after.primary.prescriptions[0].remedy == "batch-norm"
    assert replace(after, findings=before.findings) == before
    assert prescribe(diagnose(healthy, run_detectors(healthy, config), config=config)).findings == ()
