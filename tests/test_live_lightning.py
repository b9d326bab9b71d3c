"""Remedies of the Lightning callback: in place before the Trainer clips, once, and taken over by a resumed run."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gradguard
from gradguard import clip
from tests.models import digit_batch, mlp
from tests.test_lightning import NAMESPACES, PL, loader, module, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:gradguard. . of . gradients:gradguard.GradGuardWarning"),
]

QUIET: dict[str, Any] = {"on_finding": "silent", "report": False, "on_error": "raise"}
ALL: dict[str, Any] = {"clip": "adaptive", "on_spike": "skip", "lr_backoff": True, **QUIET}


def batches(count: int, spikes: dict[int, float]) -> DataLoader[Any]:
    """Return batches of digits, some of them far too large."""
    made = []
    for step in range(count):
        x, y = digit_batch(32, seed=step)
        made.append((x * spikes.get(step, 1.0), y))
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]  # a list of batches


def net(seed: int = 0) -> nn.Sequential:
    """Return a small healthy net, always the same."""
    torch.manual_seed(seed)
    return mlp(3, init="he", width=32)


def weights(fitted: Any) -> list[torch.Tensor]:
    """Return copies of a module's parameters."""
    return [p.detach().clone() for p in fitted.parameters()]


def same(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    """Whether two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("pl", NAMESPACES.values(), ids=NAMESPACES)
def test_spike_is_skipped_and_reported(pl: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In either Trainer the bad batch leaves the weights alone, and the report says so."""
    seen: list[list[torch.Tensor]] = []

    class Keeper(pl.Callback):  # type: ignore[misc]  # either namespace
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            seen.append(weights(pl_module))

    callback = gradguard.GradGuardCallback(on_spike="skip", on_finding="silent", on_error="raise")
    trainer(tmp_path, callback, Keeper(), pl=pl).fit(module(net(), pl=pl), batches(45, {40: 1000.0}))

    assert same(seen[39], seen[40])
    assert not same(seen[40], seen[41])
    assert callback.guard is not None
    assert [(act.step, act.kind) for act in callback.guard.actions] == [(40, "skip")]
    assert "skipped 1 of 45 steps (2 %) as spikes, last at step 40" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("seed", range(3))
def test_healthy_fit_is_bit_identical_with_everything_on(seed: int, tmp_path: Path) -> None:
    """A run in which nothing has to be done is that without the callback."""
    results = []
    for callbacks in ([gradguard.GradGuardCallback(**ALL)], []):
        fitted = module(net(seed))
        trainer(tmp_path, *callbacks).fit(fitted, batches(60, {}))
        results.append(weights(fitted))
        if callbacks:
            assert callbacks[0].diagnosis.actions[0].steps == 60
            assert callbacks[0].guard.actions == ()
    assert same(*results)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_clipping_of_the_callback_is_that_of_the_trainer(accumulate: int, tmp_path: Path) -> None:
    """``clip=`` gives what ``gradient_clip_val`` gives, with accumulation too."""
    results = []
    for own in (True, False):
        callback = gradguard.GradGuardCallback(**QUIET, clip=partial(clip.Norm, max_norm=0.3) if own else None)
        fitted = module(net(), make_optimizer=lambda m: torch.optim.SGD(m.parameters(), lr=0.1))
        options = {} if own else {"gradient_clip_val": 0.3}
        trainer(tmp_path, callback, accumulate_grad_batches=accumulate, **options).fit(fitted, batches(12, {}))
        results.append(weights(fitted))
        if own:
            assert callback.diagnosis is not None
            assert callback.diagnosis.actions[0].clipped == callback.diagnosis.actions[0].steps == 12 // accumulate
    assert same(*results)


@pytest.mark.parametrize("value", [0.5, 1])
def test_two_who_clip_are_refused_before_the_first_step(value: float, tmp_path: Path) -> None:
    """The error names both; weights are as they were."""
    fitted = module(net())
    with pytest.raises(gradguard.GradGuardError, match=r"gradient_clip_val=.*clip=.*twice"):
        trainer(tmp_path, gradguard.GradGuardCallback(**ALL), gradient_clip_val=value).fit(fitted, batches(3, {}))

    assert same(weights(fitted), weights(module(net())))


def test_trainer_that_clips_at_nothing_is_accepted(tmp_path: Path) -> None:
    """``gradient_clip_val=0`` is Lightning's word for no clipping."""
    callback = gradguard.GradGuardCallback(**ALL)
    trainer(tmp_path, callback, gradient_clip_val=0).fit(module(net()), batches(3, {}))

    assert callback.diagnosis is not None
    assert callback.diagnosis.actions[0].steps == 3


def test_clipping_of_the_module_is_warned_of(tmp_path: Path) -> None:
    """An own configure_gradient_clipping may clip or not: that cannot be seen, so it is said; others hear nothing."""
    fitted = module(net())

    class Own(type(fitted)):  # type: ignore[misc]  # a class made in a function
        def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
            pass

    fitted.__class__ = Own
    with pytest.warns(gradguard.GradGuardWarning, match="configure_gradient_clipping.*twice"):
        trainer(tmp_path, gradguard.GradGuardCallback(**ALL)).fit(fitted, batches(2, {}))
    trainer(tmp_path, gradguard.GradGuardCallback(on_spike="skip", **QUIET)).fit(fitted, batches(2, {}))


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_spike_is_seen_although_the_trainer_clips(precision: str, tmp_path: Path) -> None:
    """The callback acts before the Trainer's clipping, which would hide the spike; with a loss scaler as well."""
    callback = gradguard.GradGuardCallback(on_spike="skip", **QUIET)
    options: dict[str, Any] = {"gradient_clip_val": 0.5}
    if precision == "16-mixed":
        options["plugins"] = [
            PL.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=16.0))
        ]
    trainer(tmp_path, callback, **options).fit(module(net()), batches(45, {40: 300.0}))

    assert callback.guard is not None
    assert [(act.step, act.kind) for act in callback.guard.actions] == [(40, "skip")]
    assert callback.diagnosis is not None
    assert callback.diagnosis.actions[0].remarks == ()


