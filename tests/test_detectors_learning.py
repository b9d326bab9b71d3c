"""GG501 to GG503 on made-up histories, the loss trend and the episodes that they and other rules stand on."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradguard.config import GuardConfig
from gradguard.detectors import run_detectors
from gradguard.detectors._episodes import last_episode
from gradguard.detectors._loss import LossProgress, Trend, judge_losses, loss_growth
from gradguard.detectors._numbers import usual_rate
from gradguard.detectors.learning_rate import find_learning_rate
from gradguard.detectors.no_update import find_no_update
from gradguard.findings import Cause, Finding, Severity
from gradguard.history import History
from gradguard.prescriptions import prescriptions_for
from gradguard.records import StepRecord
from tests.histories import DENSE, NAN, chain, changed, falling, flat
from tests.strategies import any_loss

CONFIG = GuardConfig()


def run(steps: Sequence[int] = DENSE, **arguments: object) -> History:
    """Return a healthy chain of six layers: weights in the even parameter rows 0 to 10, biases in the odd ones."""
    return chain(layers=6, activation="Tanh", steps=steps, **arguments)  # type: ignore[arg-type]  # kwargs of chain


def owned(
    history: History,
    columns: Mapping[str, float | Mapping[int, float]],
    *,
    at: Callable[[int], bool] = lambda _: True,
    **scalars: float,
) -> History:
    """Return the history with parameter columns replaced, whole or by row, at the steps chosen."""

    def edit(record: StepRecord) -> StepRecord:
        if not at(record.step):
            return record
        values = dict(record.parameter_values)
        for name, change in columns.items():
            column = values[name].copy()
            if isinstance(change, Mapping):
                for row, value in change.items():
                    column[row] = value
            else:
                column[:] = change
            values[name] = column
        return replace(record, scalars={**record.scalars, **scalars}, parameter_values=values)

    return changed(history, edit)


def only(findings: Sequence[Finding]) -> Finding:
    """Return the one finding."""
    (finding,) = findings
    return finding


# ------------------------------------------------------------------------------------------------- too high


def test_updates_as_large_as_the_weights_and_a_loss_that_does_not_fall() -> None:
    """The learning rate is too high: median ratio 0.5, loss flat."""
    finding = only(find_learning_rate(owned(run(), {"update_ratio": 0.5}, lr=0.3), CONFIG))

    assert (finding.code, finding.name, finding.severity) == ("GG501", "learning-rate-too-high", Severity.WARNING)
    assert finding.cause is Cause.LEARNING_RATE
    assert finding.message == (
        "The learning rate is too high: a step changes the weights by 0.5 of their size (median over matrices; "
        "about 0.001 is usual), and the loss does not fall."
    )
    assert finding.evidence["suggested_lr"].value == pytest.approx(0.3 * 1e-3 / 0.5)


@pytest.mark.parametrize(("dead", "found"), [(1.0, True), (0.2, False)])
def test_one_look_is_enough_where_units_died_of_it(dead: float, found: bool) -> None:
    """The first steps throw the weights so far that units never answer again: then the ratio falls by itself."""
    history = owned(chain(layers=6, activation="ReLU"), {"update_ratio": 0.5}, at=lambda step: step == 0)

    def kill(record: StepRecord) -> StepRecord:
        lost = np.where(np.array(record.layers.roles) == "activation", dead if record.step > 2 else 0.1, NAN)
        return replace(record, layer_values={**record.layer_values, "inactive_fraction": lost})

    assert bool(find_learning_rate(changed(history, kill), CONFIG)) is found


@pytest.mark.parametrize(("factor", "found"), [(3.0, True), (1.5, False)])
def test_weights_that_double_between_two_looks_tell_of_the_rate(factor: float, found: bool) -> None:
    """What the steps in between did is not seen, and what became of the weights is."""

    def grow(record: StepRecord) -> StepRecord:
        late = record.step > 2
        roles = np.array(record.layers.roles) == "activation"
        values = {**record.parameter_values, "update_ratio": np.full(len(record.parameters), 0.005)}
        values["weight_norm"] = record.parameter_values["weight_norm"] * (factor if late else 1.0)
        inactive = np.where(roles, 1.0 if late else 0.1, NAN)
        layers = {**record.layer_values, "inactive_fraction": inactive}
        return replace(record, parameter_values=values, layer_values=layers)

    history = changed(chain(layers=6, activation="ReLU"), grow)

    assert bool(find_learning_rate(history, CONFIG)) is found


def test_a_loss_that_rises_makes_it_an_error() -> None:
    """From 2.3 to 40."""
    history = run(losses=[2.3 + 0.4 * step for step in range(101)])

    assert only(find_learning_rate(owned(history, {"update_ratio": 0.5}), CONFIG)).severity is Severity.ERROR


def test_it_stands_until_the_loss_falls() -> None:
    """Once the weights have grown the ratio drops by itself; the harm is done."""
    finding = only(find_learning_rate(owned(run(), {"update_ratio": 0.5}, at=lambda step: step < 5), CONFIG))

    assert (finding.step, finding.last_step, finding.standing) == (0, 100, True)


def test_a_loss_that_erupted_and_came_back_to_chance_has_not_fallen() -> None:
    """3 to 1e33 and back to 2.7: the start is what counts, not the peak."""
    losses = [3.05, 6e3, 5e8, *np.geomspace(1e15, 2.69, 98).tolist()]
    history = owned(run(losses=losses), {"update_ratio": 0.5}, at=lambda step: step < 10)

    assert only(find_learning_rate(history, CONFIG)).severity is Severity.ERROR


def test_one_observation_is_enough_where_the_numbers_cease_to_be_finite() -> None:
    """Twice the weights' size in one step, then NaN: there will be no third look."""
    history = owned(run(losses=[2.3, 90.0, math.nan]), {"update_ratio": 2.0}, at=lambda step: step == 0)
    finding = only(find_learning_rate(owned(history, {"update_ratio": NAN}, at=lambda step: step > 0), CONFIG))

    assert finding.severity is Severity.ERROR
    assert finding.message.endswith("and the numbers ceased to be finite.")


