"""What was done to a run while it went on: each act as data, and the sum of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["Action", "ActionSummary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One act on a running training.

    Attributes:
        step: Optimizer step at which it was done, from 0.
        optimizer: Label of the optimizer; empty where the run has only one.
        kind: ``"clip"`` (the gradient was shortened), ``"skip"`` (the step was left out) or ``"lr"`` (the learning rate
            is smaller from this step on).
        before: L2 norm of the gradient before, or learning rate of the first group, as its schedule has it, times what
            was taken off earlier.
        after: The same afterwards; 0 for a skipped step.
        why: The reason, in a few words.
    """

    step: int
    optimizer: str
    kind: Literal["clip", "skip", "lr"]
    before: float
    after: float
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ActionSummary:
    """What was done to the steps of one optimizer.

    Attributes:
        optimizer: Its label; empty where the run has only one.
        method: Name of the clipper, for instance ``"Adaptive"``; empty where none clips.
        steps: Steps that brought gradients.
        clipped: Those whose gradient was clipped.
        spikes: Those left out because the gradient was a spike.
        non_finite: Those left out because a gradient was NaN or infinite.
        let_through: Spikes that were let through because the budget was spent.
        lr_factor: Factor on the learning rates of the schedule, 1 where nothing was taken off.
        remarks: What stood in the way, for instance why nothing is done any more.
        newest: The newest acts, and the newest of each kind; oldest first.
    """

    optimizer: str = ""
    method: str = ""
    steps: int = 0
    clipped: int = 0
    spikes: int = 0
    non_finite: int = 0
    let_through: int = 0
    lr_factor: float = 1.0
    remarks: tuple[str, ...] = ()
    newest: tuple[Action, ...] = ()