def test_overflow_is_left_to_the_scaler(tmp_path: Path) -> None:
    """A step whose gradients overflow is skipped by the scaler, and is no act of ours."""
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    callback = gradguard.GradGuardCallback(**ALL)
    plugin = PL.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer(tmp_path, callback, plugins=[plugin]).fit(module(net()), batches(8, {5: math.inf}))

    assert callback.guard is not None
    assert callback.guard.actions == ()
    assert scaler.get_scale() == 8.0


class Gan(PL.LightningModule):  # type: ignore[misc]  # untyped
    """Two networks, optimized by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.g, self.d = net(1), net(2)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer, part in zip(self.optimizers(), (self.g, self.d), strict=True):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            factor = 1000.0 if (batch_idx == 40 and part is self.d) else 1.0
            self.manual_backward(F.cross_entropy(part(batch[0]), batch[1]) * factor)
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in (self.g, self.d)]


def test_manual_optimization_with_two_optimizers(tmp_path: Path) -> None:
    """Each optimizer is judged by its own norms, and acted on once a step."""
    callback = gradguard.GradGuardCallback(**{**ALL, "lr_backoff": None})
    trainer(tmp_path, callback).fit(Gan(), batches(45, {}))

    assert callback.guard is not None
    assert [(act.step, act.optimizer, act.kind) for act in callback.guard.actions] == [(40, "Adam 1", "skip")]
    assert callback.diagnosis is not None
    assert [done.steps for done in callback.diagnosis.actions] == [45, 45]


def test_lbfgs_is_acted_on_in_each_evaluation(tmp_path: Path) -> None:
    """Clipping follows every evaluation of the closure, as the Trainer's does."""
    results = []
    for own in (True, False):
        callback = gradguard.GradGuardCallback(**QUIET, clip=partial(clip.Norm, max_norm=0.3) if own else None)
        fitted = module(net(), make_optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=0.05, max_iter=3))
        trainer(tmp_path, callback, **({} if own else {"gradient_clip_val": 0.3})).fit(fitted, batches(4, {}))
        results.append(weights(fitted))
    assert same(*results)


def test_backoff_leaves_the_schedule_alone(tmp_path: Path) -> None:
    """The rates that Lightning's scheduler makes are those of a run without the remedy."""
    rates = []
    for options in ({**QUIET, "lr_backoff": True}, QUIET):
        seen: list[float] = []

        class Watch(PL.Callback):  # type: ignore[misc]  # untyped
            def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any, seen: Any = seen) -> None:
                seen.append(trainer.optimizers[0].param_groups[0]["lr"])

        def configure(m: Any) -> Any:
            optimizer = torch.optim.SGD(m.parameters(), lr=0.5, momentum=0.9)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

        torch.manual_seed(0)
        callback = gradguard.GradGuardCallback(**options)
        fitted = module(mlp(6, nn.Tanh, init="xavier"), make_optimizer=configure)
        trainer(tmp_path, callback, Watch()).fit(fitted, batches(60, {}))
        rates.append(seen)
        assert callback.guard is not None
        assert [act.kind for act in callback.guard.actions] == (["lr"] if "lr_backoff" in options else [])
    assert rates[0] == rates[1]


