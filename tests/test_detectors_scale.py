"""GG403, GG504, GG601, GG602 and GG703: weights, eps, clipping and updates of the wrong scale."""

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
from gradguard.detectors import run_detectors
from gradguard.detectors.clipping import find_clipping
from gradguard.detectors.epsilon import find_epsilon_limited, find_update_rms_spike
from gradguard.detectors.initialization import find_poor_initialization
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.linking import link_findings
from gradguard.records import StepRecord
from tests.driving import observe
from tests.histories import NAN, chain, changed, falling, flat
from tests.models import ResidualMLP, classification_loss, digit_batch, mlp

CONFIG = GuardConfig()


def only(findings: Sequence[Finding]) -> Finding:
    """Return the one finding."""
    (finding,) = findings
    return finding


def filled(
    history: History,
    scalars: Callable[[int], dict[str, float]] = lambda _: {},
    **columns: float | Callable[[int], float],
) -> History:
    """Return the history with parameter columns filled with one number, or one per step, and scalars replaced."""

    def edit(record: StepRecord) -> StepRecord:
        count = len(record.parameters)
        values = {
            name: np.full(count, value(record.step) if callable(value) else value) for name, value in columns.items()
        }
        return replace(
            record,
            scalars={**record.scalars, **scalars(record.step)},
            parameter_values={**record.parameter_values, **values},
        )

    return changed(history, edit)


def six(**arguments: object) -> History:
    """Return a healthy chain of six layers."""
    return chain(layers=6, activation="Tanh", **arguments)  # type: ignore[arg-type]  # keywords of chain


# --------------------------------------------------------------------------------------------------- initialization


def test_weights_that_shrink_each_layer_are_a_warning_beside_a_span_beyond_the_limit() -> None:
    """ReLU at PyTorch's default: 0.408 per layer over 20 layers."""
    finding = only(find_poor_initialization(chain(gain=0.408, weight_gain=0.58, activation="ReLU"), CONFIG))

    assert (finding.code, finding.severity, finding.cause) == ("GG403", Severity.WARNING, Cause.WEIGHT_SCALE)
    assert finding.message.startswith("The first weights are too small: each of 20 layers passes the gradient on")
    assert finding.evidence["critical_deviation"].value == pytest.approx(math.sqrt(2.0), rel=1e-3)


@pytest.mark.parametrize(("first", "severity"), [(30.0, Severity.WARNING), (3.0, Severity.INFO)])
def test_weights_that_are_too_large_and_a_first_loss_far_above_chance_are_a_warning(
    first: float, severity: Severity
) -> None:
    """Ten classes begin at 2.3; at 30 the true one has been given next to nothing."""
    history = chain(gain=2.2, weight_gain=3.1, activation="ReLU", layers=7, losses=[first, *flat(100)], steps=(0, 1, 2))
    finding = only(find_poor_initialization(history, CONFIG))

    assert finding.severity is severity
    assert ("and the first loss is 13 times that of chance" in finding.message) is (severity is Severity.WARNING)


@pytest.mark.parametrize(("gain", "severity"), [(2.5, Severity.WARNING), (1.0, None)])
def test_weights_that_swell_the_signal_are_a_warning_where_no_loss_of_chance_is_known(
    gain: float, severity: Severity | None
) -> None:
    """Regression: eight layers of 2.5 times He's weights give predictions in the hundreds."""
    torch.manual_seed(0)
    model = mlp(8, nn.ReLU, init="he")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(gain)
    x, y = digit_batch(64)

    diagnosis = gradguard.check(
        model, (x, y.float()), lambda net, batch: (net(batch[0])[:, 0] - batch[1]).square().mean()
    )
    found = [finding.severity for finding in diagnosis.findings if finding.code == "GG403"]

    assert found == ([] if severity is None else [severity])


@pytest.mark.parametrize(("scale", "found"), [(8.0, True), (1.0, False)])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.Softsign])
def test_weights_that_drive_tanh_to_its_ends_are_found_before_the_first_step(
    scale: float, found: bool, activation: Callable[[], nn.Module]
) -> None:
    """Standard deviation 1 at width 64 is eight times too much; the span over depth looks harmless."""
    torch.manual_seed(0)
    model = mlp(5, activation, init="xavier")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(scale)

    diagnosis = gradguard.check(model, digit_batch(64), classification_loss)
    findings = [finding for finding in diagnosis.findings if finding.code == "GG403"]

    assert bool(findings) is found
    if found:
        assert findings[0].severity is Severity.WARNING
        assert findings[0].evidence["activation_gain"].value < 0.45
        assert "near their flat ends" in findings[0].message


