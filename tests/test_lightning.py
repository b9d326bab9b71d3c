"""The Lightning callback: true numbers, one verdict, and no trace, in both Trainers."""

from __future__ import annotations

import copy
import csv
import importlib
import math
import pickle
import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import gradguard
from gradguard.integrations import lightning as integration
from tests.models import digits, mlp

pytestmark = [
    # Lightning 2.6 with torch 2.13, and its advice for data larger than ours.
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*ddp_spawn:UserWarning"),
]

PL: Any = lightning.pytorch
NAMESPACES = {"lightning.pytorch": lightning.pytorch, "pytorch_lightning": pytorch_lightning}


def sick_net() -> nn.Sequential:
    """Return a net whose gradient vanishes."""
    return mlp(12, nn.Sigmoid, init="xavier", width=32)


def healthy_net() -> nn.Sequential:
    """Return its healthy twin."""
    return mlp(12, nn.ReLU, init="he", width=32)


def loader(batches: int = 6, size: int = 32) -> DataLoader[Any]:
    """Return batches of digits, always the same."""
    x, y = digits()
    return DataLoader([(x[i : i + size], y[i : i + size]) for i in range(0, batches * size, size)], batch_size=None)  # type: ignore[arg-type]


def module(
    net: nn.Module,
    *,
    pl: Any = PL,
    make_optimizer: Callable[[Any], Any] | None = None,
    validates: bool = False,
    before_step: Callable[[int], object] = lambda batch_idx: None,
) -> Any:
    """Return a LightningModule of either namespace that classifies digits."""

    class Classifier(pl.LightningModule):  # type: ignore[misc]  # either namespace
        def __init__(self) -> None:
            super().__init__()
            self.net = net
            self.lr = 1e-3
            self.norms: list[float] = []

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if before_step(batch_idx) == "skip":
                return None
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def on_before_optimizer_step(self, optimizer: Any) -> None:
            grads = [p.grad for p in self.parameters() if p.grad is not None]
            if grads:
                self.norms.append(float(nn.utils.get_total_norm(grads)))

        def configure_optimizers(self) -> Any:
            return (make_optimizer or (lambda m: torch.optim.Adam(m.parameters(), lr=m.lr)))(self)

    class Validated(Classifier):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    return Validated() if validates else Classifier()


def trainer(folder: Path, *callbacks: Any, pl: Any = PL, **options: Any) -> Any:
    """Return a quiet Trainer of either namespace, one epoch long."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1000,
    }
    return pl.Trainer(default_root_dir=folder, callbacks=list(callbacks), **{**defaults, **options})


def callback(**options: Any) -> Any:
    """Return a callback that hides no failure of ours."""
    return gradguard.GradGuardCallback(**{"on_error": "raise", "every": 1, **options})


def hooks_on(model: nn.Module) -> int:
    """Count the hooks on a module and everything inside it."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def hooks_of(run: Any) -> int:
    """Count the step hooks on a Trainer's optimizers."""
    return sum(len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in run.strategy.optimizers)


def rows(folder: Path) -> list[dict[str, str]]:
    """Return the rows of the only CSV log in a folder."""
    (path,) = folder.rglob("metrics.csv")
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------------- namespaces


@pytest.mark.parametrize("pl", NAMESPACES.values(), ids=NAMESPACES)
@pytest.mark.parametrize("base", [*([name] for name in NAMESPACES), list(NAMESPACES)], ids=["new", "old", "both"])
def test_callback_of_either_namespace_works_in_either_trainer(pl: Any, base: list[str], tmp_path: Path) -> None:
    """Whatever its bases, the callback finds the vanishing gradient in both Trainers, and nothing in the twin."""
    cls: Any = integration._make_class(base)
    for net, expected in ((sick_net(), "GG101"), (healthy_net(), None)):
        guard = cls(on_error="raise", every=1, report=False, on_finding="silent")
        trainer(tmp_path, guard, pl=pl).fit(module(net, pl=pl), loader())

        assert (guard.diagnosis.primary.code if guard.diagnosis.primary else None) == expected
        assert guard.diagnosis.healthy is (expected is None)


def test_class_inherits_from_every_lightning_that_is_imported() -> None:
    """Both namespaces are imported here, so the callback is a Callback of both."""
    assert issubclass(gradguard.GradGuardCallback, (lightning.pytorch.Callback))
    assert issubclass(gradguard.GradGuardCallback, (pytorch_lightning.Callback))