@pytest.mark.parametrize(("losses", "fires"), [([*flat(35), 1e3, 1e9, NAN], True), ([*flat(37), NAN], False)])
def test_a_tenth_of_the_limit_is_enough_where_the_loss_blew_up(losses: list[float], fires: bool) -> None:
    """4 % per step and a loss that grows tenfold before it overflows; a sudden NaN has other reasons."""
    history = owned(run(losses=losses, steps=DENSE[:6]), {"update_ratio": 0.04})

    assert bool(find_learning_rate(history, CONFIG)) == fires


def test_a_leap_out_of_a_loss_that_had_fallen_is_no_matter_of_the_rate() -> None:
    """It learnt at this rate for 35 steps; one batch broke it."""
    history = owned(run(losses=[*falling(35), 1e3, 1e9, NAN], steps=DENSE[:6]), {"update_ratio": 0.04})

    assert find_learning_rate(history, CONFIG) == []


def test_a_classifier_still_at_chance_after_a_hundred_steps_of_5_percent_has_too_high_a_rate() -> None:
    """A one-cycle schedule up to 0.3 threw a net to the loss of guessing, and it never came back."""
    finding = only(find_learning_rate(owned(run(), {"update_ratio": 0.05}), CONFIG))

    assert (finding.code, finding.severity, finding.step) == ("GG501", Severity.WARNING, 0)


@pytest.mark.parametrize(
    ("ratio", "peak", "fires"), [(4.5, 16.0, True), (0.9, 16.0, False), (4.5, 3.0, False)], ids=str
)
def test_a_step_that_replaces_the_weights_and_throws_the_loss_is_told_at_once(
    ratio: float, peak: float, fires: bool
) -> None:
    """NAdam at 0.5: weights four times their size away, the loss at 16, and no second look is needed."""
    history = run(losses=[2.37, 2.8, peak], steps=(0, 1, 2))
    history = owned(history, {"update_ratio": 0.05})

    assert bool(find_learning_rate(owned(history, {"update_ratio": ratio}, at=lambda s: s == 0), CONFIG)) is fires


