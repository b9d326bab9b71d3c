"""Prescriptions: which cures are tried first, against which cause, in which kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors import run_detectors
from gradguard.diagnosis import diagnose
from gradguard.findings import Cause, Evidence, Finding, LayerProfile, Severity
from gradguard.prescriptions import prescribe, prescriptions_for
from gradguard.rules import RULES
from tests.histories import chain, decaying


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


def test_sigmoid_derivatives_call_for_normalization_or_another_activation() -> None:
    """No initialization makes a sigmoid critical: it is not advised."""
    names = remedies(found("GG101", Cause.ACTIVATION_DERIVATIVE, activation="Sigmoid"))

    assert names == ["batch-norm", "relu", "layer-norm", "residual-batch-norm"]


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


def layer(name: str, kind: str, role: str = "affine") -> LayerProfile:
    """Return a made-up row of the model."""
    return LayerProfile(name=name, kind=kind, role=role, delta_norm=1.0, gain=1.0, forward_rms=1.0, active_fraction=1.0)


@pytest.mark.parametrize(
    ("activation", "kind", "names"),
    [
        ("ReLU", "Linear 4>4", ["he-initialization", "lsuv", "layer-norm"]),
        ("ReLU", "Conv2d 4>4 3x3", ["he-initialization", "lsuv", "group-norm"]),
        ("SELU", "Linear 4>4", ["lecun-initialization", "lsuv", "layer-norm"]),
        ("Tanh", "Linear 4>4", ["xavier-initialization", "orthogonal-initialization", "layer-norm"]),
        ("Tanh", "Conv1d 4>4 3", ["xavier-initialization", "delta-orthogonal-initialization", "group-norm"]),
        ("Sigmoid", "Linear 4>4", ["he-initialization", "batch-norm", "layer-norm"]),
    ],
)
def test_cures_suit_activation_and_layers(activation: str, kind: str, names: list[str]) -> None:
    """Each activation has its initialization, convolutions have theirs, and a sigmoid is scaled by none."""
    cures = prescriptions_for(found("GG101", Cause.WEIGHT_SCALE, activation=activation), [layer("0", kind)])

    assert [cure.remedy for cure in cures][:3] == names


@pytest.mark.parametrize(("code", "lsuv"), [("GG403", True), ("GG302", True), ("GG101", False), ("GG102", False)])
def test_tanh_at_its_ends_is_scaled_and_over_depth_made_orthogonal(code: str, lsuv: bool) -> None:
    """Both say what an activation passes."""
    names = remedies(found(code, Cause.WEIGHT_SCALE, activation="Tanh", activation_gain=0.3))

    assert ("lsuv" in names) is lsuv
    assert ("orthogonal-initialization" in names) is not lsuv


def test_normalization_stays_of_the_kind_that_the_model_has() -> None:
    """A model with RMSNorm gets more of it."""
    rows = [layer("0", "Linear 4>4"), layer("1", "RMSNorm 4", "norm")]
    names = [cure.remedy for cure in prescriptions_for(found("GG101", Cause.WEIGHT_SCALE), rows)]

    assert "rms-norm" in names
    assert "layer-norm" not in names


@pytest.mark.parametrize(
    ("others", "last"),
    [
        ([], ["skip-init", "fixup"]),
        ([layer("n", "BatchNorm2d 4", "norm")], ["skip-init"]),
        ([layer("a", "MultiheadAttention 4", "attention"), layer("n", "LayerNorm 4", "norm")], ["rezero"]),
    ],
    ids=["plain", "normalized", "transformer"],
)
def test_residual_blocks_get_branches_that_start_small_and_no_second_path(
    others: list[LayerProfile], last: list[str]
) -> None:
    """Where the span is one of blocks there are paths already; Fixup is for models without normalization."""
    finding = found("GG102", Cause.NORMALIZATION, blocks=12)
    names = [cure.remedy for cure in prescriptions_for(finding, [layer("0", "Linear 4>4"), *others])]

    assert names[: len(last)] == last
    assert "residual" not in names
    assert remedies(found("GG102", Cause.NORMALIZATION))[0] == "residual"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("RNN 4>8", ["orthogonal-recurrent", "gated-cell", "lstm"]),
        ("GRU 4>8", ["chrono-initialization", "forget-gate-bias", "orthogonal-recurrent"]),
    ],
)
def test_recurrent_matrices_are_cured_by_what_the_cell_has(kind: str, names: list[str]) -> None:
    """The finding names the parameter; the row of its module says what cell it is."""
    finding = replace(found("GG401"), layer="encoder.rnn.weight_hh_l0", layers=("encoder.rnn.weight_hh_l0",))
    rows = [layer("encoder", "Linear 4>4"), layer("encoder.rnn", kind, "recurrent")]

    assert [cure.remedy for cure in prescriptions_for(finding, rows)] == names


def test_queries_and_keys_are_normalized_only_where_there_are_some() -> None:
    """A growing weight of a convolution needs no QK-norm."""
    attention = layer("a", "MultiheadAttention 4", "attention")

    assert "qk-norm" in [cure.remedy for cure in prescriptions_for(found("GG402"), [attention])]
    assert "qk-norm" not in [cure.remedy for cure in prescriptions_for(found("GG402"), [layer("0", "Conv2d 4>4")])]


@pytest.mark.parametrize(
    ("code", "evidence", "norm"),
    [
        ("GG601", {"threshold": 100.0, "largest_norm": 3.0}, 6.0),
        ("GG602", {"usual_norm": 12.3456}, 24.7),
        ("GG602", {}, 1.0),
    ],
)
def test_clipping_thresholds_follow_the_norms_that_were_seen(
    code: str, evidence: dict[str, float], norm: float
) -> None:
    """Twice the usual norm, or twice the largest where the threshold was never reached; 1 where nothing is known."""
    assert f"max_norm={norm:.3g})" in prescriptions_for(found(code, Cause.LEARNING_RATE, **evidence))[0].code


@pytest.mark.parametrize(("note", "norm"), [("gradient norm", 4.0), ("loss", 1.0)])
def test_spikes_are_clipped_at_the_usual_norm(note: str, norm: float) -> None:
    """The usual gradient norm sets the threshold; a usual loss says nothing about it."""
    finding = found("GG103", usual=4.0)
    finding = replace(finding, evidence={**finding.evidence, "value": Evidence(value=100.0, note=note)})
    clip = prescriptions_for(finding)[0]

    assert clip.arguments == {"max_norm": norm}
    assert f"max_norm={norm:.3g})" in clip.code


def test_a_unit_that_dies_at_the_output_is_told_from_one_that_dies_inside() -> None:
    """Only where the dead activation is the last of all layers is it taken away."""
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))

    def cures(model: nn.Sequential, layer: int) -> list[str]:
        with torch.no_grad():
            model[layer].bias.fill_(-50.0)
        diagnosis = gradguard.check(model, x, lambda model, x: (model(x) + 1.0).square().mean())
        (finding,) = [item for item in diagnosis.findings if item.code == "GG301"]
        return [cure.remedy for cure in finding.prescriptions]

    torch.manual_seed(0)
    at_the_end = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
    inside = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))

    assert "linear-output" in cures(at_the_end, 2)
    assert "linear-output" not in cures(inside, 0)


@pytest.mark.parametrize(("step", "first"), [(0, "he-initialization"), (120, "lower-learning-rate")])
def test_what_training_made_is_treated_by_the_learning_rate_first(step: int, first: str) -> None:
    """First weights that were well at step 0 are not to blame at step 120."""
    names = remedies(replace(found("GG301"), step=step, last_step=200))

    assert names[0] == first
    assert "he-initialization" in names
    assert remedies(replace(found("GG301", Cause.DATA), step=step, last_step=200))[0] == "standardize-input"
