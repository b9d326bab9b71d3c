"""Applying a prescription to the user's own model: in place where it can be, and undone where it must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard._arguments import check_model, refuse_compiled
from gradguard._untouched import cuda_devices
from gradguard.findings import Prescription
from gradguard.remedies import catalogue
from gradguard.remedies._applied import Applied
from gradguard.remedies.optimizing import Undo, scale_learning_rate

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["apply"]


def apply(
    prescription: Prescription | str,
    model: nn.Module,
    *,
    optimizer: Optimizer | None = None,
    batch: Any = None,
    compute_loss: Callable[[Any, Any], Any] | None = None,
) -> Applied:
    """Apply a cure to a model, in place.

    Cures of the model carry the optimizer over: what was replaced leaves its groups, what is new joins them, and the
    state of what has changed begins anew. What a trial recommends draws the very weights that it measured. Cures of the
    learning rate and of clipping act through the optimizer: a clipper applies itself before each step until ``undo()``.
    If the operation fails, model and optimizer are as before.

    Args:
        prescription: What to apply, for instance ``result.best`` of a trial, or the name of a remedy.
        model: The model to change.
        optimizer: Its optimizer. Required by cures that act through it, or that a trial found to want
            another learning rate; pass it with every other as well.
        batch: A batch; initializations and surgery that trace the model run it once.
        compute_loss: How to call the model with a batch; by default ``model(batch)``, or ``model(*batch)``'s first.

    Returns:
        What was done, in words, with ``model``, ``undo()`` and the map of parameter names.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the remedy is unknown, is advice that only the user can follow, or lacks an argument.
        UnsupportedModelError: If the model cannot be changed so; the message says what stands in the way.

    Example:
        >>> import torch, gradguard
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> applied = gradguard.apply("he-initialization", model)
        >>> print(applied.changes[0])
        0: weight of std 0.5 (gain 1.41 for relu), bias 0
        >>> _ = applied.undo()
    """
    name = prescription.remedy if isinstance(prescription, Prescription) else prescription
    if not isinstance(name, str):
        raise TypeError(f"prescription must be a Prescription or the name of a remedy, got {type(name).__name__}")
    remedy = catalogue.find(name)
    if remedy is None:
        known = ", ".join(sorted(catalogue.names()))
        raise ValueError(
            f"{name!r} cannot be applied by the library: it is advice for you to follow, or unknown. Can be: {known}"
        )
    if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer or None, got {type(optimizer).__name__}")
    check_model(model, () if optimizer is None else (optimizer,))
    refuse_compiled(model, "apply the cure to the module that it was made from")
    arguments = prescription.arguments if isinstance(prescription, Prescription) else {}
    target = catalogue.Target(model, optimizer, batch, compute_loss, arguments)
    if "lr_factor" not in arguments:
        return _run(remedy, target)
    if optimizer is None:
        raise ValueError(
            f"{name} was measured at {float(arguments['lr_factor']):g} times the learning rate: pass optimizer=, or "
            f"apply {name!r} by its name and multiply the rate yourself"
        )
    return _run_at_rate(remedy, target, optimizer)


def _run(remedy: catalogue.Remedy, target: catalogue.Target) -> Applied:
    """Apply a remedy, under the seed that it was measured with where there is one."""
    if "seed" not in target.arguments:
        return remedy.run(target)
    with torch.random.fork_rng(devices=cuda_devices(target.model)):
        torch.manual_seed(int(target.arguments["seed"]))
        return remedy.run(target)


def _run_at_rate(remedy: catalogue.Remedy, target: catalogue.Target, optimizer: Optimizer) -> Applied:
    """Apply a remedy and multiply the learning rate."""
    rate = scale_learning_rate(target.model, optimizer, factor=float(target.arguments["lr_factor"]))
    try:
        applied = _run(remedy, target)
    except BaseException:
        rate.undo()
        raise
    return replace(
        applied,
        changes=(*applied.changes, *rate.changes),
        _snapshot=Undo([rate.undo, applied.undo]),
    )