@pytest.mark.parametrize("name", NAMESPACES)
def test_the_other_namespace_is_not_imported(name: str) -> None:
    """Neither importing gradguard nor its callback brings in a Lightning that the user does not use."""
    code = f"""
        import sys, gradguard, gradguard.integrations.lightning
        assert not {{"lightning", "pytorch_lightning"}} & set(sys.modules)
        import {name}
        import pickle
        made = gradguard.GradGuardCallback(every=7)
        assert isinstance(made, sys.modules[{name!r}].Callback)
        assert pickle.loads(pickle.dumps(made)).config.every == 7
        print([other for other in {list(NAMESPACES)} if other in sys.modules])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"[{name!r}]"


def test_without_lightning_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no Lightning is installed, making a callback says what to install; looking at the name does no harm."""
    real = importlib.import_module

    def absent(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] in ("lightning", "pytorch_lightning"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name.partition(".")[0])
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", absent)
    for name in NAMESPACES:
        monkeypatch.delitem(sys.modules, name)

    monkeypatch.delitem(integration.__dict__, "GradGuardCallback", raising=False)
    stand_in = integration.GradGuardCallback

    assert stand_in is integration.GradGuardCallback
    assert stand_in.__name__ == "GradGuardCallback"
    with pytest.raises(gradguard.MissingExtraError, match=r"pip install 'gradguard\[lightning\]'"):
        stand_in(every=3)
    monkeypatch.undo()
    assert stand_in(every=3).config.every == 3  # installed in the meantime


def test_unknown_name_in_the_module_is_an_attribute_error() -> None:
    """Only the class is made on demand."""
    with pytest.raises(AttributeError, match="has no attribute 'GradGuardCalback'"):
        integration.GradGuardCalback  # type: ignore[attr-defined]  # noqa: B018  # the access itself is the test


# -------------------------------------------------------------------------------------------------------------- options


def test_unknown_option_names_the_closest_one() -> None:
    """Options of the configuration are checked when the callback is made."""
    with pytest.raises(TypeError, match=r"has no option 'evry'\. Did you mean 'every'"):
        gradguard.GradGuardCallback(evry=3)
    with pytest.raises(ValueError, match="every must be at least 1 optimizer steps, got 0"):
        gradguard.GradGuardCallback(every=0)
    with pytest.raises(ValueError, match="on_finding must be one of 'warn', 'stop', 'raise', 'silent' or a callable"):
        gradguard.GradGuardCallback(on_finding="halt")  # type: ignore[arg-type]  # on purpose


def test_copies_have_the_options_and_nothing_of_the_run(tmp_path: Path) -> None:
    """A callback can be pickled and copied; a copy keeps the options, and nothing of the run: no hook, no model."""
    made: Any = callback(every=3, on_finding="silent", report=False)
    assert type(pickle.loads(pickle.dumps(made))) is gradguard.GradGuardCallback  # noqa: S301  # our own bytes
    assert copy.deepcopy(made).config == made.config

    trainer(tmp_path, made).fit(module(sick_net()), loader())
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):  # noqa: S301  # our own bytes
        assert (twin.guard, twin.diagnosis) == (None, None)
        trainer(tmp_path, twin).fit(module(sick_net()), loader())
        assert twin.guard.history.steps.tolist() == [0.0, 1.0, 2.0, 3.0, 5.0]
        assert twin.diagnosis.primary.code == "GG101"
    assert made.diagnosis.primary.code == "GG101"


# -------------------------------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize("clip", [None, 1e-3], ids=["no clipping", "clipping"])
def test_norm_is_read_before_clipping_and_again_at_the_step(clip: float | None, tmp_path: Path) -> None:
    """``grad_norm`` is what backward left, ``grad_norm_at_step`` what the Trainer's clipping made of it."""
    made, model = callback(report=False), module(healthy_net())
    trainer(tmp_path, made, gradient_clip_val=clip).fit(model, loader())

    history = made.guard.history
    assert history.scalar("grad_norm").tolist() == pytest.approx(model.norms, rel=1e-5)
    assert history.scalar("read_before_clipping").tolist() == [1.0] * 6
    at_step = model.norms if clip is None else [clip] * 6
    assert history.scalar("grad_norm_at_step").tolist() == pytest.approx(at_step, rel=1e-3)
    assert made.diagnosis.summary.clip_known


