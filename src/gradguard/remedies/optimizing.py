"""Remedies that act through the optimizer: its rate, its constants, a clipper that applies itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from gradguard.detectors._numbers import usual_rate
from gradguard.remedies._applied import Applied
from gradguard.remedies.clipping.fixed import Norm
from gradguard.remedies.clipping.history import Adaptive

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["Undo", "attach_clipper", "even_learning_rates", "scale_learning_rate", "set_option"]

_TWICE = 2.0
"""Factor above the rate of most weights from which a group's rate is lowered to it. Ours."""


@dataclass(slots=True, eq=False)
class Undo:
    """What to call to put things back, newest last.

    Attributes:
        actions: Called from the last to the first.
    """

    actions: list[Callable[[], Any]] = field(default_factory=list)

    def restore(self) -> None:
        """Put everything back; once done there is nothing left to put back."""
        while self.actions:
            self.actions.pop()()


def scale_learning_rate(model: nn.Module, optimizer: Optimizer, *, factor: float) -> Applied:
    """Multiply the learning rate of every group.

    A learning-rate scheduler that is already running sets the rate anew from its own base: give it a new base, or make
    it after this call. ``initial_lr``, from which schedulers begin, is multiplied as well.

    Args:
        model: The model that it trains.
        optimizer: Whose rates to change.
        factor: Above 0; below 1 lowers them.

    Raises:
        ValueError: If the factor is not above 0.

    Source: the factor is the caller's; :func:`gradguard.trial` searches it by decades.
    """
    if not factor > 0.0:
        raise ValueError(f"factor must be above 0, got {factor!r}")
    undo = Undo()
    changes = [
        f"group {index}: learning rate {_multiply_rate(group, factor, undo)}"
        for index, group in enumerate(optimizer.param_groups)
        if group.get("lr") is not None
    ]
    return Applied(
        model=model,
        remedy="lower-learning-rate" if factor < 1.0 else "higher-learning-rate",
        changes=tuple(changes),
        changed=(),
        _snapshot=undo,
    )


def even_learning_rates(model: nn.Module, optimizer: Optimizer) -> Applied:
    """Lower the learning rate of each group that is far above that of most weights to the latter.

    Args:
        model: The model that it trains.
        optimizer: Whose rates to change.

    Raises:
        ValueError: If no group's rate is twice that of the group in the middle, by weights.

    Source: ours: queries and keys at a hundred times the rate of the others, ``gradguard explain GG501``.
    """
    groups = optimizer.param_groups
    rates = [float(group["lr"]) if group.get("lr") is not None else math.nan for group in groups]
    sizes = [sum(parameter.numel() for parameter in group["params"]) for group in groups]
    usual = usual_rate(np.array(rates), np.array(sizes, dtype=np.float64))
    undo = Undo()
    changes = [
        f"group {index}: learning rate {_multiply_rate(group, usual / rate, undo)}, as of most weights"
        for index, (group, rate) in enumerate(zip(groups, rates, strict=True))
        if rate >= _TWICE * usual
    ]
    if not changes:
        raise ValueError(
            f"no group of this {type(optimizer).__name__} has a learning rate far above that of most weights, so "
            "even-learning-rates has nothing to change"
        )
    return Applied(model=model, remedy="even-learning-rates", changes=tuple(changes), changed=(), _snapshot=undo)


def _multiply_rate(group: dict[str, Any], factor: float, undo: Undo) -> str:
    """Multiply a group's rate, and that from which schedulers begin; return the rate before and after in words."""
    before = float(group["lr"])
    for name in ("lr", "initial_lr"):
        if group.get(name) is not None:
            undo.actions.append(partial(group.__setitem__, name, group[name]))
            group[name] = group[name] * factor
    return f"{before:.3g} > {float(group['lr']):.3g}"


def set_option(model: nn.Module, optimizer: Optimizer, *, remedy: str, option: str, value: Any) -> Applied:
    """Set an option of every group that has it.

    Args:
        model: The model that it trains.
        optimizer: Whose option to change.
        remedy: What to call the change.
        option: Name in the parameter groups, for instance ``"eps"``.
        value: The new value, or a function of the old one.

    Raises:
        ValueError: If no group has the option.
    """
    undo, changes = Undo(), []
    for index, group in enumerate(optimizer.param_groups):
        if option not in group:
            continue
        before = group[option]
        group[option] = value(before) if callable(value) else value
        undo.actions.append(partial(group.__setitem__, option, before))
        changes.append(f"group {index}: {option} {before} > {group[option]}")
    if not changes:
        raise ValueError(f"{type(optimizer).__name__} has no {option!r}, so {remedy} does not apply to it")
    return Applied(model=model, remedy=remedy, changes=tuple(changes), changed=(), _snapshot=undo)


def attach_clipper(model: nn.Module, optimizer: Optimizer, *, max_norm: float | None = None) -> Applied:
    """Let a clipper apply itself before each step of the optimizer, until :meth:`Applied.undo`.

    Args:
        model: The model that it trains.
        optimizer: Before whose steps to clip; only the parameters that it holds are clipped.
        max_norm: A fixed threshold for the L2 norm, above 0; ``None`` for one that follows the run's own norms.

    Source: Pascanu, Mikolov, Bengio (2013), ICML, arXiv 1211.5063; the adaptive threshold: :mod:`gradguard.clip`.
    """
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    held = [parameter for parameter in held if isinstance(parameter, torch.Tensor) and parameter.requires_grad]
    clipper = Adaptive(held) if max_norm is None else Norm(held, max_norm)
    clipper.attach(optimizer)
    what = "at outliers of the run's own norms" if max_norm is None else f"at a norm of {max_norm:g}"
    return Applied(
        model=model,
        remedy="adaptive-clip" if max_norm is None else "clip-norm",
        changes=(f"gradients are clipped {what} before each step of {type(optimizer).__name__}",),
        changed=(),
        _snapshot=Undo([clipper.detach]),
    )