@pytest.mark.filterwarnings("ignore:.*Checkpoint directory")
def test_resumed_fit_goes_on_where_the_other_stopped(tmp_path: Path) -> None:
    """Weights and record of a fit in two parts are those of one fit: the history came along in the checkpoint."""

    def fit(epochs: int, checkpoint: str | None) -> tuple[list[torch.Tensor], Any, Any]:
        callback = gradguard.GradGuardCallback(**{**ALL, "lr_backoff": None})
        fitted = module(net())
        runner = trainer(tmp_path, callback, max_epochs=epochs)
        runner.fit(fitted, batches(22, {21: 1000.0}), ckpt_path=checkpoint)
        assert callback.guard is not None
        return weights(fitted), callback.guard.actions, runner

    _, first, runner = fit(1, None)
    path = tmp_path / "half.ckpt"
    runner.save_checkpoint(path)
    resumed, acts, _ = fit(2, str(path))
    through, expected, _ = fit(2, None)

    assert [(act.step, act.kind) for act in first] == [(21, "clip")]  # 21 norms are no history for a spike yet
    assert [(act.step, act.kind) for act in acts] == [(21, "clip"), (43, "skip")]
    assert acts == expected
    assert same(resumed, through)


def test_state_of_other_remedies_is_left_out_with_a_warning(tmp_path: Path) -> None:
    """A run that clips otherwise than its checkpoint begins anew, and trains."""
    callback = gradguard.GradGuardCallback(clip=clip.AGC, on_finding="silent", report=False)
    other = gradguard.GradGuardCallback(**{**ALL, "lr_backoff": None})
    trainer(tmp_path, other).fit(module(net()), batches(3, {}))
    callback.load_state_dict(copy.deepcopy(other.state_dict()))
    with pytest.warns(gradguard.GradGuardWarning, match="restoring the remedies failed.*Adaptive"):
        trainer(tmp_path, callback).fit(module(net()), batches(3, {}))

    assert callback.diagnosis is not None
    assert callback.diagnosis.actions[0].steps >= 3


def test_options_survive_copies_and_bad_ones_are_refused() -> None:
    """Spawned processes get the options; a wrong one fails when the callback is made."""
    callback = pickle.loads(pickle.dumps(gradguard.GradGuardCallback(clip=clip.AGC, on_spike="skip")))  # noqa: S301  # ours

    assert (callback.remedies.clip, callback.remedies.on_spike) == (clip.AGC, "skip")
    with pytest.raises(ValueError, match="on_spike"):
        gradguard.GradGuardCallback(on_spike="drop")  # type: ignore[arg-type]  # on purpose


def test_strategy_with_parts_of_gradients_is_refused(tmp_path: Path) -> None:
    """Where each process holds a part, the error says what to use instead."""
    runner = trainer(tmp_path, gradguard.GradGuardCallback(**ALL))

    class DeepSpeedStrategy(type(runner.strategy)):  # type: ignore[misc]  # stands for the real one
        pass

    runner.strategy.__class__ = DeepSpeedStrategy
    with pytest.raises(gradguard.GradGuardError, match=r"DeepSpeedStrategy.*gradient_clip_val"):
        runner.fit(module(net()), loader(2))


def test_without_remedies_no_hook_is_added(tmp_path: Path) -> None:
    """Off by default: the optimizer has the one hook that counts, and the state holds no word of remedies."""
    counts: list[tuple[int, int]] = []

    class Count(PL.Callback):  # type: ignore[misc]  # untyped
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            optimizer = trainer.optimizers[0]
            counts.append((len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)))

    callback = gradguard.GradGuardCallback(**QUIET, every=100, dense_steps=())
    with warnings.catch_warnings():
        warnings.simplefilter("error", gradguard.GradGuardWarning)
        trainer(tmp_path, callback, Count()).fit(module(net()), batches(3, {}))

    assert counts[-1] == (0, 1)
    assert "remedies" not in callback.state_dict()
    assert callback.diagnosis is not None
    assert callback.diagnosis.actions == ()
