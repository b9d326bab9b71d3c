"""Guard: it never harms a run, reads at the right moment, and leaves no trace."""

from __future__ import annotations

import copy
import gc
import math
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import gradguard
from gradguard import GradGuardWarning
from gradguard._alerts import Alerts
from gradguard.errors import UnhealthyGradientsError, UnsupportedModelError
from gradguard.findings import Finding, Severity
from gradguard.guard import Guard
from tests.driving import count_hooks
from tests.models import (
    ConvNet,
    SequenceClassifier,
    TransformerClassifier,
    classification_loss,
    digit_batch,
    mlp,
)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: int,
    *,
    guard: Guard | None = None,
    clip: float | None = None,
    record: bool = True,
) -> list[float]:
    """Train on digits; return the losses."""
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        loss = classification_loss(model, digit_batch(32, seed=step))
        loss.backward()
        if guard is not None and record:
            guard.record(loss=loss)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        losses.append(loss.item())
    return losses


def adam(model: nn.Module, lr: float = 1e-3) -> torch.optim.Adam:
    """Return Adam over a model."""
    return torch.optim.Adam(model.parameters(), lr=lr)


def hook_counts(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Count module hooks and optimizer step hooks before and after."""
    pre, post = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return count_hooks(model), len(pre), len(post)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(6, nn.Tanh),
        lambda: ConvNet(2),
        lambda: SequenceClassifier("lstm"),
        lambda: SequenceClassifier("gru"),
        lambda: TransformerClassifier(2, dropout=0.1),
    ],
    ids=["mlp", "conv", "lstm", "gru", "transformer"],
)
def test_training_is_bit_identical_with_and_without_a_guard(make: Callable[[], nn.Module]) -> None:
    """Parameters, buffers, optimizer state and random state after 50 steps are the same to the last bit."""
    outcomes = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = make()
        optimizer = adam(model)
        guard = gradguard.watch(model, optimizer, every=1, on_error="raise", on_finding="silent") if watched else None
        train(model, optimizer, 50, guard=guard, clip=1.0)
        if guard is not None:
            assert len(guard.history) == 50
            guard.detach()
        outcomes.append((model.state_dict(), torch.get_rng_state(), optimizer.state_dict()["state"]))

    (plain, plain_rng, plain_state), (seen, seen_rng, seen_state) = outcomes
    assert all(torch.equal(plain[name], seen[name]) for name in plain)
    assert torch.equal(plain_rng, seen_rng)
    for key, state in plain_state.items():
        assert all(torch.equal(value, seen_state[key][name]) for name, value in state.items())


def test_record_reads_before_clipping_and_the_step_after() -> None:
    """Both norms are known: before the caller's clipping, and as the optimizer found it."""
    model = mlp(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    guard = gradguard.watch(model, optimizer, every=1, on_error="raise")
    loss = classification_loss(model, digit_batch(16)) * 100
    loss.backward()
    true = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    guard.record(loss=loss)
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()

    assert guard.history.scalar("grad_norm")[-1] == pytest.approx(true, rel=1e-5)
    assert guard.history.scalar("grad_norm_at_step")[-1] == pytest.approx(0.5, rel=1e-4)
    assert guard.history.scalar("read_before_clipping")[-1] == 1.0
    guard.detach()


def test_without_record_the_step_hook_reads_and_says_so() -> None:
    """A loop that only calls optimizer.step() is observed; the norm before clipping is then not known."""
    model = mlp(3)
    optimizer = adam(model)
    with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:
        train(model, optimizer, 5, clip=0.1, record=False)

    assert len(guard.history) == 5
    assert set(guard.history.scalar("read_before_clipping")) == {0.0}
    assert guard.diagnose().summary.clip_known is False


def test_closures_are_read_after_their_first_evaluation() -> None:
    """LBFGS evaluates its closure many times; the observed norm is that of the first evaluation, not a stale one."""
    model, batch = mlp(3, nn.Tanh), digit_batch(64)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=5)
    first: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = classification_loss(model, batch)
        loss.backward()
        norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        calls.append(norm)
        return loss

    with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:
        for _ in range(4):
            calls: list[float] = []
            optimizer.step(closure)
            first.append(calls[0])
            assert len(calls) > 1

    assert guard.history.scalar("grad_norm") == pytest.approx(first, rel=1e-5)
    assert guard.history.layer("calls").max() == 1


@pytest.mark.parametrize("zero_first", [True, False], ids=["zero-grad-before", "zero-grad-after"])
def test_accumulation_counts_optimizer_steps(zero_first: bool) -> None:
    """With gradient accumulation an observation is one optimizer step with the accumulated gradient."""
    model = mlp(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:
        for step in range(3):
            if zero_first:
                optimizer.zero_grad()
            for micro in range(4):
                (classification_loss(model, digit_batch(8, seed=4 * step + micro)) / 4).backward()
                guard.record()
            expected.append(float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))
            optimizer.step()
            if not zero_first:
                optimizer.zero_grad()

    assert guard.history.steps.tolist() == [0, 1, 2]
    assert guard.history.scalar("grad_norm") == pytest.approx(expected, rel=1e-5)
    assert guard.history.layer("calls")[-1].tolist() == [4.0] * 5


def test_two_optimizers_keep_two_histories() -> None:
    """In a GAN each optimizer has its own steps, losses and gradients; stale gradients of the other stay out."""
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 64))
    critic = nn.Sequential(nn.Linear(64, 32), nn.LeakyReLU(), nn.Linear(32, 1))
    model = nn.ModuleDict({"generator": generator, "critic": critic})
    g_opt, c_opt = adam(generator), adam(critic)
    norm = math.nan
    with gradguard.watch(model, [g_opt, c_opt], every=1, on_error="raise") as guard:
        for step in range(6):
            real, noise = digit_batch(16, seed=step)[0], torch.randn(16, 8)
            c_opt.zero_grad()
            loss = F.softplus(critic(generator(noise).detach())).mean() + F.softplus(-critic(real)).mean()
            loss.backward()
            norm = float(nn.utils.get_total_norm([p.grad for p in critic.parameters() if p.grad is not None]))
            guard.record(loss=loss, name="critic")
            c_opt.step()
            g_opt.zero_grad()
            loss = F.softplus(-critic(generator(noise))).mean()
            loss.backward()
            guard.record(loss=loss, name="generator")
            g_opt.step()

    first, second = guard.history.split()
    assert [len(first), len(second)] == [6, 6]
    guard.diagnose()
    assert [info.label for info in guard.history.info.optimizers] == ["generator", "critic"]
    assert second.scalar("grad_norm")[-1] == pytest.approx(norm, rel=1e-5)
    names = first.parameters.names
    row = names.index("critic.0.weight")
    assert math.isnan(first.parameter("grad_norm")[-1][row])
    assert second.parameter("grad_norm")[-1][row] > 0
    assert [len(part.losses[0]) for part in (first, second)] == [6, 6]


