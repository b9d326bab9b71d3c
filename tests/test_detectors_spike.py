"""GG103 and GG505: spikes and divergence, on made-up series and on real training runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradguard
from gradguard.config import GuardConfig
from gradguard.detectors import run_detectors
from gradguard.detectors._spikes import last_spike, leap
from gradguard.detectors.divergence import find_divergence
from gradguard.detectors.spike import find_spike
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.monitors.losses import LossMonitor
from gradguard.prescriptions import prescriptions_for
from gradguard.records import FloatArray, OptimizerInfo, RunInfo, StepRecord
from tests.histories import chain, changed, falling, run_of
from tests.models import classification_loss, digit_batch, mlp

CONFIG = GuardConfig()


def losses_of(values: Sequence[float], *, classes: int = 0) -> History:
    """Return a history of losses alone."""
    return run_of((), values, classes=classes)


def only(findings: Sequence[Finding]) -> Finding:
    """Return the one finding."""
    (finding,) = findings
    return finding


def noisy(steps: int, sigma: float, *, seed: int = 0, start: float = 2.3, end: float = 0.2) -> FloatArray:
    """Return a falling loss under log-normal noise."""
    noise = np.exp(sigma * np.random.default_rng(seed).standard_normal(steps))
    return np.asarray(np.geomspace(start, end, steps) * noise, dtype=np.float64)


def with_norms(norms: Sequence[float], *, at_step: float = 1.0, grown: int = 0) -> History:
    """Return a history of gradient norms, observed every step; parameter ``grown`` carries what is unusual."""
    history = chain(layers=6, activation="Tanh", steps=range(len(norms)), losses=falling(len(norms)))

    def edit(record: StepRecord) -> StepRecord:
        norm = norms[record.step]
        column = np.full(len(record.parameters), 0.1)
        column[grown] = norm
        scalars = {**record.scalars, "grad_norm": norm, "grad_norm_at_step": norm * at_step}
        return replace(record, scalars=scalars, parameter_values={**record.parameter_values, "grad_norm": column})

    return changed(history, edit, falling(len(norms)))


# --------------------------------------------------------------------------------------------------------- the loss


def test_a_loss_that_jumps_and_stays_away_is_a_warning_that_names_the_step() -> None:
    """Step 60 of 100: 40 against a usual 0.5, and 3 ever since."""
    values = [*noisy(60, 0.1), 40.0, *[3.0] * 39]
    finding = only(find_spike(losses_of(values), CONFIG))

    assert (finding.code, finding.severity, finding.step, finding.standing) == ("GG103", Severity.WARNING, 60, True)
    assert finding.message.startswith("The loss spiked at step 60: 40, ")
    assert finding.message.endswith("It has not come back in 39 steps.")
    assert finding.evidence["batch"].value == 60


def test_a_spike_that_is_over_is_info_and_says_when() -> None:
    """One batch, and back at once: resolved."""
    values = [*noisy(60, 0.1), 40.0, *noisy(40, 0.1, start=0.3)]
    finding = only(find_spike(losses_of(values), CONFIG))

    assert (finding.severity, finding.step, finding.resolved_step) == (Severity.INFO, 60, 61)
    assert finding.message.endswith("It was back at its level at step 61.")
    assert finding.cause is Cause.DATA


def test_a_first_spike_does_not_hide_the_next() -> None:
    """Median and median absolute deviation are not moved by outliers (masking)."""
    values = noisy(120, 0.1)
    values[[60, 80, 100]] = 50.0
    finding = only(find_spike(losses_of([*values]), CONFIG))

    assert finding.step == 100
    assert finding.evidence["spikes"].value == 3


@pytest.mark.parametrize(("before", "fires"), [(24, False), (25, True)])
def test_no_spike_before_25_values(before: int, fires: bool) -> None:
    """The rule's minimum: 25 values before the spike."""
    values = np.array([*noisy(before, 0.05, end=2.0), 100.0])

    assert (last_spike(values, CONFIG) is not None) == fires


@pytest.mark.parametrize(("sigma", "allowed"), [(0.1, 0), (0.2, 0), (0.4, 2), (1.0, 2)])
def test_log_normal_noise_has_next_to_no_spikes(sigma: float, allowed: int) -> None:
    """At most 0.2 in 1000 steps around a falling baseline, and none a warning; sigma 1 is a batch of one example."""
    runs = [noisy(1000, sigma, seed=seed) for seed in range(10)]
    spikes = [spike for run in runs if (spike := last_spike(run, CONFIG)) is not None]
    findings = [finding for run in runs for finding in find_spike(losses_of([*run]), CONFIG)]

    assert sum(spike.count for spike in spikes) <= allowed
    assert all(finding.severity is Severity.INFO for finding in findings)


