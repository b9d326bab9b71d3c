"""What a case of the clinic is: a labelled training run that can be built from a seed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["Batch", "Case", "Half", "Job", "Record", "healthy", "sick", "take_step"]

Batch: TypeAlias = Any
Half: TypeAlias = Literal["practice", "exam"]
Phase: TypeAlias = Literal["initialization", "wiring", "training"]

_TWIN_MARGIN = 0.05
"""Quality by which a sick run must end below its healthy twin, at least. Ours: five points of accuracy, or five percent
of the variance or information; seeds of one healthy configuration differ by less than three."""


class Record(Protocol):
    """Called between ``backward`` and clipping: the point at which a guard, or another tool, reads."""

    def __call__(self, loss: Tensor, name: str = "") -> None:
        """Take in the loss of the step; ``name`` says which of several optimizers steps next."""
        ...


@dataclass(slots=True, kw_only=True)
class Job:
    """A training run, ready to start.

    Attributes:
        model: What is trained.
        optimizers: What updates it; more than one only where ``advance`` is given.
        steps: Optimizer steps (of the first optimizer) to take.
        batch: Gives the batch of a step; the same for the same step whenever it is asked.
        loss: Scalar loss of a model on a batch.
        quality: How well a trained model does, held out where that applies: at most 1, 0 for having learnt nothing.
        accuracies: Accuracy on training and on held-out data, for tools that need it; ``None`` where there is none.
        clip_norm: Total gradient norm above which the loop clips, ``None`` for no clipping.
        clip_value: Entry above which the loop clips, ``None`` for no clipping.
        scaler: Loss scaler of the loop, ``None`` for none.
        autocast: Data type of autocast in forward passes, ``None`` for none.
        before_step: Called before each step: schedules, thawing, faults that begin during the run.
        advance: Takes one step instead of :func:`take_step`, for loops of another shape.
        accumulate: Batches whose gradients are summed into one step.
    """

    model: nn.Module
    optimizers: tuple[Optimizer, ...]
    steps: int
    batch: Callable[[int], Batch]
    loss: Callable[[nn.Module, Batch], Tensor]
    quality: Callable[[nn.Module], float]
    accuracies: Callable[[nn.Module], tuple[float, float]] | None = None
    clip_norm: float | None = None
    clip_value: float | None = None
    scaler: torch.amp.GradScaler | None = None
    autocast: torch.dtype | None = None
    before_step: Callable[[int], None] | None = None
    advance: Callable[[Job, int, Record], None] | None = None
    accumulate: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A configuration with its label.

    Attributes:
        name: Family and configuration, for instance ``"mlp/sigmoid-20-adam"``.
        build: Makes the run of a seed.
        about: The trap that a healthy case sets, or the fault of a sick one, in words.
        code: Code of the rule that should speak; empty for a healthy case.
        accepted: Families that name the same fault rightly; the rule's own comes first.
        culprit: Dotted names that are right answers where one layer is the culprit, else empty. A finding on a module
            inside one of them is right as well.
        twin: Name of the healthy case without the fault; empty for a healthy case.
        phase: When the fault can be seen: ``"initialization"`` and ``"wiring"`` before the first step.
        onset: Optimizer step at which the fault begins.
        cure: What mends it, in a few words.
        learns: Quality that a healthy run must reach to count.
        margin: Quality by which a sick run must end below its twin to count.
    """

    name: str
    build: Callable[[int], Job]
    about: str
    code: str = ""
    accepted: tuple[str, ...] = ()
    culprit: tuple[str, ...] = ()
    twin: str = ""
    phase: Phase = "training"
    onset: int = 0
    cure: str = ""
    learns: float = 0.5
    margin: float = _TWIN_MARGIN

    @property
    def family(self) -> str:
        """The family of networks or faults that the name begins with."""
        return self.name.partition("/")[0]

    @property
    def is_sick(self) -> bool:
        """Whether a rule should speak."""
        return bool(self.code)

    @property
    def group(self) -> str:
        """The healthy configuration that the case is or derives from; a group is never split between the halves."""
        return self.twin or self.name


def healthy(name: str, build: Callable[[int], Job], about: str = "", *, learns: float) -> Case:
    """Return a healthy case; see :class:`Case`."""
    return Case(name=name, build=build, about=about, learns=learns)


def sick(
    name: str,
    build: Callable[[int], Job],
    about: str,
    *,
    code: str,
    twin: str,
    also: tuple[str, ...] = (),
    **fields: Any,
) -> Case:
    """Return a sick case; ``also`` names further families that are right answers. See :class:`Case`."""
    from gradguard.rules import RULES

    return Case(
        name=name, build=build, about=about, code=code, twin=twin, accepted=(RULES[code].family, *also), **fields
    )


def take_step(job: Job, step: int, record: Record) -> None:
    """Take one ordinary optimizer step: forward, backward, the reading point, clipping, update."""
    (optimizer,) = job.optimizers
    optimizer.zero_grad()
    loss = total = torch.zeros(())
    for part in range(job.accumulate):
        loss = job_loss(job, job.batch(step * job.accumulate + part)) / job.accumulate
        (job.scaler.scale(loss) if job.scaler is not None else loss).backward()
        total = total + loss.detach().float()
    record(loss if job.accumulate == 1 else total)
    if job.scaler is not None and (job.clip_norm is not None or job.clip_value is not None):
        job.scaler.unscale_(optimizer)
    if job.clip_norm is not None:
        nn.utils.clip_grad_norm_(job.model.parameters(), job.clip_norm)
    if job.clip_value is not None:
        nn.utils.clip_grad_value_(job.model.parameters(), job.clip_value)
    if job.scaler is not None:
        job.scaler.step(optimizer)
        job.scaler.update()
    else:
        optimizer.step()


def job_loss(job: Job, batch: Batch) -> Tensor:
    """Return the loss of a batch, under autocast where the job says so."""
    if job.autocast is None:
        return job.loss(job.model, batch)
    with torch.autocast("cpu", dtype=job.autocast):
        return job.loss(job.model, batch)