@pytest.mark.parametrize(
    "build",
    [
        lambda: owned(run(losses=falling(101)), {"update_ratio": 0.5}),
        lambda: owned(run(), {"update_ratio": 0.5}, at=lambda step: step in {0, 2, 10}),
        lambda: owned(run(losses=[]), {"update_ratio": 0.5}),
        lambda: owned(run(), {"update_ratio": {1: 5.0, 3: 5.0, 5: 5.0, 7: 5.0, 9: 5.0, 11: 5.0}}),
        lambda: owned(run(), {"update_ratio": {0: 1e10, 2: 3.8}}),
        lambda: owned(owned(run(), {"weight_norm": 0.0}, at=lambda step: step == 0), {"update_ratio": 1e10}),
        lambda: owned(run(), {"update_ratio": 0.005}),
        lambda: owned(run(classes=0), {"update_ratio": 0.05}),
        lambda: owned(run(), {"update_ratio": 0.5, "trainable": 0.0}),
        lambda: owned(run(steps=(0,), preflight=True), {"update_ratio": 0.5}),
    ],
    ids=[
        "loss falls",
        "flicker",
        "no losses",
        "biases",
        "two tables",
        "began at zero",
        "below",
        "no classifier",
        "frozen",
        "check",
    ],
)
def test_large_ratios_that_are_no_illness(build: Callable[[], History]) -> None:
    """Sparse embeddings, zero-initialized tables, biases: a ratio alone says nothing."""
    assert find_learning_rate(build(), CONFIG) == []


def test_embeddings_are_left_out() -> None:
    """Healthy sparse embeddings show ratios of 3.8."""

    def embed(record: StepRecord) -> StepRecord:
        roles = tuple("embedding" if role == "affine" else role for role in record.layers.roles)
        return replace(record, layers=replace(record.layers, roles=roles))

    history = owned(run(), {"update_ratio": 3.8})

    assert find_learning_rate(history, CONFIG) != []
    assert find_learning_rate(changed(history, embed), CONFIG) == []


# ------------------------------------------------------------------------------------------------- too low


def test_weights_that_hardly_move_and_a_loss_that_does_not_fall() -> None:
    """The learning rate is too low: a billionth per step."""
    finding = only(find_learning_rate(owned(run(), {"update_ratio": 1e-9}), CONFIG))

    assert (finding.code, finding.name, finding.severity) == ("GG502", "learning-rate-too-low", Severity.WARNING)
    assert finding.message == (
        "The learning rate is too low: a step changes the weights by 10^-9.0 of their size (upper quartile over "
        "matrices; about 10^-3.0 is usual), and the loss does not fall."
    )


@pytest.mark.parametrize(("ratio", "text"), [(0.0, "the weights not at all"), (10**-5.5, "by 10^-5.5 of their size")])
def test_a_classifier_that_stays_at_chance_and_hardly_moves(ratio: float, text: str) -> None:
    """At chance for 100 steps a few millionths are too few, and nothing at all is the rate's fault as well."""
    finding = only(find_learning_rate(owned(run(), {"update_ratio": ratio}), CONFIG))

    assert finding.code == "GG502"
    assert text in finding.message


@pytest.mark.parametrize(("ratio", "classes", "fires"), [(2e-5, 10, True), (1e-4, 10, False), (2e-5, 0, False)])
def test_a_loss_that_creeps_down_near_chance_is_too_slow(ratio: float, classes: int, fires: bool) -> None:
    """From 2.5 to 2.2 in 100 steps, at a fiftieth of the usual ratio; without classes nobody knows where chance is."""
    history = owned(run(losses=falling(101, 2.5, 2.2), classes=classes), {"update_ratio": ratio})
    found = find_learning_rate(history, CONFIG)

    assert bool(found) is fires
    assert not fires or found[0].message.endswith("and the loss has not left chance.")


@pytest.mark.parametrize(
    ("level", "noise", "fires"), [(2.3e-4, 0.03, True), (2.3e-4, 0.3, False), (2.3e-4, 0.0, False)]
)
def test_a_loss_that_was_scaled_down_is_told_from_one_that_has_fallen(level: float, noise: float, fires: bool) -> None:
    """Both are far below chance; at chance batches differ by a few per cent, in nets that have learnt by tens."""
    found = find_learning_rate(owned(run(losses=flat(101, level, noise * level)), {"update_ratio": 4e-6}), CONFIG)

    assert [finding.code for finding in found] == (["GG502"] if fires else [])


@pytest.mark.parametrize(
    ("rates", "sizes", "usual"),
    [
        ([0.1, 1e-3, 1e-2], [1, 5, 1], 1e-3),
        ([0.1, 1e-3, 1e-2], [1, 1, 5], 1e-2),
        ([0.1, 1e-3, 1e-2], [1, 1, 1], 1e-2),
        ([1e-3, 0.0, math.nan], [1, 99, 99], 1e-3),
        ([0.0, math.nan], [1, 1], math.nan),
        ([1e-3], [0], math.nan),
    ],
)
def test_the_usual_rate_is_that_of_the_middle_weight(rates: list[float], sizes: list[float], usual: float) -> None:
    """What does not train does not count."""
    assert usual_rate(np.array(rates), np.array(sizes)) == pytest.approx(usual, nan_ok=True)


