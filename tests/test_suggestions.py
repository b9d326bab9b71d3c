"""A clipping threshold from the norms of a run: numbers, refusals, and what it says in words."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import gradguard
from gradguard import clip
from gradguard.records import FloatArray
from gradguard.suggestions import robust_threshold, suggest_threshold
from tests.models import classification_loss, digit_batch, mlp


def lognormal(count: int = 1000, deviation: float = 0.2, seed: int = 0) -> FloatArray:
    """Return log-normal norms of median 1."""
    return np.random.default_rng(seed).lognormal(0.0, deviation, count)


@pytest.mark.parametrize("seed", range(10))
def test_lognormal_norms_give_about_twice_their_median(seed: int) -> None:
    """A thousand norms of deviation 0.2: the threshold lies between 1.85 and 2.15 medians."""
    assert 1.85 <= suggest_threshold(lognormal(seed=seed)).threshold <= 2.15


def test_a_hundredth_of_spikes_hardly_moves_it() -> None:
    """Ten norms a hundred times too large move the threshold by less than 5 %, and the mean by 100 %."""
    norms = lognormal()
    spiked = norms.copy()
    spiked[::100] *= 100.0

    assert abs(suggest_threshold(spiked).threshold / suggest_threshold(norms).threshold - 1.0) < 0.05
    assert spiked.mean() > 1.9 * norms.mean()


def test_constant_norms_give_twice_themselves() -> None:
    """There is no spread to go by: twice the median, never less."""
    assert robust_threshold([7.0] * 20) == pytest.approx(14.0)
    assert suggest_threshold([7.0] * 20).threshold == pytest.approx(14.0)


def test_wide_norms_give_three_robust_deviations() -> None:
    """At deviation 0.5 three of them exceed ln 2, and about one step in a thousand would be clipped."""
    suggestion = suggest_threshold(lognormal(20_000, deviation=0.5))

    assert suggestion.threshold == pytest.approx(math.exp(1.5), rel=0.05)
    assert suggestion.shares[0].share == pytest.approx(0.00135, abs=0.0007)


@pytest.mark.parametrize(
    "norms",
    [
        pytest.param([1.0] * 19, id="nineteen"),
        pytest.param([1.0] * 19 + [math.nan, math.inf, 0.0] * 9, id="nineteen that are finite and above 0"),
        pytest.param([], id="none"),
    ],
)
def test_too_few_norms_are_refused(norms: list[float]) -> None:
    """Below twenty usable norms there is an error that says how many there were and what to do."""
    with pytest.raises(
        gradguard.NothingObservedError, match=rf"at least 20 finite.*got {norms.count(1.0)} of {len(norms)}"
    ):
        suggest_threshold(norms)
    with pytest.raises(gradguard.NothingObservedError, match="no finite norm"):
        robust_threshold([math.nan, 0.0])


def test_norms_that_are_not_finite_are_left_out() -> None:
    """They neither count nor spread."""
    norms = [*lognormal(), math.nan, math.inf]

    assert suggest_threshold(norms).samples == 1000
    assert suggest_threshold(norms).threshold == suggest_threshold(norms[:-2]).threshold


def test_percentiles_and_shares_are_those_of_the_norms() -> None:
    """Norms 1 to 100: the percentiles are numpy's, and each threshold clips what lies above it."""
    norms = np.random.default_rng(0).permutation(np.arange(1.0, 101.0))
    suggestion = suggest_threshold(norms)

    assert suggestion.percentiles == {p: pytest.approx(np.percentile(norms, p)) for p in (5, 50, 95, 99)}
    shares = {row.name: row.share for row in suggestion.shares}
    assert shares["median"] == 0.5
    assert shares["2 x median"] == 0.0
    assert shares["95 % percentile"] == 0.05
    assert {row.name: row.label for row in suggestion.shares}["median"] == "tight"


@pytest.mark.parametrize(
    ("share", "label"), [(0.0005, "inactive"), (0.01, "guard"), (0.3, "tight"), (0.6, "normalised gradient")]
)
def test_labels_follow_the_share(share: float, label: str) -> None:
    """The label of a threshold is that of the share of steps above it."""
    norms = np.where(np.arange(10_000) % 2000 < 2000 * share, 10.0, 1.0)
    suggestion = suggest_threshold(norms)
    found = {row.label for row in suggestion.shares if row.share == pytest.approx(share)}

    assert found <= {label}
    if share < 0.5:
        assert found