def test_without_an_optimizer_steps_are_counted_by_hand() -> None:
    """A hand-written update is followed by guard.step()."""
    model = mlp(3)
    with gradguard.watch(model, every=1, on_error="raise") as guard:
        for step in range(4):
            model.zero_grad()
            loss = classification_loss(model, digit_batch(16, seed=step))
            loss.backward()
            guard.record(loss=loss)
            with torch.no_grad():
                for p in model.parameters():
                    assert p.grad is not None
                    p.sub_(0.1 * p.grad)
            guard.step()

    assert guard.history.steps.tolist() == [0, 1, 2, 3]
    ratio = guard.history.parameter("update_ratio")[-1]
    assert (ratio > 0).all()


def test_counting_by_hand_beside_a_hook_is_an_error() -> None:
    """step() with a watched optimizer would count twice; the message says what to do."""
    model = mlp(2)
    with (
        gradguard.watch(model, adam(model)) as guard,
        pytest.raises(
            UnsupportedModelError, match=r"steps of Adam are already counted by a hook.*gradguard\.watch\(model\)"
        ),
    ):
        guard.step()


def test_reading_too_late_says_so() -> None:
    """record() after zero_grad() gets an explanation, not zeros, and no verdict of health."""
    model = mlp(3)
    with gradguard.watch(model, every=1, on_error="raise") as guard:
        loss = classification_loss(model, digit_batch(8))
        loss.backward()
        model.zero_grad()
        with pytest.warns(GradGuardWarning, match=r"cleared before they could be read: call record\(\) after backward"):
            guard.record(loss=loss)
        guard.step()
        diagnosis = guard.diagnose()

    assert diagnosis.healthy is None
    assert any("cleared before they could be read" in note.why for note in diagnosis.unobserved)


def test_record_before_backward_says_so() -> None:
    """record() before backward() is told apart from record() after zero_grad()."""
    model = mlp(3)
    with gradguard.watch(model, every=1, on_error="raise") as guard:
        loss = classification_loss(model, digit_batch(8))
        with pytest.warns(GradGuardWarning, match="no backward pass was seen since the last step"):
            guard.record(loss=loss)