def test_a_group_far_above_the_others_is_evidence_and_evening_it_out_the_first_cure() -> None:
    """Of a finding that steps can have made; not of one that a uniform rate has made."""
    ratio = {"update_ratio": 0.5}
    uneven = run_detectors(owned(run(), {**ratio, "lr": {0: 0.1, 1: 0.1, **dict.fromkeys(range(2, 12), 1e-3)}}), CONFIG)
    even = run_detectors(owned(run(), {**ratio, "lr": 0.1}), CONFIG)

    finding = next(f for f in uneven if f.code == "GG501")
    assert (finding.evidence["highest_lr"].value, finding.evidence["usual_lr"].value) == (0.1, 1e-3)
    first = prescriptions_for(finding)[0]
    assert first.remedy == "even-learning-rates"
    assert "is 100 times that of most weights" in first.reason
    finding = next(f for f in even if f.code == "GG501")
    assert "highest_lr" not in finding.evidence
    assert "even-learning-rates" not in {cure.remedy for cure in prescriptions_for(finding)}


def test_a_rate_that_has_climbed_is_evidence() -> None:
    """From a thousandth to one; a rate that falls, or one that was raised fivefold, is not mentioned."""

    def found(rate: Callable[[int], float]) -> Finding:
        history = changed(
            owned(run(), {"update_ratio": 0.5}),
            lambda record: replace(record, scalars={**record.scalars, "lr": rate(record.step)}),
        )
        return next(f for f in run_detectors(history, CONFIG) if f.code == "GG501")

    evidence = found(lambda step: 1e-3 * 10 ** (step / 33)).evidence
    assert evidence["first_lr"].value == pytest.approx(1e-3)
    assert evidence["climbed_lr"].value == pytest.approx(10 ** (100 / 33 - 3))
    assert "climbed_lr" not in found(lambda step: 0.99**step).evidence
    assert "climbed_lr" not in found(lambda step: 1.0 + min(4.0, step)).evidence


@pytest.mark.parametrize(
    "build",
    [
        lambda: owned(run(losses=falling(101)), {"update_ratio": 1e-9}),
        lambda: owned(run(losses=flat(101, 0.05, 0.001)), {"update_ratio": 1e-9}),
        lambda: owned(run(losses=[]), {"update_ratio": 1e-9}),
        lambda: owned(run(), {"update_ratio": dict.fromkeys(range(8), 1e-9)}),
        lambda: owned(run(), {"update_ratio": 1e-9}, at=lambda step: step < 50),
        lambda: owned(run(steps=(0, 1)), {"update_ratio": 1e-9}),
        lambda: owned(run(), {"update_ratio": 0.0, "lr": 0.0}),
        lambda: owned(run(classes=0), {"update_ratio": 10**-5.9}),
        lambda: owned(run(steps=DENSE[:7]), {"update_ratio": 10**-5.9}),
    ],
    ids=["falls", "converged", "no losses", "top layers learn", "over", "two looks", "rate 0", "late", "at chance yet"],
)
def test_small_ratios_that_are_no_illness(build: Callable[[], History]) -> None:
    """Converged runs, discriminative rates, unknown losses: a small ratio alone says nothing."""
    assert find_learning_rate(build(), CONFIG) == []


@pytest.mark.parametrize("rates", [lambda step: 1e-9 * (step + 1), lambda step: 1e-2 if step < 2 else 1e-9])
def test_warm_up_and_the_end_of_a_schedule_are_no_illness(rates: Callable[[int], float]) -> None:
    """The rate rises, or is what is left of a higher one."""
    history = owned(run(), {"update_ratio": 1e-9})

    def schedule(record: StepRecord) -> StepRecord:
        return replace(record, scalars={**record.scalars, "lr": rates(record.step)})

    assert find_learning_rate(history, CONFIG) != []
    assert find_learning_rate(changed(history, schedule), CONFIG) == []


# ------------------------------------------------------------------------------------------------- no update

LEFT_OUT = {"in_optimizer": {0: 0.0, 1: 0.0}, "update_ratio": {0: 0.0, 1: 0.0}, "lr": {0: NAN, 1: NAN}}