def heavy_tailed(rng: np.random.Generator) -> FloatArray:
    """Return Pareto noise of tail index 2."""
    return np.asarray(0.3 * (1.0 + rng.pareto(2.0, 1000)), dtype=np.float64)


def mislabelled(rng: np.random.Generator) -> FloatArray:
    """Return the losses of a fitted model with one wrong label in twelve."""
    return np.asarray(np.where(rng.random(1000) < 0.08, 6.0, 0.02) * rng.uniform(0.5, 1.5, 1000), dtype=np.float64)


def converged(rng: np.random.Generator) -> FloatArray:
    """Return a loss that has converged, with a hard example now and then."""
    values = np.geomspace(2.3, 1e-5, 1000) * np.exp(rng.standard_normal(1000))
    values[rng.integers(500, 1000, 5)] = 0.3
    return np.asarray(values, dtype=np.float64)


@pytest.mark.parametrize("make", [heavy_tailed, mislabelled, converged], ids=lambda make: str(make.__name__))
@pytest.mark.parametrize("seed", range(5))
def test_tails_that_belong_to_the_run_are_no_warning(
    make: Callable[[np.random.Generator], FloatArray], seed: int
) -> None:
    """Pareto noise, one mislabelled example in twelve, a converged run with a hard example now and then."""
    values = np.concatenate([[2.3, 2.3, 2.3], make(np.random.default_rng(seed))])
    found = find_spike(losses_of([*values]), CONFIG)

    assert all(finding.severity is Severity.INFO for finding in found)
    assert find_divergence(losses_of([*values]), CONFIG) == []


def test_a_rise_is_no_spike() -> None:
    """What goes on rising is told by GG505."""
    values = [*noisy(60, 0.05), *np.geomspace(1.0, 1e4, 40)]

    assert find_spike(losses_of(values), CONFIG) == []
    assert only(find_divergence(losses_of(values), CONFIG)).severity is Severity.ERROR


def test_a_leap_before_the_loss_is_lost_is_its_root() -> None:
    """From 0.2 to 1e6 in one step, then NaN: one target, and not the rate."""
    finding = only(find_spike(losses_of([*noisy(60, 0.1), 1e6, math.nan]), CONFIG))

    assert (finding.severity, finding.step) == (Severity.WARNING, 60)


def test_a_leap_that_grows_on_is_the_root_of_what_follows() -> None:
    """One batch throws the loss up by 100, the next steps by more, and then it stays at chance."""
    values = [*noisy(60, 0.1), 30.0, 1e4, 1e6, 1e3, *[2.3] * 40]
    finding = only(find_spike(losses_of(values), CONFIG))

    assert (finding.step, finding.severity, finding.cause, finding.standing) == (60, Severity.WARNING, Cause.DATA, True)


def test_of_several_leaps_the_first_that_was_never_recovered_from_counts() -> None:
    """A leap that came back before it does not."""
    values = np.array([1.0] * 20 + [500.0] + [1.0] * 20 + [500.0] + [50.0] * 20 + [1e5, math.nan])

    assert leap(values) == 41


@pytest.mark.parametrize("values", [[], [math.nan] * 80, [*noisy(60, 0.1), 5.0, 50.0, math.nan], [-1.0] * 60 + [5.0]])
def test_losses_that_say_nothing(values: list[float]) -> None:
    """None, no finite one, one that is not finite now (GG201 to GG204), negative ones."""
    assert find_spike(losses_of(values), CONFIG) == []


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_scale_of_the_loss_changes_nothing(factor: float) -> None:
    """Mean or sum, weighted or not."""
    values = np.array([*noisy(60, 0.1), 40.0, *[3.0] * 39])
    first = only(find_spike(losses_of([*values]), CONFIG))
    scaled = only(find_spike(losses_of([*(values * factor)]), CONFIG))

    assert (first.step, first.severity) == (scaled.step, scaled.severity)


# ----------------------------------------------------------------------------------------------------- the gradient