def test_accumulated_gradient_and_mean_loss_are_those_of_the_large_batch(tmp_path: Path) -> None:
    """With accumulation a step is observed once, and its loss is the mean of its batches, undivided."""
    seen = []
    for accumulate, data in ((3, loader(6, 32)), (1, loader(2, 96))):
        torch.manual_seed(0)
        made = callback(report=False)
        trainer(tmp_path, made, accumulate_grad_batches=accumulate).fit(module(healthy_net()), data)
        history = made.guard.history
        seen.append((history.steps.tolist(), history.scalar("grad_norm").tolist(), history.losses[1].tolist()))

    assert seen[0][0] == seen[1][0] == [0.0, 1.0]
    assert seen[0][1] == pytest.approx(seen[1][1], rel=1e-4)
    assert seen[0][2] == pytest.approx(seen[1][2], rel=1e-5)


def test_last_window_of_accumulation_may_be_short(tmp_path: Path) -> None:
    """Where fewer batches are left than are accumulated, the loss is still their mean."""
    made = callback(report=False)
    trainer(tmp_path, made, accumulate_grad_batches=4).fit(module(healthy_net()), loader(5))

    assert made.guard.history.losses[1].tolist() == pytest.approx([math.log(10)] * 2, abs=1.5)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_loss_scaler_leaves_numbers_as_they_are(fused: bool, tmp_path: Path) -> None:
    """Under a GradScaler norms and losses are those of the unscaled run; a fused optimizer gets scaled gradients."""
    seen = []
    for scaled in (False, True):
        torch.manual_seed(0)
        made = callback(report=False)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        precision = PL.plugins.MixedPrecision("16-mixed", "cpu", scaler) if scaled else PL.plugins.Precision()
        model = module(mlp(3, nn.Tanh), make_optimizer=lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, fused=fused))
        trainer(tmp_path, made, plugins=[precision]).fit(model, loader())
        seen.append(made.guard.history)

    assert seen[1].scalar("loss_scale").tolist() == [128.0] * 6
    assert seen[1].scalar("grad_norm_at_step").tolist() == pytest.approx(seen[1].scalar("grad_norm").tolist(), rel=1e-3)
    assert seen[1].steps.tolist() == seen[0].steps.tolist()
    assert seen[1].scalar("grad_norm").tolist() == pytest.approx(seen[0].scalar("grad_norm").tolist(), rel=0.05)
    assert seen[1].losses[1].tolist() == pytest.approx(seen[0].losses[1].tolist(), rel=0.02)


def test_bf16_mixed_is_observed(tmp_path: Path) -> None:
    """In mixed bfloat16 the verdicts are those of single precision."""
    made = callback(report=False, on_finding="silent")
    trainer(tmp_path, made, precision="bf16-mixed").fit(module(sick_net()), loader())

    assert made.diagnosis.primary.code == "GG101"
    assert math.isfinite(made.diagnosis.summary.grad_norm_median)