class Sides(nn.Module):
    """A layer that is far too large and gives to ReLU, run just before a tanh whose own weights are none of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.side, self.squash, self.last = nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
        self.weight = nn.Parameter(0.5 * torch.randn(64, 32))
        nn.init.normal_(self.side.weight, std=1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        side = 0.05 * torch.relu(self.side(x))
        logits: torch.Tensor = self.last(self.squash(x @ self.weight) + side)
        return logits


def test_a_layer_that_gives_to_others_does_not_drive_tanh_to_its_ends() -> None:
    """Only what an activation takes is to blame, not what ran last."""
    torch.manual_seed(0)
    diagnosis = gradguard.check(Sides(), digit_batch(64), classification_loss)

    assert "near its flat ends" not in "".join(finding.message for finding in diagnosis.findings)


@pytest.mark.parametrize(("hidden", "head", "found"), [(8.0, 1.0, True), (4.0, 1.0, False), (1.0, 30.0, False)])
def test_one_activation_at_its_ends_is_enough_and_the_head_is_no_reason(
    hidden: float, head: float, found: bool
) -> None:
    """A net with one hidden layer; the head of a trained one is large in good health, wherever its units lie."""
    torch.manual_seed(0)
    model = mlp(2, nn.Tanh, init="xavier")
    first, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        first.weight.mul_(hidden)
        last.weight.mul_(head)
    x, y = digit_batch(64)

    diagnosis = gradguard.check(model, (x if found else 4.0 * x, y), classification_loss)
    messages = [finding.message for finding in diagnosis.findings if finding.code == "GG403"]

    assert any("1 activation near its flat ends" in message for message in messages) is found


@pytest.mark.parametrize(("weights", "inputs"), [(8.0, 1e-3), (1.0, 50.0)], ids=["small signal", "far inputs"])
def test_neither_large_weights_nor_flat_ends_alone_are_the_fault_of_the_weights(weights: float, inputs: float) -> None:
    """A small signal stays where tanh is steep; inputs that are far off are the data's fault."""
    torch.manual_seed(0)
    model = mlp(3, nn.Tanh, init="xavier")
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.mul_(weights)
    x, y = digit_batch(64)

    diagnosis = gradguard.check(model, (x * inputs, y), classification_loss)

    assert "near their flat ends" not in "".join(finding.message for finding in diagnosis.findings)


def test_few_layers_of_the_wrong_scale_are_a_remark() -> None:
    """The same over eight layers: 2.7 decades."""
    finding = only(find_poor_initialization(chain(gain=0.408, weight_gain=0.58, activation="ReLU", layers=8), CONFIG))

    assert finding.severity is Severity.INFO


@pytest.mark.parametrize(
    "build",
    [
        lambda: chain(gain=1.0, activation="ReLU"),
        lambda: chain(gain=0.9, weight_gain=0.9, activation="Tanh"),
        lambda: chain(gain=0.236, activation="Sigmoid"),
        lambda: chain(gain=0.408, weight_gain=0.58, activation="ReLU", layers=4),
        lambda: chain(gain=0.408, weight_gain=0.58, activation="ReLU", steps=(50, 100)),
        lambda: chain(gain=lambda s: 0.408 if s < 50 else 1.0, weight_gain=0.58, activation="ReLU"),
        lambda: chain(gain=0.5, weight_gain=0.5, norm="LayerNorm", activation="ReLU"),
    ],
    ids=["critical", "nearly", "the activation's fault", "four layers", "resumed", "put right", "normalized"],
)
def test_what_is_no_poor_initialization(build: Callable[[], History]) -> None:
    """Critical weights, activations that no scale helps, short nets, normalization."""
    assert find_poor_initialization(build(), CONFIG) == []


# ---------------------------------------------------------------------------------------------------------------- eps


def test_eps_that_sets_the_updates_is_a_warning_where_the_loss_does_not_fall() -> None:
    """Gradients of 1e-11."""
    finding = only(find_epsilon_limited(filled(six(), epsilon_fraction=1.0, second_moment_rms=1e-11), CONFIG))

    assert (finding.code, finding.severity) == ("GG504", Severity.WARNING)
    assert "sets the updates, not the gradient (about 1e-11)" in finding.message


def test_eps_explains_steps_that_are_too_small_though_it_is_seen_an_observation_later() -> None:
    """There is no second moment before the first step, so what is so when first seen was so from the start."""
    history = filled(
        six(), epsilon_fraction=lambda step: 1.0 if step else NAN, second_moment_rms=1e-11, update_ratio=1e-9
    )
    linked = link_findings(run_detectors(history, CONFIG))

    assert [(f.code, f.step, f.consequence_of) for f in linked if f.code in {"GG502", "GG504"}] == [
        ("GG504", 0, None),
        ("GG502", 0, "GG504"),
    ]