def test_a_gradient_far_out_of_line_names_step_batch_and_layer() -> None:
    """50 times the usual at the last of 40 observations, in the third layer's weight."""
    finding = only(find_spike(with_norms([*[0.5, 0.55] * 20, 25.0], grown=4), CONFIG))

    assert (finding.severity, finding.step, finding.layer) == (Severity.WARNING, 40, "4")
    assert finding.message.startswith("The gradient norm spiked at step 40: 25, ")
    assert finding.evidence["batch"].value == 40


def test_clipping_that_cut_it_makes_it_info() -> None:
    """The step was harmless."""
    finding = only(find_spike(with_norms([*[0.5, 0.55] * 20, 25.0], at_step=0.04), CONFIG))

    assert finding.severity is Severity.INFO
    assert finding.message.endswith("Clipping cut it.")


def test_a_gradient_that_is_back_is_info() -> None:
    """Resolved at the next observation."""
    finding = only(find_spike(with_norms([*[0.5, 0.55] * 20, 25.0, 0.5, 0.5]), CONFIG))

    assert (finding.severity, finding.resolved_step) == (Severity.INFO, 41)


def test_gradients_that_shrink_with_convergence_have_no_spikes() -> None:
    """A wobble of a converged run stays far below where it began."""
    norms = [*np.geomspace(5.0, 1e-4, 60), 0.05, *[1e-4] * 10]

    assert find_spike(with_norms(norms), CONFIG) == []


# ------------------------------------------------------------------------------------------------------- divergence


def test_a_loss_that_leaves_its_level_for_good_has_diverged() -> None:
    """Down to 0.2 in 100 steps, then 1.8 for 30."""
    finding = only(find_divergence(losses_of([*noisy(100, 0.1), *(1.8 + 0.1 * np.sin(np.arange(30)))]), CONFIG))

    assert (finding.code, finding.severity) == ("GG505", Severity.WARNING)
    assert 98 <= finding.step <= 106
    assert "does not return" in finding.message


@pytest.mark.parametrize(
    "values",
    [
        [*noisy(100, 0.1), 50.0, *noisy(40, 0.1, start=0.3)],
        [*noisy(100, 0.1), *np.geomspace(3.0, 0.3, 40)],
        [*noisy(20, 0.1), *[3.0] * 19],
        [*noisy(100, 0.1), *[3.0] * 12],
        [*noisy(100, 0.1), *[0.5] * 60],
        [*np.geomspace(2.3, 1e-6, 200), *[1e-2] * 60],
        [2.3 + 0.5 * math.sin(7.0 * step) for step in range(200)],
        [*noisy(100, 0.1), *[3.0] * 20, math.nan],
    ],
    ids=["spike", "returning", "below 40", "12 only", "a restart", "converged", "no level", "not finite"],
)
def test_what_is_no_divergence(values: list[float]) -> None:
    """A spike, a loss on its way back, too few losses, a warm restart, the wobble of a converged run."""
    assert find_divergence(losses_of(values), CONFIG) == []


def test_losses_of_two_optimizers_are_played_against_each_other() -> None:
    """A generator's loss may rise for good in a healthy GAN."""
    history = losses_of([*noisy(100, 0.1), *[3.0] * 40])
    history.info = RunInfo(optimizers=(OptimizerInfo(name="Adam"), OptimizerInfo(name="Adam")))

    assert find_divergence(history, CONFIG) == []


@pytest.mark.parametrize("seed", range(4))
def test_long_noise_around_a_plateau_is_no_divergence(seed: int) -> None:
    """A batch of one that does not learn."""
    rng = np.random.default_rng(seed)

    assert find_divergence(losses_of([*(2.3 * np.exp(rng.standard_normal(600)))]), CONFIG) == []


# --------------------------------------------------------------------------------------------------------- real runs


def train(
    steps: int,
    *,
    spoil: Callable[[int, tuple[Tensor, Tensor]], tuple[Tensor, Tensor]] | None = None,
    size: int = 32,
    lr: float = 0.05,
    every: int = 1,
    ascend_from: int | None = None,
) -> tuple[gradguard.Diagnosis, list[Finding]]:
    """Train a small net on digits under a guard; return the verdict and what was announced."""
    torch.manual_seed(0)
    model = mlp(4, init="he")
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    told: list[Finding] = []
    with gradguard.watch(model, optimizer, every=every, on_finding=told.append, on_error="raise") as guard:
        for step in range(steps):
            batch = digit_batch(size, seed=step)
            if spoil is not None:
                batch = spoil(step, batch)
            optimizer.zero_grad()
            loss = classification_loss(model, batch)
            (loss if ascend_from is None or step < ascend_from else -0.2 * loss).backward()
            guard.record(loss=loss)
            nn.utils.clip_grad_norm_(model.parameters(), 50.0)
            optimizer.step()
        return guard.diagnose(), told


