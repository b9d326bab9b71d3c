"""Guard: the lifecycle and cadence around one observed run. It computes nothing itself."""

from __future__ import annotations

import math
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import torch

from gradguard._alerts import Alerts, missing_reason
from gradguard._cadence import Cadence, FixedCadence
from gradguard._closures import wrap_closure
from gradguard._containment import Containment
from gradguard._registry import enrol, strike
from gradguard._verdicts import Verdicts
from gradguard.errors import GradGuardWarning, UnsupportedModelError
from gradguard.findings import Finding
from gradguard.monitors._hooks import HookSet, StepHook
from gradguard.observing import Observing
from gradguard.remedies.live.acting import LiveRemedies

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from gradguard.config import GuardConfig
    from gradguard.remedies.live.options import LiveOptions

__all__ = ["Guard"]

_ATTEMPTS = 20
"""Backward passes under a loss scaler after which to judge first, then at twice as many. Ours: GG213 needs 20."""

_WAITING_LOSSES = 4096
"""Losses kept until the optimizer they belong to has stepped."""


class Guard(Verdicts):
    """Watches one model: decides when to observe, never how. Made by :func:`gradguard.watch`.

    With an optimizer, a step hook counts the steps; the hook also keeps the guard alive as long as the optimizer lives.
    ``record()`` is the reading point: after ``backward`` and before any clipping. Where it is not called, the step hook
    reads what the optimizer is about to use.

    Attributes:
        config: Thresholds and cadence.
        attached: Whether hooks are in place.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        config: GuardConfig,
        *,
        scaler: Any = None,
        cadence: Callable[[], Cadence] | None = None,
        remedies: LiveOptions | None = None,
    ) -> None:
        """Attach to a model; use :func:`gradguard.watch`, which checks its arguments first."""
        self.config = config
        self.attached = True
        self._model = model
        self._optimizers = tuple(optimizers)
        count = max(1, len(self._optimizers))
        self._safely = Containment(self, config.on_error)
        self._observing = Observing(
            model, self._optimizers, config, on_failure=self._safely.monitor_failed, scaler=scaler
        )
        self._cadences: list[Cadence] = [
            FixedCadence(every=config.every, dense=config.dense_steps) if cadence is None else cadence()
            for _ in range(count)
        ]
        self._steps = [0] * count
        self._batches = 0
        self._judge_at = _ATTEMPTS if scaler is not None else math.inf
        self._skipped = False
        self._findings: tuple[Finding, ...] = ()
        self._hooks = HookSet()
        self._step_hooks = HookSet()
        self._waiting: deque[tuple[Tensor | float, str]] = deque(maxlen=_WAITING_LOSSES)
        self._alerts = Alerts(config)
        self._first_s: float | None = None
        self._last_s = 0.0
        self._live: LiveRemedies | None = None
        if remedies is not None and remedies.on:  # its hooks come first: what it does shows in the norm at the step
            self._live = LiveRemedies(model, self._optimizers, remedies, config, scaler=scaler, watcher=self)
            self.clip_norm = self._live.limit
        for index, optimizer in enumerate(self._optimizers):
            self._hooks.add(optimizer.register_step_post_hook(StepHook(self, Guard._after_step, index)))
        self._arm_if_due()
        enrol(model, self)

    def resume(self, step_counts: Sequence[int], remedies: Mapping[str, Any] | None = None) -> None:
        """Go on counting where an earlier run stopped, and look more densely first, as at the start of a run.

        Args:
            step_counts: What :attr:`step_counts` was, one number per optimizer, each at least 0.
            remedies: What :attr:`remedy_state` was, ``None`` or empty to begin anew.

        Raises:
            ValueError: If there is not one number for each optimizer, or the state is that of other remedies.
        """
        if len(step_counts) != len(self._steps):
            raise ValueError(
                f"step_counts must have {len(self._steps)} entries, one per optimizer, got {step_counts!r}"
            )
        self._steps = list(step_counts)
        for cadence, step in zip(self._cadences, self._steps, strict=True):
            cadence.look_closer(step)
        self.rearm()
        if remedies and self._live is not None:
            self._live.load_state_dict(remedies)

    def rearm(self) -> None:
        """Ask the cadence again whether the coming step is due; for cadences that change their mind between steps."""
        self._observing.search.listen()
        self._arm_if_due()

    def note(self, what: str, why: str) -> bool:
        """Note that something could not be observed; return whether that is news. See ``Diagnosis.unobserved``."""
        return self._observing.note(what, why)

    def disarm(self) -> None:
        """Take the hooks off the model until :meth:`rearm`, as for a validation pass; what was gathered is kept."""
        self._observing.mute()

    def learn_loss(self, loss: Tensor) -> None:
        """Look at how a loss was computed, where :meth:`record` gets it without its graph."""
        self._observing.losses.learn(loss)

    def learn_batch(self, batch: Any) -> None:
        """Remember the batch of the coming step, where the model itself is not called with it; no copy is made."""
        self._observing.search.remember(batch)

    def skip(self) -> None:
        """Say that the coming step brings no gradients on purpose, so that nothing is read and nothing reported."""
        self._skipped = True

    def record(self, loss: Tensor | float | None = None, *, name: str = "") -> None:
        """Read the gradients now if this step is to be observed. Call between ``backward`` and your clipping.

        Args:
            loss: The scalar loss of this backward pass. It is kept for every step, without stopping the device.
            name: With several optimizers, what to call the one that steps next, for instance ``"generator"``.

        Raises:
            TypeError: If the loss is neither a tensor nor a number.
            ValueError: If the loss is not a scalar.
        """
        if not self.attached:
            return
        started = self._tick()
        self._batches += 1
        self._observing.search.pause(loss)
        if loss is not None:
            self._note_loss(loss, name)
        if self._armed() and self._safely.run("reading gradients", self._observing.read, before_clipping=True) is False:
            self._explain_missing("record() found no gradients")
        self._tock(started)
        if self._batches >= self._judge_at:  # a scaler that skips every step completes none, and nothing would be said
            self._judge_at *= 2
            self._announce(self._steps[0], 0)

    def act(self, optimizer: Optimizer | None = None) -> None:
        """Clip or skip now, as ``clip=`` and ``on_spike=`` say, and not again in the step that follows.

        For loops that clip by themselves later on; otherwise the step does it. Call between ``backward`` and that.

        Args:
            optimizer: Whose gradients, where there are several; one that is not watched is left alone.

        Raises:
            ValueError: If none is given where there are several.
        """
        if self._live is None or not self.attached:
            return
        if optimizer is None and len(self._optimizers) > 1:
            raise ValueError(f"optimizer must say whose gradients are meant: {self.optimizer_names} are watched")
        for index, known in enumerate(self._optimizers):
            if optimizer is None or known is optimizer:
                self._live.act(index)

    def read_unclipped(self, index: int) -> None:
        """Read the gradients of a step before a remedy changes them, if it is to be observed and was not read yet."""
        if self._skipped or self._observing.has_read or not self._cadences[index].due(self._steps[index]):
            return
        if self._safely.run("reading gradients", self._observing.read, before_clipping=True) is False:
            self._explain_missing("the optimizer stepped without gradients")

    def remedy_failed(self, place: str, error: BaseException) -> None:
        """Tell of a remedy that has failed and switched itself off."""
        self._safely.remedy_failed(place, error)

    def find_non_finite(self, *, steps: int = 100) -> None:
        """Search for the operation that makes NaN or infinity, from the next forward pass on, until one is found.

        It stands in :meth:`diagnose` and ``history.origins`` then. Five steps are searched anyway after an alarm.

        Args:
            steps: Optimizer steps to search at most, at least 1 (else ``ValueError``); each is slower meanwhile.
        """
        if self.attached:
            self._observing.start_search(steps)

    def step(self) -> None:
        """Count a step by hand, after the update, in loops whose optimizer is no ``torch.optim.Optimizer``."""
        if not self.attached:
            return
        if self._optimizers:
            raise UnsupportedModelError(
                f"step() was called, but the steps of {self.optimizer_names} are already counted by a hook. "
                "Drop the call, or watch the model without an optimizer: gradguard.watch(model)"
            )
        self._complete(0)

    def detach(self) -> None:
        """Remove every hook. What was observed stays readable; calling twice is harmless."""
        attached, self.attached = self.attached, False
        self._remove_hooks()
        if not attached:
            return
        self._observing.drain_losses()
        self._observing.close()
        strike(self._model)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.detach()

    def holds(self, optimizers: Sequence[Optimizer]) -> bool:
        """Whether these are the watched optimizers, in this order."""
        return len(optimizers) == len(self._optimizers) and all(
            mine is other for mine, other in zip(self._optimizers, optimizers, strict=True)
        )

    @property
    def optimizer_names(self) -> str:
        """The watched optimizers in words."""
        return ", ".join(type(opt).__name__ for opt in self._optimizers) or "no optimizer"

    def _remove_hooks(self) -> None:
        self._hooks.close()
        self._step_hooks.close()
        if self._live is not None:
            self._live.close()

    def _armed(self) -> bool:
        return any(cadence.due(step) for cadence, step in zip(self._cadences, self._steps, strict=True))

    def _arm_if_due(self) -> None:
        if not self.attached:  # a failure of ours has detached it in the middle of a step
            return
        if not self._armed():
            self._step_hooks.close()
            self._observing.disarm()
            return
        self._observing.arm()
        if not len(self._step_hooks):
            for index, optimizer in enumerate(self._optimizers):
                self._step_hooks.add(optimizer.register_step_pre_hook(StepHook(self, Guard._before_step, index)))

    def _note_loss(self, loss: Tensor | float, name: str) -> None:
        if len(self._steps) > 1:
            if isinstance(loss, torch.Tensor):
                loss = loss.detach().clone()
            self._waiting.append((loss, name))
            return
        value = self._observing.losses.note(loss, step=self._steps[0], optimizer=0)
        known = isinstance(loss, torch.Tensor) and loss.device.type == "cpu"  # elsewhere asking would stop the device
        if known and not math.isfinite(value):
            self._safely.run("looking at the batch", self._observing.search_batch, self._steps[0])
        if known and self._observing.losses.is_alarming(value):
            self._cadences[0].look_closer(self._steps[0])

    def _assign_losses(self, index: int) -> None:
        while self._waiting:
            loss, name = self._waiting.popleft()
            self._observing.losses.note(loss, step=self._steps[index], optimizer=index)
            if name:
                self._observing.labels[index] = name

    def _before_step(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.attached:
            return None
        started = self._tick()
        wrapped = wrap_closure(args, kwargs, lambda: self._read_in_closure(index))
        if wrapped is None:
            self._read_at_step(index)
        self._tock(started)
        return wrapped

    def _read_in_closure(self, index: int) -> None:
        if self.attached:
            started = self._tick()
            self._read_at_step(index)
            self._observing.signals.pause()
            self._observing.temporal.pause()
            self._tock(started)

    def _read_at_step(self, index: int) -> None:
        if self._skipped or not self._cadences[index].due(self._steps[index]):
            return
        if not self._observing.has_read:
            if self._safely.run("reading gradients", self._observing.read, before_clipping=False) is False:
                self._explain_missing("the optimizer stepped without gradients")
        else:
            self._safely.run("reading gradients at the step", self._observing.read_at_step, index)

    def _after_step(self, index: int, _args: tuple[Any, ...], _kwargs: dict[str, Any]) -> None:
        if self.attached:
            self._complete(index)
        else:  # it has gone off in the middle of a step, when torch was walking through the hooks
            self._remove_hooks()

    def _complete(self, index: int) -> None:
        started = self._tick()
        step = self._steps[index]
        due = self._cadences[index].due(step)
        armed = due or self._armed()
        self._assign_losses(index)
        self._observing.end_search_step(index, step)
        self._steps[index] += 1
        self._skipped = False
        self._batches = max(self._batches, self._steps[index])
        record = None
        if due:
            record = self._safely.run("finishing an observation", self._finish, index, step, started)
        elif armed:
            self._observing.discard()
        if armed or self._armed():
            self._arm_if_due()
        self._tock(started)
        if record is not None:
            self._announce(step, index)

    def _finish(self, index: int, step: int, started: float) -> object:
        live = self._live
        if live is not None and live.was_skipped(index):
            self._observing.gradients.forgo_update()
        record = self._observing.finish(index, step, batch=self._batches - 1, cost_s=time.perf_counter() - started)
        if live is not None and record is not None and record.scalars["read_before_clipping"]:
            live.compare(index, record.scalars["grad_norm"])
        self._cadences[index].observed(step, time.perf_counter() - started)
        return record

    def _announce(self, step: int, index: int) -> None:
        """Tell the user about findings that began with this observation."""
        started = self._tick()
        self._findings = self._safely.run("judging", self._observing.findings) or ()
        if self._live is not None:
            self._live.consider(index, self._findings)
        news = self._alerts.news(self._findings, step)
        if news:
            for cadence in self._cadences:
                cadence.look_closer(step)
            self._arm_if_due()
            self._safely.run("starting the search for NaN", self._observing.search_after, news)
        self._tock(started)
        for finding in news:
            self._alerts.tell(finding)

    def _explain_missing(self, what: str) -> None:
        signals = self._observing.signals
        why = missing_reason(backward_seen=signals.backward_seen, evaluating=bool(signals.eval_calls))
        if self._observing.note(what, why):
            warnings.warn(f"gradguard: {what}: {why}", GradGuardWarning, stacklevel=4)

    def _tick(self) -> float:
        now = time.perf_counter()
        self._first_s = now if self._first_s is None else self._first_s
        return now

    def _tock(self, started: float) -> None:
        self._last_s = time.perf_counter()
        self._observing.spent_s += self._last_s - started