def test_what_no_optimizer_holds_never_moves() -> None:
    """A layer made after the optimizer."""
    finding = only(find_no_update(owned(run(), LEFT_OUT), CONFIG))

    assert (finding.code, finding.name, finding.severity) == ("GG503", "no-update", Severity.WARNING)
    assert (finding.cause, finding.layers) == (Cause.WIRING, ("0.weight", "0.bias"))
    assert finding.message == (
        "0.weight and 0.bias get a gradient and never move: no optimizer holds them (17 % of the trainable entries)."
    )


def test_a_forgotten_layer_stays_a_warning_when_the_rest_learns() -> None:
    """The loss falls all the same; a small part left out is forgotten, not meant."""
    assert only(find_no_update(owned(run(losses=falling(101)), LEFT_OUT), CONFIG)).severity is Severity.WARNING


@pytest.mark.parametrize(("losses", "severity"), [(falling(101), Severity.INFO), (flat(101), Severity.ERROR)])
def test_most_of_the_model_left_out_is_feature_extraction_only_if_it_learns(
    losses: list[float], severity: Severity
) -> None:
    """A head on a body that nobody froze: harmless where the loss falls."""
    body = {"in_optimizer": dict.fromkeys(range(10), 0.0)}

    assert only(find_no_update(owned(run(losses=losses), body), CONFIG)).severity is severity


def test_a_check_knows_what_the_optimizer_holds() -> None:
    """One look is enough: nothing has to move for that."""
    assert only(find_no_update(owned(run(steps=(0,), preflight=True), LEFT_OUT), CONFIG)).code == "GG503"


@pytest.mark.parametrize(("losses", "severity"), [(falling(101), Severity.INFO), (flat(101), Severity.WARNING)])
def test_a_learning_rate_of_zero(losses: list[float], severity: Severity) -> None:
    """A parameter group whose rate was never anything else."""
    finding = only(find_no_update(owned(run(losses=losses), {"lr": {0: 0.0, 1: 0.0}}), CONFIG))

    assert (finding.cause, finding.severity) == (Cause.LEARNING_RATE, severity)
    assert "the learning rate of their parameter group is 0" in finding.message


def test_updates_that_change_no_entry() -> None:
    """Lost to rounding, or to whatever stands between gradient and weight."""
    finding = only(find_no_update(owned(run(), {"moved_fraction": {2: 0.0}}), CONFIG))

    assert (finding.layer, finding.cause) == ("2.weight", Cause.PRECISION)
    assert finding.message.startswith(
        "2.weight gets a gradient and never moves: the optimizer's step changes none of its"
    )


@pytest.mark.parametrize(
    "build",
    [
        run,
        lambda: owned(run(steps=(0, 1)), LEFT_OUT),
        lambda: owned(run(adaptive=None), LEFT_OUT),
        lambda: owned(owned(run(), LEFT_OUT), {"weight_norm": {0: 9.0, 1: 9.0}}, at=lambda step: step >= 10),
        lambda: owned(run(), {**LEFT_OUT, "trainable": {0: 0.0, 1: 0.0}}),
        lambda: owned(run(), {**LEFT_OUT, "grad_norm": {0: NAN, 1: NAN}}),
        lambda: owned(run(), {"lr": 0.0}, at=lambda step: step == 0),
        lambda: owned(run(), {"lr": 0.0}, at=lambda step: step == 100),
        lambda: owned(run(losses=falling(101)), {"moved_fraction": 0.0}),
        lambda: owned(run(), {"moved_fraction": 0.0}, at=lambda step: step > 0),
        lambda: owned(run(), {"moved_fraction": NAN}),
    ],
    ids=[
        "healthy",
        "two looks",
        "no optimizer to ask",
        "somebody moves it",
        "frozen",
        "no gradient",
        "warm-up from 0",
        "schedule ends at 0",
        "converged",
        "moved once",
        "unknown",
    ],
)
def test_what_moves_or_need_not_is_silent(build: Callable[[], History]) -> None:
    """Frozen parameters, other people's optimizers, warm-up, convergence."""
    assert find_no_update(build(), CONFIG) == []


# ------------------------------------------------------------------------------------------------- loss trend