def test_an_outlier_batch_in_a_real_run_is_named_with_its_step() -> None:
    """Inputs of one batch are 300 times too large: loss and gradient spike at step 60."""
    diagnosis, told = train(70, spoil=lambda step, batch: (300.0 * batch[0], batch[1]) if step == 60 else batch)
    finding = next(f for f in diagnosis.findings if f.code == "GG103")

    assert finding.step == 60
    assert finding.cause is Cause.DATA
    assert finding.layer is not None
    assert {f.code for f in told} == {"GG103"}


def test_an_outlier_batch_between_two_observations_is_named_by_its_loss() -> None:
    """The loss is recorded at every step, whatever the cadence."""
    diagnosis, _ = train(
        140, every=50, spoil=lambda step, batch: (300.0 * batch[0], batch[1]) if step == 117 else batch
    )

    assert [f.step for f in diagnosis.findings if f.code == "GG103"] == [117]


def test_a_leap_of_the_loss_is_looked_at_and_told_at_once() -> None:
    """A loss on the CPU is a number at once: the step of the leap is observed, although none was due until 1000."""
    _, told = train(61, every=1000, spoil=lambda step, batch: (300.0 * batch[0], batch[1]) if step == 60 else batch)

    assert [(finding.code, finding.step) for finding in told] == [("GG103", 60)]
    assert told[0].layer is not None


@pytest.mark.parametrize(
    ("losses", "looked_at"),
    [
        ([1.0] * 30 + [50.0], [30]),
        ([1.0] * 10 + [50.0], []),
        ([1.0] * 30 + [5.0], []),
        ([100.0] + [0.01] * 60 + [50.0], []),
        ([1.0] * 30 + [50.0, 1.0] * 200, [30, 62, 126, 254]),
        ([-1.0] * 30 + [50.0], []),
        ([1.0, math.nan], [1]),
    ],
    ids=["leap", "too early", "small", "below the first", "again and again", "no level", "not finite"],
)
def test_which_losses_are_worth_a_look(losses: list[float], looked_at: list[int]) -> None:
    """Far above the usual and the first; repeated leaps ever more rarely."""
    monitor = LossMonitor()

    assert [step for step, loss in enumerate(losses) if monitor.is_alarming(loss)] == looked_at


@pytest.mark.parametrize(("size", "lr"), [(32, 0.05), (2, 0.01), (1, 0.005)])
def test_healthy_real_runs_are_left_alone(size: int, lr: float) -> None:
    """Usual and tiny batches."""
    diagnosis, told = train(250, size=size, lr=lr, every=5)

    assert diagnosis.healthy
    assert told == []
    assert not [f for f in diagnosis.findings if f.code in {"GG103", "GG505"} and f.severity > Severity.INFO]


def test_label_noise_is_left_alone() -> None:
    """One label in five is wrong."""

    def spoil(step: int, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(step)
        wrong = torch.rand(batch[1].shape, generator=generator) < 0.2
        return batch[0], torch.where(wrong, torch.randint(0, 10, batch[1].shape, generator=generator), batch[1])

    diagnosis, told = train(250, size=4, lr=0.01, every=5, spoil=spoil)

    assert diagnosis.healthy
    assert told == []


def test_a_run_that_turns_uphill_has_diverged() -> None:
    """From step 100 on the loss is maximised."""
    diagnosis, _ = train(160, ascend_from=100)

    assert "GG505" in {f.code for f in diagnosis.findings if f.standing}


def test_clipping_is_prescribed_at_the_usual_norm_also_where_the_loss_told() -> None:
    """A norm of 1 is far above the usual one here, and would let the spike pass."""
    history = changed(
        with_norms([0.01 * (1.0 + 0.05 * math.sin(step)) for step in range(60)] + [5.0]),
        lambda record: replace(record, scalars={**record.scalars, "grad_norm_at_step": math.nan}),
    )
    finding = next(f for f in run_detectors(history, CONFIG) if f.code == "GG103")
    cure = next(cure for cure in prescriptions_for(finding) if cure.remedy == "clip-norm")

    assert finding.evidence["usual_norm"].value == pytest.approx(0.01, rel=0.05)
    assert cure.arguments["max_norm"] == pytest.approx(0.01, rel=0.05)
