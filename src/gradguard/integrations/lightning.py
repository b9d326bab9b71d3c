"""The Lightning callback, for ``lightning.pytorch`` and ``pytorch_lightning`` alike.

The class is made when it is first asked for: its bases are the ``Callback`` of whichever Lightning is imported by then,
or of those that are installed. Importing this module imports neither.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from gradguard._arguments import check_optimizers
from gradguard._cadence import FixedCadence
from gradguard.config import GuardConfig
from gradguard.errors import GradGuardError, GradGuardWarning, MissingExtraError
from gradguard.guard import Guard
from gradguard.integrations._deciding import Deciding
from gradguard.integrations._lightnings import callback_bases, usable_namespaces
from gradguard.integrations._logging import LoggingCadence, LoggingSteps, log_values
from gradguard.integrations._trainer import (
    check_clipping,
    check_strategy,
    is_logging_step,
    loss_scaler,
    print_final_report,
    trains_without_logging,
    watched_optimizers,
)
from gradguard.remedies.live.options import Clip, LiveOptions
from gradguard.watching import attach

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradguard.findings import Diagnosis, Finding

__all__ = ["GradGuardCallback"]

_ACTIONS = ("warn", "stop", "raise", "silent")


class _GradGuardHooks(Deciding):
    """What the callback does; :func:`_make_class` adds the bases.

    Attributes:
        guard: The guard of the present or last fit; ``None`` before.
        diagnosis: The verdict on the last fit, also after an exception; ``None`` before. With ``ddp_spawn`` the
            processes that train have it, not the one that called ``fit``.
        config: Thresholds and cadence.
        remedies: What may be done to the run.
    """

    _loss: Tensor | None
    _backwards: int
    _read_for: tuple[int, int] | None

    def __init__(
        self,
        *,
        on_finding: Literal["warn", "stop", "raise", "silent"] | Callable[[Finding], object] = "warn",
        report: bool = True,
        log: bool = True,
        clip: Clip = None,
        on_spike: Literal["skip"] | None = None,
        spike_budget: float = 0.05,
        lr_backoff: bool | float | None = None,
        **overrides: Any,
    ) -> None:
        """Make a callback.

        Args:
            on_finding: What to do when a finding at ``WARNING`` or above begins: ``"warn"`` prints a line, ``"stop"``
                prints it and ends the training after this batch, ``"raise"`` raises ``UnhealthyGradientsError``,
                ``"silent"`` keeps it for the report, a callable is called with the ``Finding``.
            report: Print a report when the fit ends, or fails.
            log: Log at most ten numbers under ``gradguard/``. The steps that the Trainer logs are observed then, too.
            clip: Clip before each optimizer step; see :func:`gradguard.watch`. Not beside ``gradient_clip_val``.
            on_spike: ``"skip"`` leaves out steps whose gradient is a spike or not finite; see there.
            spike_budget: See there.
            lr_backoff: Lower the learning rate on an explosion or a divergence; see there. Off in distributed runs.
            **overrides: Further fields of :class:`gradguard.GuardConfig` by name, for instance ``every=10``.

        Raises:
            TypeError: If an option is unknown; the message names the closest one.
            ValueError: If a value is out of range.
        """
        super().__init__()
        if not callable(on_finding) and on_finding not in _ACTIONS:
            raise ValueError(
                f"on_finding must be one of {', '.join(map(repr, _ACTIONS))} or a callable taking a Finding, "
                f"got {on_finding!r}"
            )
        self.config = GuardConfig().with_overrides(**overrides)
        self.remedies = LiveOptions(clip=clip, on_spike=on_spike, spike_budget=spike_budget, lr_backoff=lr_backoff)
        self.guard: Guard | None = None
        self.diagnosis: Diagnosis | None = None
        self._on_finding = on_finding
        self._report = report
        self._log = log
        self._restored: dict[str, Any] = {}
        self._announced: set[tuple[str, str]] = set()
        self._begin()

    # ----------------------------------------------------------------------------------------------------- lifecycle

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Forget the verdict on an earlier fit: this one may fail before it begins.

        Raises:
            GradGuardError: If the Trainer clips and ``clip=`` was given, or its strategy keeps remedies from deciding
                alike on every process.
        """
        self.diagnosis = None
        if any(item is not None for item in self.remedies.clips()):
            check_clipping(trainer, pl_module)
        if self.remedies.on:
            check_strategy(trainer)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Attach: after the sanity check and the learning rate finder, when optimizers and counters are restored."""
        self._detach()
        self._begin()
        self._safely("attaching", self._attach, trainer, pl_module)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Conclude and report."""
        self._conclude(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Conclude and report what was observed so far; Lightning calls no ``teardown`` after an exception."""
        self._conclude(trainer)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove every hook."""
        self._detach()

    # ----------------------------------------------------------------------------------------------------- observing

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Say whether the Trainer logs this step."""
        self._read_for = None
        guard = self._running()
        if guard is None:
            return
        guard.learn_batch(batch)
        logs = self._log and not trains_without_logging(trainer) and is_logging_step(trainer)
        if logs != self._logging.now:
            self._logging.now = logs
            guard.rearm()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """Keep the loss as the user's code returned it: without the factors of accumulation and of a loss scaler."""
        guard = self._running()
        if guard is None:
            return
        guard.learn_loss(loss)
        value = loss.detach()
        scale = getattr(loss_scaler(trainer), "_scale", None)
        if scale is not None:
            value = value / scale.to(value.device)
        self._loss = value.clone() if self._loss is None else self._loss + value
        self._backwards += 1

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Optimizer) -> None:
        """Read the gradients: after accumulation and unscaling, before clipping."""
        guard = self._running()
        if guard is None:
            return
        key = (id(optimizer), guard.steps)
        if key == self._read_for:  # a further evaluation of the closure, as with LBFGS
            self._forget_loss()
            return
        self._read_for = key
        automatic = pl_module.automatic_optimization
        if automatic and not self._backwards:  # training_step returned None
            guard.skip()
            return
        loss = self._loss
        if automatic and loss is not None:  # Lightning divides each loss by their number
            loss = loss * (trainer.accumulate_grad_batches / self._backwards)
        self._forget_loss()
        guard.record(loss=loss)
        if guard.remedies is not None:  # before the Trainer clips, which would hide a spike
            guard.act(check_optimizers(optimizer)[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log what was observed in this batch, and act on what was found."""
        guard = self._running()
        if guard is not None and self._log and not trainer.barebones:
            self._safely("logging", self._log_observations, guard, pl_module)
        self._act(trainer, pl_module)  # also where the guard has switched itself off: other processes wait for it

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Let a distributed run agree to stop."""
        self._decide(trainer, pl_module, now=True)

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        """Leave validation alone: hooks would keep a Transformer from its fast path."""
        if self.guard is not None:
            self.guard.disarm()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Go on where training was left."""
        if self.guard is not None:
            self.guard.rearm()

    # --------------------------------------------------------------------------------------------------------- state

    @property
    def state_key(self) -> str:
        """The name under which a checkpoint holds the state."""
        return "gradguard.GradGuardCallback"

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain types: step counters by optimizer, and what was announced.

        Observations are not kept: a resumed run judges what it sees itself.
        """
        if self.guard is None:
            return dict(self._restored)
        standing = {(finding.code, finding.optimizer) for finding in self.guard.findings if finding.standing}
        return {
            "version": 1,
            "step_counts": list(self.guard.step_counts),
            "announced": [list(key) for key in sorted(standing & self._announced)],
            **({"remedies": self.guard.remedy_state} if self.guard.remedies is not None else {}),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a checkpoint for the fit that follows."""
        self._restored = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to a run: hooks, optimizers, tensors and the verdict. A copy starts anew."""
        state = {**self.__dict__, "guard": None, "diagnosis": None}
        for name in (
            "_logging",
            "_news",
            "_loss",
            "log",
            "log_dict",
        ):  # the last two are Lightning's, bound to a module
            state.pop(name, None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy."""
        self.__dict__.update(state)
        self._begin()

    # ------------------------------------------------------------------------------------------------------- private

    def _begin(self) -> None:
        self._logging = LoggingSteps()
        self._news: list[Finding] = []
        self._logged = 0
        self._logged_names: set[str] = set()
        self._concluded = True
        self._read_for = None
        self._reason = None
        self._forget_loss()

    def _forget_loss(self) -> None:
        self._loss = None
        self._backwards = 0

    def _running(self) -> Guard | None:
        return self.guard if self.guard is not None and self.guard.attached else None

    def _attach(self, trainer: Any, pl_module: nn.Module) -> None:
        restored, self._restored = self._restored, {}
        self.guard = None
        self._announced = {(code, optimizer) for code, optimizer in restored.get("announced", [])}
        self._known = set(self._announced)
        optimizers = watched_optimizers(trainer, pl_module)
        config = self.config
        start = restored.get("step_counts", [])
        if len(start) != len(optimizers):
            start = [trainer.global_step] if len(optimizers) == 1 else [0] * len(optimizers)
        self.guard = attach(
            pl_module,
            optimizers,
            config.with_overrides(on_finding=self._news_of),
            scaler=loss_scaler(trainer),
            cadence=lambda: LoggingCadence(FixedCadence(every=config.every, dense=config.dense_steps), self._logging),
            remedies=self.remedies,
        )
        self._concluded = False
        self._optimizer_count = len(optimizers)
        if any(start):
            self._safely("restoring the remedies", self.guard.resume, start, restored.get("remedies"))

    def _news_of(self, finding: Finding) -> None:
        key = (finding.code, finding.optimizer)
        self._announced.add(key)
        if key in self._known:  # announced before the run was resumed
            self._known.discard(key)
        else:
            self._news.append(finding)

    def _log_observations(self, guard: Guard, pl_module: Any) -> None:
        count = guard.observations - self._logged
        if not count:
            return
        self._logged += count
        values = log_values(
            guard.history.records[-count:],
            guard.findings,
            config=self.config,
            optimizer_count=self._optimizer_count,
            overhead=guard.overhead,
        )
        # A name is logged from its first known value on, and then always, so that no row repeats an old value.
        self._logged_names.update(name for name, value in values.items() if not math.isnan(value))
        chosen = {f"gradguard/{name}": value for name, value in values.items() if name in self._logged_names}
        pl_module.log_dict(chosen, prog_bar=False, logger=bool(pl_module.trainer.loggers), on_step=True, on_epoch=False)

    def _conclude(self, trainer: Any) -> None:
        guard = self.guard
        if guard is None or self._concluded:
            return
        self._concluded = True
        self._safely("diagnosing", self._diagnose, guard)
        self._detach()
        if self._report and self.diagnosis is not None and trainer.is_global_zero:
            self._safely("reporting", print_final_report, trainer, self.diagnosis)

    def _diagnose(self, guard: Guard) -> None:
        self.diagnosis = guard.diagnose()

    def _detach(self) -> None:
        if self.guard is not None:
            self.guard.detach()
        self._forget_loss()

    def _safely(self, what: str, action: Callable[..., None], *args: Any) -> None:
        """Run something of ours so that no failure of it reaches the user's run."""
        try:
            action(*args)
        except Exception as error:
            if self.config.on_error == "raise":
                raise
            why = str(error) if isinstance(error, GradGuardError) else f"{type(error).__name__}: {error}"
            warnings.warn(f"gradguard: {what} failed; training goes on. {why}", GradGuardWarning, stacklevel=3)


def _make_class(namespaces: list[str]) -> type:
    body = {"__doc__": _GradGuardHooks.__doc__, "__module__": __name__, "__qualname__": "GradGuardCallback"}
    return type("GradGuardCallback", (_GradGuardHooks, *callback_bases(namespaces)), body)


def _made_class() -> Any:
    """Return the class, which is made once; pickles find it under its name."""
    return globals().get("GradGuardCallback") or globals().setdefault(
        "GradGuardCallback", _make_class(usable_namespaces())
    )


class _WithoutLightning:
    """Stands for the class where no Lightning is installed, so that ``help(gradguard)`` works there, too.

    Making one looks for Lightning again, and raises ``MissingExtraError`` where there still is none.
    """

    def __new__(cls, *args: Any, **options: Any) -> Any:
        return _made_class()(*args, **options)


_WithoutLightning.__name__ = _WithoutLightning.__qualname__ = "GradGuardCallback"


if TYPE_CHECKING:
    import lightning.pytorch
    import pytorch_lightning

    class GradGuardCallback(  # type: ignore[misc]  # the two Callbacks name each their own Trainer
        _GradGuardHooks, lightning.pytorch.Callback, pytorch_lightning.Callback
    ):
        """Watch a Lightning run: ``Trainer(callbacks=[GradGuardCallback()])``."""

else:

    def __getattr__(name: str) -> object:
        """Make the class when it is first used, and keep it."""
        if name != "GradGuardCallback":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])
        try:
            return _made_class()
        except MissingExtraError:
            return _WithoutLightning