@pytest.mark.parametrize(
    "history",
    [
        filled(six(steps=(0, 1, 2, 5)), epsilon_fraction=1.0),
        filled(six(), epsilon_fraction=0.3),
        filled(six(), epsilon_fraction=lambda step: 1.0 if step < 50 else 0.0),
        filled(six(losses=flat(101, 0.01, 0.003)), epsilon_fraction=1.0),
        filled(six(), epsilon_fraction=NAN),
        filled(six(losses=[]), epsilon_fraction=1.0),
    ],
    ids=["first steps", "few", "recovered", "converged", "SGD", "no losses"],
)
def test_small_second_moments_that_are_no_illness(history: History) -> None:
    """At the first steps, and once a run has converged, they are small in healthy nets as well."""
    assert find_epsilon_limited(history, CONFIG) == []


def test_a_large_eps_in_a_run_that_learns_is_a_remark() -> None:
    """It may be meant."""
    history = filled(six(losses=falling(101, end=1.3)), epsilon_fraction=1.0, second_moment_rms=1e-11)

    assert only(find_epsilon_limited(history, CONFIG)).severity is Severity.INFO


def spiky(value: float, *, observations: int = 30, factor: float = 1.0) -> History:
    """Return updates of about 1 in the optimizer's own unit, the last one ``value``."""
    history = six(steps=range(observations), losses=falling(observations))
    size = 1.0 / factor
    return filled(
        history,
        lambda _: {"grad_norm": 1.0, "grad_norm_at_step": factor},
        update_rms=lambda step: size * (value if step == observations - 1 else 1.0 + 0.05 * math.sin(step)),
    )


def test_an_update_far_larger_than_intended_is_told() -> None:
    """Five times, against a calm past: INFO, as the loss falls."""
    finding = only(find_update_rms_spike(spiky(5.0), CONFIG))

    assert (finding.code, finding.severity, finding.step) == ("GG703", Severity.INFO, 29)


@pytest.mark.parametrize(
    "history",
    [spiky(2.0), spiky(5.0, observations=20), spiky(1.0, factor=0.01), filled(six(), update_rms=NAN)],
    ids=["below 2.3", "too few", "clipped at every step", "SGD"],
)
def test_updates_as_intended(history: History) -> None:
    """A gradient read before clipping is compared as clipped."""
    assert find_update_rms_spike(history, CONFIG) == []


# ----------------------------------------------------------------------------------------------------------- clipping


def clipped(
    keeps: Callable[[int], float], *, observations: int = 30, adaptive: bool = False, **more: object
) -> History:
    """Return a run whose steps keep a share of their norm."""
    history = six(steps=range(0, 10 * observations, 10), adaptive=adaptive, **more)
    return filled(history, lambda step: {"grad_norm": 2.0, "grad_norm_at_step": 2.0 * keeps(step)})


def test_clipping_of_most_steps_is_a_remark() -> None:
    """Two steps in three."""
    finding = only(find_clipping(clipped(lambda step: 1.0 if step % 30 == 0 else 0.5), CONFIG))

    assert (finding.code, finding.severity) == ("GG602", Severity.INFO)
    assert finding.message == (
        "Clipping cuts 67 % of the steps, to 0.5 of their norm (median); the learning rate no longer sets the size of "
        "the steps."
    )


@pytest.mark.parametrize(("adaptive", "severity"), [(False, Severity.WARNING), (True, Severity.INFO)])
def test_clipping_to_next_to_nothing_is_a_warning_unless_the_optimizer_is_adaptive(
    adaptive: bool, severity: Severity
) -> None:
    """To a thousandth, and the loss does not fall."""
    assert only(find_clipping(clipped(lambda _: 1e-3, adaptive=adaptive), CONFIG)).severity is severity


@pytest.mark.parametrize(
    "history",
    [
        clipped(lambda _: 1.0),
        clipped(lambda step: 0.5 if step % 50 == 0 else 1.0),
        clipped(lambda _: 0.5, observations=10),
        six(),
    ],
    ids=["none or never", "a guard against spikes", "too few", "no norms at the step"],
)
def test_clipping_that_does_its_work(history: History) -> None:
    """Equal norms alone do not tell a threshold never reached from no clipping."""
    assert find_clipping(history, CONFIG) == []


@pytest.mark.parametrize(("threshold", "fires"), [(1e3, True), (1.9, False), (NAN, False)])
def test_a_known_threshold_that_is_never_reached_is_a_remark(threshold: float, fires: bool) -> None:
    """200 steps without a cut."""
    history = clipped(lambda _: 1.0)
    history.info = replace(history.info, clip_norm=threshold)
    found = find_clipping(history, CONFIG)

    assert [(f.code, f.severity) for f in found] == ([("GG601", Severity.INFO)] if fires else [])