def test_nothing_observed_is_no_verdict() -> None:
    """An optimizer that never steps gives no verdict, and the reason."""
    model = mlp(3)
    with gradguard.watch(model, adam(model), on_error="raise") as guard:
        for _ in range(5):
            loss = classification_loss(model, digit_batch(8))
            loss.backward()
            guard.record(loss=loss)
        diagnosis = guard.diagnose()

    assert diagnosis.healthy is None
    assert "0 optimizer steps" in diagnosis.verdict
    assert "5 backward passes" in diagnosis.verdict


def test_hooks_come_and_go() -> None:
    """Idle steps keep one optimizer hook, and one on the model; detaching removes all; twice is harmless."""
    model = mlp(4)
    optimizer = adam(model)
    guard = gradguard.watch(model, optimizer, every=100, dense_steps=(0, 3), on_error="raise")
    assert hook_counts(model, optimizer)[0] > 0
    train(model, optimizer, 2, guard=guard)
    assert hook_counts(model, optimizer) == (1, 0, 1)
    train(model, optimizer, 1, guard=guard)
    assert hook_counts(model, optimizer)[0] > 0
    guard.detach()
    guard.detach()

    assert hook_counts(model, optimizer) == (0, 0, 0)
    train(model, optimizer, 2, guard=guard)
    assert guard.steps == 3


def test_an_exception_in_the_model_leaves_no_hook_and_does_not_confuse() -> None:
    """After an exception in forward the run may go on, and the numbers of the next step are right."""
    model = mlp(3)
    optimizer = adam(model)
    with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:
        train(model, optimizer, 2, guard=guard)
        with pytest.raises(RuntimeError):
            model(torch.zeros(2, 63))
        optimizer.zero_grad()
        loss = classification_loss(model, digit_batch(16))
        loss.backward()
        expected = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        guard.record(loss=loss)
        optimizer.step()
        assert guard.history.scalar("grad_norm")[-1] == pytest.approx(expected, rel=1e-5)
        with pytest.raises(ZeroDivisionError):
            raise_in_loop(guard)

    assert hook_counts(model, optimizer) == (0, 0, 0)


def raise_in_loop(guard: Guard) -> None:
    """Leave a training loop by an exception."""
    with guard:
        raise ZeroDivisionError


def test_watching_twice_returns_the_same_guard() -> None:
    """The same model and optimizer give the same guard; another optimizer is an error naming the fix."""
    model = mlp(2)
    optimizer = adam(model)
    guard = gradguard.watch(model, optimizer)
    hooks = hook_counts(model, optimizer)

    assert gradguard.watch(model, optimizer) is guard
    assert hook_counts(model, optimizer) == hooks
    with pytest.raises(UnsupportedModelError, match=r"already watched with Adam.*watch\(model, \[first, second\]\)"):
        gradguard.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    guard.detach()
    other = gradguard.watch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert other is not guard
    other.detach()


def test_a_guard_nobody_holds_lives_as_long_as_the_optimizer() -> None:
    """watch() without keeping the result still observes; everything is freed with the optimizer."""
    model = mlp(2)
    optimizer = adam(model)
    alive = weakref.ref(gradguard.watch(model, optimizer, every=1))
    gc.collect()
    assert alive() is not None
    train(model, optimizer, 2)
    del model, optimizer
    gc.collect()

    assert alive() is None


def test_copies_and_pickles_of_a_watched_model_and_optimizer_are_free() -> None:
    """EMA copies, pickles and copied optimizers neither fail nor feed the original's guard."""
    model = mlp(2)
    optimizer = adam(model)
    with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:
        twin = copy.deepcopy(model)
        pickle.loads(pickle.dumps((model, optimizer)))  # noqa: S301  # our own bytes
        twin_optimizer = copy.deepcopy(optimizer)
        train(twin, twin_optimizer, 2)
        assert guard.steps == 0
        assert len(guard.history) == 0
    assert not [key for key in model.state_dict() if "guard" in key]


def test_frozen_layers_may_thaw() -> None:
    """A layer unfrozen in mid-run is observed from then on."""
    model = mlp(3)
    model[0].requires_grad_(False)
    optimizer = adam(model)
    with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:
        train(model, optimizer, 2, guard=guard)
        model[0].requires_grad_(True)
        train(model, optimizer, 2, guard=guard)

    column = guard.history.parameter("grad_norm")[:, guard.history.parameters.names.index("0.weight")]
    assert [math.isnan(value) for value in column] == [True, True, False, False]