def test_closure_of_lbfgs_is_read_once_a_step(tmp_path: Path) -> None:
    """LBFGS evaluates its closure several times; the first evaluation is the observation."""
    made = callback(report=False)
    model = module(
        mlp(3, nn.Tanh),
        make_optimizer=lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=4),
    )
    trainer(tmp_path, made).fit(model, loader(3))

    assert len(model.norms) > 3
    first = [model.norms[i] for i in range(0, len(model.norms), len(model.norms) // 3)]
    assert made.guard.steps == 3
    assert len(made.guard.history.losses[1]) == 3
    assert made.guard.history.scalar("grad_norm").tolist() == pytest.approx(first, rel=1e-5)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None")
def test_batch_without_a_loss_is_passed_over(tmp_path: Path) -> None:
    """``training_step`` may return None: no gradient was due, so none is reported missing."""
    made = callback(report=False)
    model = module(healthy_net(), before_step=lambda i: "skip" if i == 2 else None)
    trainer(tmp_path, made).fit(model, loader())

    assert made.guard.history.steps.tolist() == [0.0, 1.0, 3.0, 4.0, 5.0]
    assert made.diagnosis.unobserved == ()


# --------------------------------------------------------------------------------------------------- several optimizers


class Gan(lightning.pytorch.LightningModule):
    """Two optimizers by hand, toggled: a generator that vanishes if wanted, and a discriminator."""

    def __init__(self, *, sick: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        stack: Any = [m for _ in range(10) for m in (nn.Linear(16, 16), nn.Sigmoid() if sick else nn.LeakyReLU())]
        if not sick:
            stack = [m for _ in range(2) for m in (nn.Linear(16, 16), nn.LeakyReLU())]
        self.generator = nn.Sequential(*stack, nn.Linear(16, 64))
        self.discriminator = nn.Sequential(nn.Linear(64, 16), nn.LeakyReLU(), nn.Linear(16, 1))
        self.norms: dict[str, list[float]] = {"d": [], "g": []}

    def training_step(self, batch: Any, batch_idx: int) -> None:
        d_opt, g_opt = cast("list[Any]", self.optimizers())
        noise = torch.randn(32, 16)
        for name, optimizer in (("d", d_opt), ("g", g_opt)):
            self.toggle_optimizer(optimizer)
            fake = self.discriminator(self.generator(noise))
            ones, zeros = torch.ones_like(fake), torch.zeros_like(fake)
            loss = F.binary_cross_entropy_with_logits(fake, zeros if name == "d" else ones)
            if name == "d":
                loss = loss + F.binary_cross_entropy_with_logits(self.discriminator(batch[0]), ones)
            optimizer.zero_grad()
            self.manual_backward(loss)
            net = self.discriminator if name == "d" else self.generator
            self.norms[name].append(float(nn.utils.get_total_norm([p.grad for p in net.parameters()])))  # type: ignore[misc]
            optimizer.step()
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(net.parameters(), lr=1e-3) for net in (self.discriminator, self.generator)]


@pytest.mark.parametrize("sick", [True, False], ids=["sick", "healthy"])
def test_gan_is_observed_by_optimizer(sick: bool, tmp_path: Path) -> None:
    """Manual optimisation with two toggled optimizers: each has its own norms, steps and losses."""
    made, model = callback(report=False, on_finding="silent"), Gan(sick=sick)
    logger = PL.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, made, logger=logger, log_every_n_steps=2).fit(model, loader())

    for name, part in zip("dg", made.guard.history.split(), strict=True):
        assert part.scalar("grad_norm").tolist() == pytest.approx(model.norms[name], rel=1e-5)
        assert len(part.losses[0]) == 6
    codes = [f.code for f in made.diagnosis.findings if f.severity >= gradguard.Severity.WARNING]
    assert codes[:1] == (["GG101"] if sick else [])
    assert [float(row["gradguard/grad_norm_1"]) for row in rows(tmp_path)] == pytest.approx(
        model.norms["g"][1::2], rel=1e-4
    )


# ------------------------------------------------------------------------------------------------------------ lifecycle


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt])
def test_failed_fit_reports_so_far_and_leaves_no_hook(
    kind: type[BaseException], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An exception in ``training_step`` and an interrupt by the user: hooks are gone, the report is printed."""

    def fail(batch_idx: int) -> None:
        if batch_idx == 4:
            raise kind("broken on purpose")

    made, model = callback(), module(sick_net(), before_step=fail)
    run = trainer(tmp_path, made)
    ends = pytest.raises(SystemExit) if kind is KeyboardInterrupt else pytest.raises(kind, match="broken on purpose")
    with ends:
        run.fit(model, loader())

    assert made.diagnosis.primary.code == "GG101"
    assert made.diagnosis.summary.steps == 4
    assert "gradguard explain GG101" in capsys.readouterr().out
    assert hooks_on(model) == hooks_of(run) == 0
    assert not made.guard.attached


def test_failure_after_a_fit_repeats_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A test run that fails later is none of our business."""
    made, model = callback(), module(sick_net())
    run = trainer(tmp_path, made)
    run.fit(model, loader())
    verdict = made.diagnosis
    capsys.readouterr()
    model.test_step = lambda batch, batch_idx: 1 / 0

    with pytest.raises(ZeroDivisionError):
        run.test(model, loader())
    assert made.diagnosis is verdict
    assert "gradguard" not in capsys.readouterr().out


def test_fit_ends_with_one_report_and_no_hook(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One live line when the finding begins, one report at the end, and nothing left behind."""
    made, model = callback(), module(sick_net())
    run = trainer(tmp_path, made)
    run.fit(model, loader())

    out = capsys.readouterr().out
    assert out.count("gradguard: step 0: GG101 vanishing-gradient: The gradient vanishes") == 1
    assert out.count("gradguard explain GG101") == 1
    assert hooks_on(model) == hooks_of(run) == 0


def test_guard_that_fails_reports_what_it_saw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A failure of ours ends the watching with a warning: training goes on, and the report says what is missing."""

    def break_guard(batch_idx: int) -> None:
        if batch_idx == 3:
            made.guard._observing.finish = None

    made, model = callback(on_error="warn"), module(sick_net(), before_step=break_guard)
    run = trainer(tmp_path, made)
    with pytest.warns(gradguard.GradGuardWarning, match="switched itself off; training goes on"):
        run.fit(model, loader())

    assert run.global_step == 6
    assert made.diagnosis.primary.code == "GG101"
    assert [note.what for note in made.diagnosis.unobserved] == ["gradguard itself"]
    assert "gradguard explain GG101" in capsys.readouterr().out
    assert hooks_on(model) == hooks_of(run) == 0


def test_fit_that_never_began_has_no_verdict(tmp_path: Path) -> None:
    """The verdict of an earlier fit does not stand for one that failed in its sanity check."""
    made, model = callback(report=False), module(healthy_net(), validates=True)
    run = trainer(tmp_path, made)
    run.fit(model, loader(), loader(1))
    assert made.diagnosis.healthy

    def fail(batch: Any, batch_idx: int) -> None:
        raise RuntimeError("broken on purpose")

    model.validation_step = fail
    with pytest.raises(RuntimeError, match="broken on purpose"):
        trainer(tmp_path, made).fit(model, loader(), loader(1))
    assert made.diagnosis is None


def test_module_that_is_watched_already_is_left_to_its_guard(tmp_path: Path) -> None:
    """A guard of the user's own stays in charge, and the warning says that the callback needs none."""
    guards = []

    def watched(model: Any) -> Any:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        guards.append(gradguard.watch(model, optimizer, on_finding="silent"))
        return optimizer

    made = callback(on_error="warn")
    with pytest.warns(gradguard.GradGuardWarning, match=r"this Classifier is already watched.*leave one of the two"):
        trainer(tmp_path, made).fit(module(sick_net(), make_optimizer=watched), loader())

    assert made.guard is None
    assert guards[0].attached
    guards[0].detach()


def test_silence_is_possible(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``report=False`` and ``on_finding="silent"`` nothing is printed; the diagnosis is there."""
    made = callback(report=False, on_finding="silent")
    trainer(tmp_path, made).fit(module(sick_net()), loader())

    assert "gradguard" not in capsys.readouterr().out
    assert made.diagnosis.healthy is False


def test_sanity_check_and_validation_leave_no_trace(tmp_path: Path) -> None:
    """With validation before and between the epochs the observations are those of a run without."""
    seen = []
    for sanity, data in ((2, loader(3)), (0, None)):
        torch.manual_seed(0)
        made = callback(report=False)
        run = trainer(tmp_path, made, num_sanity_val_steps=sanity, max_epochs=2)
        run.fit(module(healthy_net(), validates=data is not None), loader(), data)
        history = made.guard.history
        seen.append((history.steps.tolist(), history.layer("delta_norm").tolist(), history.layer("calls").tolist()))

    assert seen[0] == seen[1]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_hooks_are_off_during_validation(accumulate: int, tmp_path: Path) -> None:
    """Validation runs as without us; what a window of accumulation has gathered before it is kept."""
    counts: list[int] = []
    made, model = callback(report=False), module(healthy_net(), validates=True)
    model.on_validation_epoch_start = lambda: counts.append(hooks_on(model))
    run = trainer(tmp_path, made, val_check_interval=3, accumulate_grad_batches=accumulate)
    run.fit(model, loader(), loader(1))

    assert counts == [0, 0, 0]  # the first one is the sanity check
    assert made.guard.history.layer("calls")[:, 0].tolist() == [accumulate] * (6 // accumulate)


def test_fast_dev_run_works(tmp_path: Path) -> None:
    """One batch is too little for a verdict, and enough to see that everything fits together."""
    made = callback(report=False, on_finding="silent")
    model = module(healthy_net())
    run = trainer(tmp_path, made, fast_dev_run=True)
    run.fit(model, loader())

    assert made.diagnosis.healthy is None
    assert hooks_on(model) == hooks_of(run) == 0


def test_barebones_run_is_observed_and_logs_nothing(tmp_path: Path) -> None:
    """Where Lightning refuses to log, with a warning each time, it is not asked to."""
    asked: set[str] = set()
    made, model = callback(report=False, on_finding="silent"), module(sick_net())
    model.log = lambda name, *args, **options: asked.add(name)
    options = {"accelerator": "cpu", "devices": 1, "max_epochs": 1, "default_root_dir": tmp_path}
    PL.Trainer(barebones=True, callbacks=[made], **options).fit(model, loader())

    assert asked == {"train_loss"}
    assert made.diagnosis.primary.code == "GG101"


@pytest.mark.parametrize("as_callback", [False, True], ids=["tuner", "callback"])
def test_learning_rate_finder_leaves_no_trace(as_callback: bool, tmp_path: Path) -> None:
    """The steps of the learning rate finder are neither counted nor observed."""
    made, model = callback(report=False), module(mlp(3, nn.ReLU))
    options: dict[str, Any] = {"num_training": 8, "early_stop_threshold": None, "update_attr": False}
    extra: list[Any] = []
    if as_callback:
        finder = PL.callbacks.LearningRateFinder(num_training_steps=8, early_stop_threshold=None)
        extra.append(finder)
    run = trainer(tmp_path, made, *extra)
    if not as_callback:
        PL.tuner.Tuner(run).lr_find(model, loader(), **options)
        assert made.guard is None
    run.fit(model, loader())

    assert made.guard.steps == 6
    assert made.guard.history.steps.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert hooks_on(model) == hooks_of(run) == 0


def test_second_fit_goes_on_counting_with_a_guard_of_its_own(tmp_path: Path) -> None:
    """Fitting again with the same Trainer continues its step count; with a new one it starts at 0."""
    made, model = callback(report=False), module(healthy_net())
    run = trainer(tmp_path, made)
    run.fit(model, loader())
    first = made.guard
    run.fit_loop.max_epochs = 2
    run.fit(model, loader())

    assert made.guard is not first
    assert made.guard.history.steps.tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]

    trainer(tmp_path, made).fit(model, loader())
    assert made.guard.history.steps.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


def test_resumed_run_continues_counters_and_repeats_no_announcement(tmp_path: Path) -> None:
    """A checkpoint holds plain types; a run resumed from it goes on at its step, and tells nothing twice."""
    told: list[Any] = []
    path = tmp_path / "run.ckpt"
    run = trainer(tmp_path, callback(report=False, on_finding=told.append))
    run.fit(module(sick_net()), loader())
    run.save_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]["gradguard.GradGuardCallback"]
    assert state == {"version": 1, "step_counts": [6], "announced": [["GG101", ""]]}
    assert [finding.code for finding in told] == ["GG101"]

    made = callback(report=False, on_finding=told.append)
    trainer(tmp_path, made, max_epochs=2).fit(module(sick_net()), loader(), ckpt_path=path)

    assert made.guard.history.steps.tolist() == [6.0, 7.0, 8.0, 9.0, 10.0, 11.0]
    assert [finding.code for finding in told] == ["GG101"]
    assert made.diagnosis.primary.code == "GG101"
    assert made.state_dict()["announced"] == [["GG101", ""]]


def test_state_of_another_number_of_optimizers_is_not_taken_over(tmp_path: Path) -> None:
    """Counters that do not fit the optimizers are left alone: the Trainer's step count serves instead."""
    made = callback(report=False)
    made.load_state_dict({"version": 1, "step_counts": [40, 40], "announced": []})
    assert made.state_dict()["step_counts"] == [40, 40]
    trainer(tmp_path, made).fit(module(healthy_net()), loader())

    assert made.guard.step_counts == (6,)
    with pytest.raises(ValueError, match=r"step_counts must have 1 entries, one per optimizer, got \[40, 40\]"):
        made.guard.resume([40, 40])


def test_training_is_bit_identical_with_and_without(tmp_path: Path) -> None:
    """Parameters, buffers and the random state do not know of the callback."""
    ends = []
    for guarded in (False, True):
        torch.manual_seed(0)
        net = nn.Sequential(mlp(6, nn.ReLU, width=32), nn.BatchNorm1d(10), nn.Dropout(0.2), nn.Linear(10, 10))
        extra = [callback(report=False)] if guarded else []
        run = trainer(
            tmp_path, *extra, logger=PL.loggers.CSVLogger(tmp_path), log_every_n_steps=2, gradient_clip_val=0.1
        )
        run.fit(module(net), loader(20))
        ends.append((net.state_dict(), torch.get_rng_state()))

    assert all(torch.equal(a, b) for a, b in zip(ends[0][0].values(), ends[1][0].values(), strict=True))
    assert torch.equal(ends[0][1], ends[1][1])


@pytest.mark.filterwarnings("ignore:.*configure_optimizers. returned .None")
def test_module_without_an_optimizer_is_trained_and_not_watched(tmp_path: Path) -> None:
    """Nothing can be observed without an optimizer: a warning says so, and training goes on."""
    made = gradguard.GradGuardCallback()
    run = trainer(tmp_path, made)
    with pytest.warns(gradguard.GradGuardWarning, match="attaching failed; training goes on. no optimizer holds"):
        run.fit(module(healthy_net(), make_optimizer=lambda m: None), loader())

    assert run.state.finished
    assert made.guard is None


# ----------------------------------------------------------------------------------------------------------- on_finding


def test_stop_ends_the_training_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``"stop"`` ends the fit after the batch in which the finding began; a healthy net trains on."""
    run = trainer(tmp_path, callback(on_finding="stop", report=False), max_epochs=3)
    run.fit(module(sick_net()), loader())
    assert run.global_step < 6
    assert "stopping the training, because of GG101 vanishing-gradient" in capsys.readouterr().out

    run = trainer(tmp_path, callback(on_finding="stop", report=False), max_epochs=3)
    run.fit(module(healthy_net()), loader())
    assert run.global_step == 18


def test_raise_ends_the_training_with_the_message(tmp_path: Path) -> None:
    """``"raise"`` raises between two batches, with the diagnosis set and no hook left."""
    made, model = callback(on_finding="raise", report=False), module(sick_net())
    run = trainer(tmp_path, made)
    with pytest.raises(gradguard.UnhealthyGradientsError, match="GG101 vanishing-gradient: The gradient vanishes"):
        run.fit(model, loader())

    assert made.diagnosis.primary.code == "GG101"
    assert hooks_on(model) == hooks_of(run) == 0


def test_callable_gets_the_finding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A callable is called once for each finding that begins, in place of the line."""
    told: list[Any] = []
    trainer(tmp_path, callback(on_finding=told.append, report=False)).fit(module(sick_net()), loader())

    assert [(finding.code, finding.step) for finding in told] == [("GG101", 0)]
    assert "GG101" not in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------------- logging


def test_every_logged_row_holds_a_new_observation_beside_the_loss(tmp_path: Path) -> None:
    """Few names, in the rows of the user's metrics, with the numbers of that very step."""
    made, model = callback(every=1000, dense_steps=(0,), report=False), module(healthy_net())
    logger = PL.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, made, logger=logger, log_every_n_steps=3, gradient_clip_val=0.01).fit(model, loader(12))

    table = rows(tmp_path)
    names = [name for name in table[0] if name.startswith("gradguard/")]
    assert [int(row["step"]) for row in table] == [2, 5, 8, 11]
    assert all(row["train_loss"] and row["gradguard/grad_norm"] for row in table)
    assert [float(row["gradguard/grad_norm"]) for row in table] == pytest.approx(model.norms[2::3], rel=1e-4)
    assert [float(row["gradguard/grad_norm_at_step"]) for row in table] == pytest.approx([0.01] * 4, rel=1e-3)
    assert {float(row["gradguard/findings"]) for row in table} == {0.0}
    assert 0 < len(names) <= 10
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_./-") for name in names)
    assert made.guard.history.steps.tolist() == [0.0, 2.0, 5.0, 8.0, 11.0]


def test_rows_are_new_under_accumulation(tmp_path: Path) -> None:
    """Logging counts batches that stepped, so with accumulation rows still meet observations."""
    made, model = callback(every=1000, dense_steps=(), report=False), module(healthy_net())
    logger = PL.loggers.CSVLogger(tmp_path)
    options = {"logger": logger, "log_every_n_steps": 2, "accumulate_grad_batches": 2}
    trainer(tmp_path, made, **options).fit(model, loader(12))

    logged = {
        int(row["step"]): float(row["gradguard/grad_norm"]) for row in rows(tmp_path) if row["gradguard/grad_norm"]
    }
    assert made.guard.history.steps.tolist() == [0.0, 1.0, 3.0, 5.0]
    assert list(logged.values()) == pytest.approx(model.norms[1::2], rel=1e-4)


@pytest.mark.filterwarnings("ignore:.training_step. returned .None")
def test_row_without_an_observation_is_marked(tmp_path: Path) -> None:
    """Lightning repeats old values where a step was skipped or training stops; the step they belong to says so."""

    class Stop(lightning.pytorch.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 8

    made = callback(every=1000, dense_steps=(), report=False)
    model = module(healthy_net(), before_step=lambda i: "skip" if i == 5 else None)
    run = trainer(tmp_path, made, Stop(), logger=PL.loggers.CSVLogger(tmp_path), log_every_n_steps=3)
    run.fit(model, loader(12))

    table = [(int(row["step"]), float(row["gradguard/step"])) for row in rows(tmp_path)]
    assert table == [(2, 2.0), (5, 2.0), (7, 2.0)]
    assert float(rows(tmp_path)[0]["gradguard/grad_norm"]) == pytest.approx(model.norms[2], rel=1e-4)


def test_trainer_that_never_logs_leaves_the_cadence_alone(tmp_path: Path) -> None:
    """``log_every_n_steps=0`` turns logging off, so no step is observed for its sake."""
    made = callback(every=40, dense_steps=(), report=False)
    logger = PL.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, made, logger=logger, log_every_n_steps=0).fit(module(healthy_net()), loader(52, 8))

    assert made.guard.history.steps.tolist() == [0.0, 40.0]


def test_log_false_logs_nothing_and_keeps_the_cadence(tmp_path: Path) -> None:
    """Without logging the configuration alone decides what is observed."""
    made = callback(every=5, dense_steps=(), log=False, report=False)
    logger = PL.loggers.CSVLogger(tmp_path)
    trainer(tmp_path, made, logger=logger, log_every_n_steps=2).fit(module(healthy_net()), loader(12))

    assert not [name for row in rows(tmp_path) for name in row if "gradguard" in name]
    assert made.guard.history.steps.tolist() == [0.0, 5.0, 10.0]


def test_other_callbacks_can_monitor_the_numbers(tmp_path: Path) -> None:
    """What is logged lands in ``callback_metrics``, also without a logger."""
    run = trainer(tmp_path, callback(report=False))
    run.fit(module(healthy_net()), loader())

    assert run.callback_metrics["gradguard/grad_norm"] > 0


@pytest.mark.parametrize("bar", ["TQDMProgressBar", "RichProgressBar"])
@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
def test_lines_and_report_stand_whole_beside_a_progress_bar(
    bar: str, fails: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The live line is a line of its own, and the report follows the closed bar."""

    def fail(batch_idx: int) -> None:
        if fails and batch_idx == 4:
            raise RuntimeError("broken on purpose")

    made = callback()
    run = trainer(tmp_path, made, getattr(PL.callbacks, bar)(), enable_progress_bar=True)
    try:
        run.fit(module(sick_net(), before_step=fail), loader())
    except RuntimeError:
        assert fails

    out = capfd.readouterr().out
    lines = [line.rpartition("\r")[2].strip() for line in out.splitlines()]
    assert sum(line.startswith("gradguard: step 0: GG101 vanishing-gradient: The gradient") for line in lines) == 1
    assert any(line.startswith("╭─ gradguard ─") for line in lines)
    assert "Epoch" not in out[out.index("╭─ gradguard ─") :]


# ---------------------------------------------------------------------------------------------------------- distributed


@pytest.mark.parametrize("state", ["off", "never on"])
def test_process_without_a_guard_takes_part_in_the_decision(state: str, tmp_path: Path) -> None:
    """Where a guard is off in one process, the others must not wait for its vote, and stopping concerns all."""
    made, model = callback(on_finding="stop", report=False), module(healthy_net())
    if state == "off":
        trainer(tmp_path, made).fit(model, loader(1))
    votes: list[bool] = []

    def vote(decision: bool, *, all: bool) -> bool:  # noqa: A002  # Lightning's name
        assert not all
        votes.append(decision)
        return len(votes) == 2

    model.print = lambda line: None
    run = types.SimpleNamespace(
        world_size=2,
        strategy=types.SimpleNamespace(reduce_boolean_decision=vote),
        log_every_n_steps=1,
        fit_loop=types.SimpleNamespace(epoch_loop=types.SimpleNamespace(_batches_that_stepped=0)),
        global_step=0,
        should_stop=False,
    )
    made.on_train_batch_end(run, model, None, None, 0)
    assert (votes, run.should_stop) == ([False], False)
    made.on_train_epoch_end(run, model)
    assert (votes, run.should_stop) == ([False, False], True)


SPAWN = """
    import lightning.pytorch as pl, torch
    from torch import nn
    import gradguard

    class Classifier(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(*[m for _ in range(12) for m in (nn.Linear(16, 16), nn.Sigmoid())])

        def training_step(self, batch, batch_idx):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    if __name__ == "__main__":
        torch.manual_seed(0)
        guard = gradguard.GradGuardCallback(on_finding="stop", on_error="raise")
        run = pl.Trainer(
            accelerator="cpu", devices=2, strategy="ddp_spawn", max_epochs=40, logger=False, log_every_n_steps=4,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[guard],
            use_distributed_sampler=False,
        )
        run.fit(Classifier(), torch.utils.data.DataLoader(torch.randn(192, 16), batch_size=32))
        print("diagnosis here:", guard.diagnosis)
"""


@pytest.mark.slow
def test_spawned_processes_give_one_report_and_stop_together(tmp_path: Path) -> None:
    """Two processes: the callback travels to them, one of them reports, and both stop at the same step."""
    script = tmp_path / "spawn.py"
    script.write_text(textwrap.dedent(SPAWN), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=tmp_path,
    )

    assert done.returncode == 0, done.stderr
    assert done.stdout.count("gradguard explain GG101") == 1, done.stdout
    assert done.stdout.count("stopping the training") == 1
    assert " 4 steps, " in done.stdout
    assert "diagnosis here: None" in done.stdout