@pytest.mark.parametrize(
    ("losses", "classes", "trend"),
    [
        ([], 10, Trend.UNKNOWN),
        (flat(19), 10, Trend.UNKNOWN),
        (flat(200), 10, Trend.FLAT),
        (falling(200), 10, Trend.FALLEN),
        (falling(200, 2.3, 2.0), 10, Trend.FALLING),
        ([2.64, 2.5, 2.4, *flat(200)], 10, Trend.FLAT),
        ([9.0] * 3 + flat(200), 10, Trend.FLAT),
        ([9.0] * 3 + flat(200), 0, Trend.FALLEN),
        ([3.0] * 10 + flat(200, 2.6), 0, Trend.FALLING),
        ([3.05, 6e3, 6e3, *np.geomspace(6e3, 2.9, 97).tolist(), *flat(30, 2.9)], 0, Trend.FALLING),
        ([2.3 + 0.01 * step for step in range(200)], 10, Trend.RISEN),
        ([*flat(50), math.inf], 10, Trend.RISEN),
        ([math.nan] * 30, 10, Trend.RISEN),
        ([-0.1 - 0.01 * step for step in range(200)], 0, Trend.FALLEN),
        ([0.0] * 50, 0, Trend.FLAT),
    ],
    ids=[
        "nothing",
        "too few",
        "flat",
        "fallen",
        "falling",
        "down to chance",
        "from above to chance",
        "no chance known",
        "early and little",
        "leap and return",
        "risen",
        "ends in inf",
        "all nan",
        "negative",
        "zero",
    ],
)
def test_what_a_loss_did(losses: list[float], classes: int, trend: Trend) -> None:
    """A sigmoid net's way from 2.64 to ln 10 is no learning; from 2.3 to 0.05 is."""
    assert judge_losses(np.array(losses), classes=classes).trend is trend


def test_noise_is_not_progress() -> None:
    """A loss of one example per step wanders by its own size."""
    rng = np.random.default_rng(0)

    assert judge_losses(np.abs(rng.normal(2.3, 1.5, 200)), classes=0).trend is Trend.FLAT


@given(
    st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=20, max_size=60),
    st.sampled_from([2.0**-10, 0.5, 4.0, 1024.0]),
)
def test_the_scale_of_the_loss_changes_no_trend(values: list[float], factor: float) -> None:
    """Losses times k have the same trend."""
    losses = np.array(values)

    assert judge_losses(losses * factor).trend is judge_losses(losses).trend


@given(st.lists(any_loss, max_size=60), st.sampled_from([0, 1, 2, 10]))
def test_any_losses_have_a_trend(values: list[float], classes: int) -> None:
    """NaN, infinities and negative losses never raise."""
    assert isinstance(judge_losses(np.array(values), classes=classes), LossProgress)


def test_growth_before_an_overflow() -> None:
    """The last finite loss over what was usual; NaN where the loss stayed finite."""
    assert loss_growth(np.array([2.0, 2.0, 200.0, NAN])) == pytest.approx(100.0)
    assert math.isnan(loss_growth(np.array([2.0, 2.0])))
    assert math.isnan(loss_growth(np.array([2.0, NAN])))


# ------------------------------------------------------------------------------------------------- episodes


@pytest.mark.parametrize(
    ("mask", "patience", "expected"),
    [
        ("....", 1, None),
        ("x...", 1, (0, 0, 1, 1)),
        ("..xx", 1, (2, 3, None, 2)),
        ("x.xx", 1, (2, 3, None, 2)),
        ("x.xx.", 1, (2, 3, 4, 2)),
        ("x.xx", 2, (2, 3, None, 2)),
        ("x.x.", 2, None),
        ("xx.x", 2, (0, 1, 2, 2)),
        ("x?x", 2, (0, 2, None, 2)),
        ("xx?", 1, (0, 1, None, 2)),
    ],
)
def test_last_episode(mask: str, patience: int, expected: tuple[int, int, int | None, int] | None) -> None:
    """Dots are no, crosses yes, question marks unknown: first, last, resolved, count."""
    begins = np.array([sign == "x" for sign in mask])
    known = np.array([sign != "?" for sign in mask])
    episode = last_episode(begins, known=known, patience=patience)

    found = None if episode is None else (episode.first, episode.last, episode.resolved, episode.count)
    assert found == expected


def test_hysteresis_keeps_an_episode_going() -> None:
    """It begins at one limit and ends at a wider one."""
    begins, holds = np.array([1, 0, 0, 0], dtype=bool), np.array([1, 1, 1, 0], dtype=bool)
    episode = last_episode(begins, holds=holds)

    assert episode is not None
    assert (episode.last, episode.resolved) == (2, 3)