@pytest.mark.parametrize("unscale", [False, True], ids=["implicit", "explicit"])
@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_scaled_gradients_are_reported_unscaled(unscale: bool, fused: bool) -> None:
    """Under a GradScaler every norm is that of the true gradient, wherever it was read."""
    model = mlp(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradguard.watch(model, optimizer, scaler=scaler, every=1, on_error="raise") as guard:
        for step in range(3):
            optimizer.zero_grad()
            batch = digit_batch(16, seed=step)
            twin = copy.deepcopy(model)
            classification_loss(twin, batch).backward()
            expected = float(nn.utils.get_total_norm([p.grad for p in twin.parameters() if p.grad is not None]))
            loss = classification_loss(model, batch)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            guard.record(loss=loss)
            scaler.step(optimizer)
            scaler.update()
            assert guard.history.scalar("grad_norm")[-1] == pytest.approx(expected, rel=1e-4)
            assert guard.history.scalar("grad_norm_at_step")[-1] == pytest.approx(expected, rel=1e-4)

    assert guard.history.layer("delta_norm").max() < 1.0


def test_a_step_skipped_by_the_scaler_is_no_step() -> None:
    """An overflow under the scaler is part of its search for a scale: no record, no finding, no count."""
    model = mlp(3)
    optimizer = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with gradguard.watch(model, optimizer, scaler=scaler, every=1, on_error="raise", on_finding="raise") as guard:
        for step in range(4):
            optimizer.zero_grad()
            loss = classification_loss(model, digit_batch(16, seed=step))
            scaler.scale(loss).backward()
            if step == 1:
                first = next(model.parameters())
                assert first.grad is not None
                first.grad[0, 0] = math.inf
            guard.record(loss=loss)
            scaler.step(optimizer)
            scaler.update()

    assert guard.steps == 3
    assert all(math.isfinite(norm) for norm in guard.history.scalar("grad_norm"))


def test_sick_run_warns_once_and_reports() -> None:
    """A deep sigmoid net is announced once, at once, and named by the diagnosis."""
    model = mlp(20, nn.Sigmoid, init="xavier")
    optimizer = adam(model)
    with gradguard.watch(model, optimizer, on_error="raise") as guard:
        with pytest.warns(GradGuardWarning, match="GG101 vanishing-gradient") as caught:
            train(model, optimizer, 60, guard=guard)
        diagnosis = guard.diagnose()

    assert len([w for w in caught if "GG101" in str(w.message)]) == 1
    assert diagnosis.primary is not None
    assert diagnosis.primary.code == "GG101"
    assert diagnosis.primary.step == 0
    assert diagnosis.healthy is False


def test_an_illness_that_comes_and_goes_is_not_told_each_time() -> None:
    """Twice within ``every`` steps is once; later it is news again."""

    def ill(resolved: int | None) -> Finding:
        return Finding(
            code="GG202",
            name="non-finite-forward",
            family="non_finite",
            severity=Severity.ERROR if resolved is None else Severity.INFO,
            message="",
            step=0,
            last_step=0,
            resolved_step=resolved,
        )

    alerts = Alerts(gradguard.GuardConfig(every=100))
    told = [len(alerts.news([ill(step if step % 10 else None)], step)) for step in (0, 5, 10, 15, 90, 95, 100, 105)]

    assert told == [1, 0, 0, 0, 0, 0, 1, 0]


def test_healthy_run_is_silent() -> None:
    """The same depth with ReLU and He initialisation trains without a word."""
    model = mlp(20, nn.ReLU, init="he")
    optimizer = adam(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with gradguard.watch(model, optimizer, every=10, on_error="raise") as guard:
            train(model, optimizer, 60, guard=guard)

    assert guard.diagnose().healthy is True


def test_a_rescued_run_is_resolved() -> None:
    """Adam rescues a default-initialised 20-layer ReLU net: the alarm of step 0 is cleared, and the run is healthy."""
    model = mlp(20)
    optimizer = adam(model)
    with gradguard.watch(model, optimizer, every=20, on_error="raise", on_finding="silent") as guard:
        for step in range(240):
            optimizer.zero_grad()
            loss = classification_loss(model, digit_batch(128, seed=step))
            loss.backward()
            guard.record(loss=loss)
            optimizer.step()
        diagnosis = guard.diagnose()

    finding = next(f for f in diagnosis.findings if f.code == "GG101")
    assert finding.step == 0
    assert finding.resolved_step is not None
    assert finding.resolved_step <= 160
    assert diagnosis.healthy is True


def test_on_finding_callable_and_raise() -> None:
    """A callable gets the finding; "raise" ends the run with its text."""
    found: list[Finding] = []
    model = mlp(20, nn.Sigmoid, init="xavier")
    with gradguard.watch(model, adam(model), on_finding=found.append) as guard:
        train(model, guard._optimizers[0], 3, guard=guard)
    assert [finding.code for finding in found] == ["GG101"]

    model = mlp(20, nn.Sigmoid, init="xavier")
    with (
        gradguard.watch(model, adam(model), on_finding="raise") as guard,
        pytest.raises(UnhealthyGradientsError, match="GG101 vanishing-gradient"),
    ):
        train(model, guard._optimizers[0], 3, guard=guard)


def test_our_own_failure_warns_once_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in gradguard switches it off with one warning; the user's loop never sees it."""
    model = mlp(3)
    optimizer = adam(model)
    guard = gradguard.watch(model, optimizer, every=1)
    monkeypatch.setattr(guard._observing.gradients, "read", lambda *_, **__: 1 / 0)
    with pytest.warns(GradGuardWarning, match="ZeroDivisionError.*switched itself off; training goes on") as caught:
        train(model, optimizer, 3, guard=guard)

    assert len(caught) == 1
    assert hook_counts(model, optimizer) == (0, 0, 0)
    assert any("switched itself off" in note.why for note in guard.diagnose().unobserved)


def test_a_failing_tap_switches_only_the_signals_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a forward hook of ours fails, parameters are observed further."""
    model = mlp(3)
    optimizer = adam(model)
    guard = gradguard.watch(model, optimizer, every=1)
    monkeypatch.setattr(guard._observing.signals, "_tap", lambda *_, **__: 1 / 0)
    with pytest.warns(GradGuardWarning, match="Layer signals are no longer observed; training goes on") as caught:
        train(model, optimizer, 3, guard=guard)

    assert len(caught) == 1
    assert len(guard.history) == 3
    assert guard.attached
    guard.detach()


class Scripted:
    """Stands for an optimizer that is none."""

    def step(self) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (lambda: (nn.ReLU(), None), UnsupportedModelError, r"ReLU has no trainable parameter \(0 in all"),
        (lambda: (nn.Linear(2, 2).requires_grad_(False), None), UnsupportedModelError, "unfreeze a layer first"),
        (lambda: ("model", None), TypeError, r"model must be a torch\.nn\.Module, got str"),
        (lambda: (nn.Linear(2, 2), Scripted()), TypeError, r"got Scripted\. .*call guard\.step\(\) after each update"),
        (
            lambda: (nn.Linear(2, 2), adam(nn.Linear(2, 2))),
            UnsupportedModelError,
            "none of them belongs to this Linear",
        ),
    ],
    ids=["no-parameters", "all-frozen", "no-module", "no-optimizer", "foreign-optimizer"],
)
def test_bad_arguments_get_a_clear_error(arguments: Callable[[], Any], error: type[Exception], text: str) -> None:
    """Each message says what came, what is accepted, and what to do."""
    model, optimizer = arguments()
    with pytest.raises(error, match=text):
        gradguard.watch(model, optimizer)


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"evry": 3}, TypeError, "no option 'evry'. Did you mean 'every'"),
        ({"every": 0}, ValueError, "every must be at least 1 optimizer steps, got 0"),
        ({"every": 2.5}, TypeError, "every must be a whole number of optimizer steps, got 2.5"),
        ({"on_finding": "shout"}, ValueError, "on_finding must be one of 'warn', 'raise', 'silent' or a callable"),
        ({"select": "GG999"}, ValueError, "GG999"),
    ],
)
def test_bad_options_get_a_clear_error(options: dict[str, Any], error: type[Exception], text: str) -> None:
    """Unknown options and values out of range are named with what is accepted."""
    with pytest.raises(error, match=text):
        gradguard.watch(nn.Linear(2, 2), **options)


@pytest.mark.parametrize(
    ("loss", "error", "text"), [(torch.zeros(3), ValueError, r"\(3,\).*loss\.mean\(\)"), ("1", TypeError, "str")]
)
def test_bad_losses_get_a_clear_error(loss: Any, error: type[Exception], text: str) -> None:
    """A loss that is no scalar is refused with its shape and the fix."""
    with gradguard.watch(nn.Linear(2, 2)) as guard, pytest.raises(error, match=text):
        guard.record(loss=loss)


def test_compiled_model_that_ran_is_watched_through_its_parameters() -> None:
    """Hooks on compiled code are ignored by torch; the guard reads parameters and says what it cannot see."""
    model = torch.compile(mlp(3), backend="eager")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # type: ignore[attr-defined]  # typed as a callable
    train(model, optimizer, 2)  # type: ignore[arg-type]  # as above
    with gradguard.watch(model, optimizer, every=1, on_error="raise") as guard:  # type: ignore[arg-type]  # as above
        train(model, optimizer, 4, guard=guard)  # type: ignore[arg-type]  # as above
        diagnosis = guard.diagnose()

    assert guard.history.parameters.names[0] == "0.weight"
    assert guard.history.scalar("grad_norm").min() > 0
    assert any("compiled" in note.why for note in diagnosis.unobserved)


def test_compiling_a_watched_model_breaks_no_graph() -> None:
    """With a guard attached first, the compiled model is still one graph."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = mlp(3)
    optimizer = adam(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with gradguard.watch(model, optimizer, every=2, dense_steps=(), on_error="raise") as guard:
        for step in range(6):
            optimizer.zero_grad()
            x, y = digit_batch(16, seed=step)
            F.cross_entropy(compiled(x), y).backward()
            guard.record()
            optimizer.step()

    assert not torch._dynamo.utils.counters["graph_break"]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize(("loss", "classes"), [("class", 10), ("value", 0)])
def test_classes_are_known_where_the_loss_is_a_cross_entropy(loss: str, classes: int) -> None:
    """The chance level ln(classes) is only looked for where the loss is one over classes."""
    model = mlp(3)
    with gradguard.watch(model, adam(model), every=1, on_error="raise") as guard:
        for step in range(2):
            x, y = digit_batch(16, seed=step)
            out = model(x)
            value = F.cross_entropy(out, y) * 2 if loss == "class" else out.square().mean()
            value.backward()
            guard.record(loss=value)
            guard._optimizers[0].step()
        guard.diagnose()

    assert guard.history.info.classes == classes


def test_idle_guard_leaves_the_fast_inference_path_open() -> None:
    """Between observations no hook sits on an encoder layer, which would leave its fast path in evaluation."""
    model = TransformerClassifier(2)
    optimizer = adam(model)
    with gradguard.watch(model, optimizer, every=100, dense_steps=(), on_error="raise") as guard:
        train(model, optimizer, 2, guard=guard)
        assert len(guard.history) == 1
        assert count_hooks(model.encoder) == 0


def test_a_failure_in_the_middle_of_a_step_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """A guard that switches itself off while a step ends does not set its hooks again."""
    model = mlp(3)
    optimizer = adam(model)
    guard = gradguard.watch(model, optimizer, every=1)
    monkeypatch.setattr(guard._observing, "finish", lambda *_, **__: 1 / 0)
    with pytest.warns(GradGuardWarning, match="switched itself off"):
        train(model, optimizer, 3, guard=guard)

    assert hook_counts(model, optimizer) == (0, 0, 0)


class Transfers(TorchDispatchMode):
    """Counts operations that bring one number to the host, which on a GPU stops the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += "_local_scalar_dense" in str(func)
        return func(*args, **(kwargs or {}))


def test_an_observed_step_reads_nothing_number_by_number() -> None:
    """Hooks and reading points queue; one transfer fetches them all. What is left is the loss, free on a CPU."""
    counts = []
    for watched in (False, True):
        torch.manual_seed(0)
        model = ConvNet(2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        guard = gradguard.watch(model, optimizer, every=1, on_error="raise") if watched else None
        with Transfers() as transfers:
            train(model, optimizer, 3, guard=guard)
        counts.append(transfers.count)
        if guard is not None:
            assert len(guard.history) == 3
            guard.detach()

    assert counts[1] - counts[0] == 3


def test_idle_guard_counts_without_reading() -> None:
    """Between observations nothing is read, and losses are kept for every step."""
    model = mlp(3)
    optimizer = adam(model)
    with gradguard.watch(model, optimizer, every=50, dense_steps=(), on_error="raise") as guard:
        losses = train(model, optimizer, 60, guard=guard)

    assert guard.history.steps.tolist() == [0, 50]
    assert guard.history.losses[1] == pytest.approx(losses)
    assert 0 < guard.overhead < 1
