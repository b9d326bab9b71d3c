"""Training a case of the clinic with something done to it first, always from its original weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradguard
from benchmarks.clinic.case import Case, Job, job_loss
from benchmarks.clinic.probe import Probe
from benchmarks.clinic.runner import drive

__all__ = ["CURABLE", "Outcome", "Setting", "Treat", "advice_only", "apply_all", "build", "setting_of", "train"]

CURABLE = frozenset(
    {"GG101", "GG102", "GG103", "GG111", "GG112", "GG301", "GG302", "GG403"}
    | {"GG501", "GG502", "GG504", "GG701", "GG702", "GG703"}
)
"""Rules whose faults lie in what a library can act on: weights, layers, rates, clipping. The others name faults of the
user's code, data or number format; there the cure is advice."""

Treat: TypeAlias = Callable[["Setting"], nn.Module]
"""What is done to a freshly built run before it is trained; returns the model to train, usually the same object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A freshly built run, as a user's script would hold it.

    Attributes:
        job: The run.
        batches: Its first batches.
        loss: Loss of a model on a batch, under the run's autocast.
        make_optimizer: Makes the run's optimizer, clipping included, for a copy of the model.
    """

    job: Job
    batches: Sequence[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    make_optimizer: Callable[[nn.Module], Optimizer]

    @property
    def optimizer(self) -> Optimizer:
        """The run's optimizer."""
        return self.job.optimizers[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        quality: As the case measures it: at most 1, 0 for having learnt nothing; 0 as well where it is not finite.
        diagnosis: What the guard made of it, where there was one: at the end, or at its first alarm where that has
            cleared by then, which is what somebody who looks at the alarm sees.
        readings: What rivals' rules need, where they were asked for.
    """

    quality: float
    diagnosis: gradguard.Diagnosis | None = None
    readings: tuple[Mapping[str, Any], ...] = ()


def advice_only(case: Case, job: Job) -> str:
    """Return why the library cannot act on a sick case; empty where it can. Decided by what the case declares."""
    if case.code not in CURABLE:
        return f"{case.code} is a fault of code, data or number format"
    if case.phase == "wiring":
        return "a fault of the code"
    if len(job.optimizers) > 1 or job.advance is not None:
        return "a loop of its own shape, which a trial cannot take over"
    if job.scaler is not None:
        return "a loss scaler, which a trial does not use"
    return ""


def build(case: Case, seed: int) -> Job:
    """Return a case's run from its seed: the same weights and batches every time."""
    torch.manual_seed(seed)
    return case.build(seed)


def setting_of(job: Job, *, first: int = 0, batches: int = 80) -> Setting:
    """Return what a user would give to a trial.

    Args:
        job: The run.
        first: Step of the first batch.
        batches: How many to give; they go on where the run ends, as a loader does.
    """
    groups = _groups(job)

    def make_optimizer(model: nn.Module) -> Optimizer:
        """Make the same optimizer for another model; parameters that the run's model does not have join the first."""
        parts: list[list[Tensor]] = [[] for _ in groups]
        for name, parameter in model.named_parameters():
            place = next((i for i, (names, _) in enumerate(groups) if name in names), None)
            if place is None and name not in left_out:
                place = 0
            if place is not None:
                parts[place].append(parameter)
        given = [{**options, "params": part} for part, (_, options) in zip(parts, groups, strict=True) if part]
        make: Callable[[Any], Optimizer] = type(job.optimizers[0])
        optimizer = make(given)
        if job.clip_norm is not None or job.clip_value is not None:
            optimizer.register_step_pre_hook(_clip(job))
        return optimizer

    held = {name for names, _ in groups for name in names}
    left_out = {name for name, _ in job.model.named_parameters()} - held
    return Setting(
        job=job,
        batches=[job.batch(index) for index in range(first, first + batches)],
        loss=lambda model, batch: job_loss(_with(job, model), batch),
        make_optimizer=make_optimizer,
    )


def train(case: Case, seed: int, treat: Treat | None = None, *, watch: bool = False, probe: bool = False) -> Outcome:
    """Build a run, treat it, and train it to its end.

    Args:
        case: The case.
        seed: Of weights and data.
        treat: What to do first; nothing by default.
        watch: Whether a guard watches it.
        probe: Whether to take the readings that rivals need.
    """
    job = build(case, seed)
    if treat is not None:
        before = _rates(job)
        job = _with(job, treat(setting_of(job)))
        _keep_rates(job, before)
    reader = Probe(job) if probe else None
    watcher = _Watcher(job) if watch else None
    losses = [0.0]

    def record(step: int, loss: Tensor, name: str) -> None:
        losses.append(float(loss.detach()))
        if watcher is not None:
            watcher.guard.record(loss=loss, name=name)
        if reader is not None:
            reader.read(step)

    def end(step: int) -> None:
        if watcher is not None:
            watcher.look()
        if reader is not None:
            reader.end(step, losses[-1])

    drive(job, record, begin=None if reader is None else reader.begin, end=end)
    quality = job.quality(job.model)
    return Outcome(
        quality=quality if math.isfinite(quality) else 0.0,
        diagnosis=watcher.close() if watcher is not None else None,
        readings=tuple(reader.readings) if reader is not None else (),
    )


class _Watcher:
    """A guard, and what it made of the run at its first alarm."""

    def __init__(self, job: Job) -> None:
        optimizer = job.optimizers if len(job.optimizers) > 1 else job.optimizers[0]
        self._alarms: list[gradguard.Finding] = []
        self._at_alarm: gradguard.Diagnosis | None = None
        self.guard = gradguard.watch(job.model, optimizer, scaler=job.scaler, on_finding=self._alarms.append)

    def look(self) -> None:
        """Diagnose once, after the step at which the first alarm was raised."""
        if self._at_alarm is None and any(f.severity >= gradguard.Severity.WARNING for f in self._alarms):
            self._at_alarm = self.guard.diagnose()

    def close(self) -> gradguard.Diagnosis:
        """Return the diagnosis at the end, or at the first alarm if that has cleared."""
        diagnosis = self.guard.diagnose()
        self.guard.detach()
        return self._at_alarm if diagnosis.primary is None and self._at_alarm is not None else diagnosis


def apply_all(setting: Setting, remedies: Sequence[gradguard.Prescription | str]) -> nn.Module:
    """Apply remedies one after the other to a run's own model and optimizer; return the model."""
    model = setting.job.model
    for remedy in remedies:
        applied = gradguard.apply(
            remedy, model, optimizer=setting.optimizer, batch=setting.batches[0], compute_loss=setting.loss
        )
        model = applied.model
    return model


def _with(job: Job, model: nn.Module) -> Job:
    """Return a run with another model in its place, which is the same object unless a cure has replaced it."""
    if model is job.model:
        return job
    return Job(**{**{name: getattr(job, name) for name in Job.__slots__}, "model": model})


def _rates(job: Job) -> list[float]:
    """Return the learning rate of each group."""
    return [float(group["lr"]) for optimizer in job.optimizers for group in optimizer.param_groups]


def _keep_rates(job: Job, before: list[float]) -> None:
    """Let a schedule work on the rates that a cure has set: it was made with those before, and would put them back."""
    schedule = job.before_step
    after = _rates(job)
    if schedule is None or len(before) != len(after) or before == after or not all(before):
        return
    factors = [new / old for old, new in zip(before, after, strict=True)]

    def scaled(step: int) -> None:
        groups = [group for optimizer in job.optimizers for group in optimizer.param_groups]
        for group, factor in zip(groups, factors, strict=True):
            group["lr"] /= factor
        schedule(step)
        for group, factor in zip(groups, factors, strict=True):
            group["lr"] *= factor

    job.before_step = scaled


def _groups(job: Job) -> list[tuple[set[str], dict[str, Any]]]:
    """Return, per parameter group of the run's first optimizer, the names of its parameters and its options."""
    names = {id(parameter): name for name, parameter in job.model.named_parameters()}
    return [
        (
            {names[id(p)] for p in group["params"] if id(p) in names},
            {key: value for key, value in group.items() if key != "params"},
        )
        for group in job.optimizers[0].param_groups
    ]


def _clip(job: Job) -> Callable[[Optimizer, Any, Any], None]:
    """Return a hook that clips as the run's loop does."""

    def clip(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if job.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, job.clip_norm)
        if job.clip_value is not None:
            nn.utils.clip_grad_value_(parameters, job.clip_value)

    return clip
