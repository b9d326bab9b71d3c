"""What the rules need to know of a run beside its numbers: the model, the optimizers, the kind of loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from gradguard.monitors.gradients import find_parameters
from gradguard.records import OptimizerInfo, RunInfo

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["describe_run", "optimizer_info"]


def describe_run(
    model: nn.Module, optimizers: Sequence[Optimizer], labels: Sequence[str], *, cross_entropy: bool
) -> RunInfo:
    """Return what is true of a whole run.

    Args:
        model: The model.
        optimizers: Its optimizers.
        labels: What to call each.
        cross_entropy: Whether the loss is a cross-entropy: the last Linear's width then counts as its classes.
    """
    parameters = [named.parameter for named in find_parameters(model)]
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return RunInfo(
        model=type(model).__name__,
        parameter_count=sum(p.numel() for p in parameters if p.requires_grad),
        optimizers=tuple(
            optimizer_info(optimizer, label) for optimizer, label in zip(optimizers, labels, strict=False)
        ),
        classes=linear[-1].out_features if linear and cross_entropy else 0,
    )


def optimizer_info(optimizer: Optimizer, label: str = "") -> OptimizerInfo:
    """Return what the rules need to know of an optimizer; one with ``betas`` or ``eps`` counts as adaptive."""
    epsilon = optimizer.defaults.get("eps")
    return OptimizerInfo(
        name=type(optimizer).__name__,
        label=label,
        adaptive="betas" in optimizer.defaults or "eps" in optimizer.defaults,
        epsilon=float(epsilon) if isinstance(epsilon, (int, float)) else math.nan,
    )