# ---------------------------------------------------------------------------------------------- real runs, real numbers


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, *, factor: float = 1.0, clip: float = math.inf
) -> gradguard.Diagnosis:
    """Train on digits under a guard, and return the verdict."""
    with gradguard.watch(model, optimizer, on_finding="silent", on_error="raise") as guard:
        for step in range(steps):
            optimizer.zero_grad()
            loss = factor * classification_loss(model, digit_batch(64, seed=step))
            loss.backward()
            guard.record(loss=loss)
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return guard.diagnose()


def codes(diagnosis: gradguard.Diagnosis) -> set[str]:
    """Return the codes that stand at WARNING or above."""
    return {f.code for f in diagnosis.findings if f.standing and f.severity >= Severity.WARNING}


@pytest.mark.parametrize(("factor", "expected"), [(1.0, set()), (1e-12, {"GG504"})])
def test_a_loss_too_small_for_eps_in_a_real_run(factor: float, expected: set[str]) -> None:
    """Adam at the usual rate, the loss scaled down to 1e-12: gradients of 1e-13 against an eps of 1e-8."""
    torch.manual_seed(0)
    model = mlp(4, init="he")

    assert codes(train(model, torch.optim.Adam(model.parameters(), lr=1e-3), 110, factor=factor)) >= expected
    if not expected:
        assert codes(train(model, torch.optim.Adam(model.parameters(), lr=1e-3), 30)) == set()


@pytest.mark.parametrize(("clip", "expected"), [(1.0, set()), (1e-3, {"GG602"})])
def test_clipping_in_a_real_run(clip: float, expected: set[str]) -> None:
    """A threshold near the usual norm, and one a thousand times too low."""
    torch.manual_seed(0)
    model = mlp(4, init="he")

    found = [
        f for f in train(model, torch.optim.SGD(model.parameters(), lr=0.05), 110, clip=clip).findings if f.standing
    ]

    assert {f.code for f in found if f.severity > Severity.INFO and f.consequence_of is None} == expected


def test_a_zero_initialized_branch_is_no_fault_of_eps_or_weights() -> None:
    """ReZero: gradients of the branches are exactly zero at first."""
    torch.manual_seed(0)
    model = ResidualMLP(8, rezero=True)
    diagnosis = train(model, torch.optim.Adam(model.parameters(), lr=1e-3), 60)

    assert not {"GG403", "GG504", "GG703"} & {f.code for f in diagnosis.findings}


def test_default_initialization_of_a_deep_net_is_evidence_beside_the_vanishing_gradient() -> None:
    """GG403 follows GG101; nothing is announced twice."""
    torch.manual_seed(0)
    model = mlp(20)
    diagnosis = train(model, torch.optim.SGD(model.parameters(), lr=0.01), 6)
    weights = next(f for f in diagnosis.findings if f.code == "GG403")

    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG101"
    assert weights.consequence_of == "GG101"
    assert weights.evidence["weight_deviation"].value == pytest.approx(math.sqrt(1 / 3), rel=0.05)


def test_second_moment_statistics_agree_with_plain_torch() -> None:
    """Root of the mean of the corrected v, share that eps limits, and RMS of g / max(sqrt v, eps), before the step."""
    torch.manual_seed(0)
    model = mlp(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, eps=1e-4)
    for seed in range(3):
        optimizer.zero_grad()
        classification_loss(model, digit_batch(16, seed=seed)).backward()
        optimizer.step()
    optimizer.zero_grad()
    batch = digit_batch(16, seed=9)
    classification_loss(model, batch).backward()
    weight = next(model.parameters())
    assert weight.grad is not None
    corrected = optimizer.state[weight]["exp_avg_sq"] / (1 - 0.999**3)
    root = corrected.sqrt()
    live = root > 0
    expected = (weight.grad[live] / root[live].clamp_min(1e-4)).square().mean().sqrt()

    optimizer.zero_grad()
    with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:
        loss = classification_loss(model, batch)
        loss.backward()
        guard.record(loss=loss)
        optimizer.step()
        columns = {
            name: float(guard.history.parameter(name)[0, 0])
            for name in ("second_moment_rms", "epsilon_fraction", "update_rms")
        }

    assert columns["second_moment_rms"] == pytest.approx(float(corrected.mean().sqrt()), rel=1e-4)
    assert columns["epsilon_fraction"] == pytest.approx(float((root[live] < 1e-3).float().mean()), rel=1e-4)
    assert columns["update_rms"] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adam])
def test_second_moments_are_unknown_without_a_step_or_without_any(
    make: Callable[..., torch.optim.Optimizer],
) -> None:
    """SGD keeps none; Adam has none before its first step."""
    model = mlp(2)
    seen = observe(
        model, lambda: classification_loss(model, digit_batch(8)).backward(), optimizer=make(model.parameters(), lr=0.1)
    )

    assert math.isnan(seen.parameter("0.weight")["update_rms"])