@pytest.mark.parametrize(
    ("factor", "recommendation"), [(1.0, "fixed"), (0.5, "fixed"), (0.1, "adaptive"), (20.0, "adaptive")]
)
def test_norms_that_move_far_ask_for_an_adaptive_threshold(factor: float, recommendation: str) -> None:
    """A change beyond a factor of 3 over the run, either way, is too much for a fixed threshold."""
    norms = lognormal(300) * np.geomspace(1.0, factor, 300)
    suggestion = suggest_threshold(norms)

    assert suggestion.recommendation == recommendation
    assert suggestion.stationary is (recommendation == "fixed")
    assert suggestion.drift == pytest.approx(factor, rel=0.25)
    assert ("Norm(model, max_norm=" if suggestion.stationary else "Adaptive(model)") in suggestion.code


def test_the_trend_goes_by_the_steps_and_not_by_the_order() -> None:
    """Twenty dense norms at the start and a few hundred spread ones: the drift is that over all steps."""
    steps = np.concatenate([np.arange(20.0), np.arange(100.0, 20_000.0, 100.0)])
    norms = np.exp(-steps / 10_000.0)

    assert suggest_threshold(norms, steps).drift == pytest.approx(math.exp(-1.99), rel=0.01)


def test_spikes_are_no_trend() -> None:
    """A few spikes at the end do not make a run moving."""
    norms = lognormal(200)
    norms[-10:] *= 100.0

    assert suggest_threshold(norms).stationary


def test_the_text_says_what_to_paste() -> None:
    """``str()`` gives threshold, percentiles, shares and the code, in lines that fit a terminal."""
    suggestion = suggest_threshold(lognormal(100))
    text = str(suggestion)

    assert suggestion.code in text
    assert f"{suggestion.threshold:.3g}" in text
    assert "100 norms; 200 or more after warmup make it firm" in text
    assert max(map(len, text.splitlines())) <= 100


def run(steps: int, *, record: bool, optimizers: int = 1) -> gradguard.Guard:
    """Train on digits and return the guard."""
    torch.manual_seed(0)
    model = mlp(3)
    parts = [list(model.parameters())[index::optimizers] for index in range(optimizers)]
    made = [torch.optim.SGD(part, lr=0.05) for part in parts]
    guard = gradguard.watch(model, made, every=1, on_finding="silent")
    for step in range(steps):
        loss = classification_loss(model, digit_batch(32, seed=step))
        loss.backward()
        if record:
            guard.record(loss=loss)
        for optimizer in made:
            optimizer.step()
        model.zero_grad()
    guard.detach()
    return guard


def test_a_guard_suggests_from_its_own_norms() -> None:
    """The suggestion is that of the norms the guard has read, and its code runs."""
    guard = run(40, record=True)
    suggestion = guard.suggest_clip()

    assert suggestion.samples == 40
    assert suggestion.threshold == robust_threshold(guard.history.scalar("grad_norm"))
    model = mlp(3)
    names = {"gradguard": gradguard, "model": model}
    exec(suggestion.code, names)  # noqa: S102  # the promise is that it can be pasted
    assert isinstance(names["clipper"], clip.Clipper)
    assert not any("as the optimizer stepped" in note for note in suggestion.notes)


def test_a_guard_that_did_not_see_the_norms_before_clipping_says_so() -> None:
    """Without ``record()`` the norms are those of the step."""
    assert any("as the optimizer stepped" in note for note in run(25, record=False).suggest_clip().notes)


def test_a_guard_that_saw_little_refuses() -> None:
    """Ten steps are too few."""
    with pytest.raises(gradguard.NothingObservedError, match="got 10 of 10"):
        run(10, record=True).suggest_clip()


def test_each_optimizer_has_its_own_norms() -> None:
    """With two optimizers the suggestion is that of the one asked for."""
    guard = run(25, record=True, optimizers=2)
    parts = guard.history.split()

    for index in (0, 1):
        assert guard.suggest_clip(optimizer=index).threshold == robust_threshold(parts[index].scalar("grad_norm"))


def test_a_threshold_told_to_the_guard_and_never_reached_is_reported() -> None:
    """GG601 needs the caller's threshold: ``guard.clip_norm`` tells it, from a clipper or from anywhere."""
    torch.manual_seed(0)
    model = mlp(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    clipper = clip.Norm(model, 1e4).attach(optimizer)
    guard = gradguard.watch(model, optimizer, every=10, on_finding="silent")
    assert math.isnan(guard.clip_norm)
    for step in range(260):
        loss = classification_loss(model, digit_batch(32, seed=step))
        loss.backward()
        guard.record(loss=loss)
        optimizer.step()
        optimizer.zero_grad()
    guard.detach()
    assert "GG601" not in {finding.code for finding in guard.diagnose().findings}

    guard.clip_norm = clipper.norm_limit

    assert "GG601" in {finding.code for finding in guard.diagnose().findings}
