"""Copies of a model for a trial, and what has to hold before any is trained."""

from __future__ import annotations

import copy
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gradguard._arguments import refuse_compiled
from gradguard.errors import UnsupportedModelError

if TYPE_CHECKING:
    from torch.optim import Optimizer

__all__ = ["check_memory", "checked_optimizer", "copy_of"]


def copy_of(model: nn.Module) -> nn.Module:
    """Return an independent copy, without gradients; in training mode, unless parts of it are set otherwise.

    Raises:
        UnsupportedModelError: If it is compiled, scripted, or refuses to be copied.
    """
    refuse_compiled(model, "pass the module that it was made from")
    try:
        twin = copy.deepcopy(model)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied ({error}); a trial trains copies. Pass a fresh model, before its "
            "first forward pass"
        ) from error
    for parameter in twin.parameters():
        parameter.grad = None
    return twin if twin.training else twin.train()


def checked_optimizer(optimizer: Any, model: nn.Module) -> Optimizer:
    """Return an optimizer that trains a copy.

    Raises:
        TypeError: If ``make_optimizer`` gave something else.
        UnsupportedModelError: If the optimizer holds none of the copy's parameters.
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"make_optimizer must return a torch.optim.Optimizer, got {type(optimizer).__name__}")
    mine = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in mine for group in optimizer.param_groups for parameter in group["params"]):
        raise UnsupportedModelError(
            "the optimizer that make_optimizer returned holds no parameter of the copy it was given: "
            "use its argument, for instance lambda model: torch.optim.Adam(model.parameters())"
        )
    return optimizer


def check_memory(model: nn.Module, copies: int) -> None:
    """Refuse a trial whose copies would not fit beside what is in memory now.

    A copy is counted with its gradient and two numbers of optimizer state per weight; activations are not known.

    Args:
        model: What is copied.
        copies: How many copies are alive at once.

    Raises:
        UnsupportedModelError: If they need more than four fifths of the free memory of their device.
    """
    sizes: dict[torch.device, int] = {}
    for parameter in model.parameters():
        sizes[parameter.device] = sizes.get(parameter.device, 0) + 4 * parameter.numel() * parameter.element_size()
    for device, size in sizes.items():
        free = _free_memory(device)
        if copies * size > 0.8 * free:
            raise UnsupportedModelError(
                f"a trial keeps {copies} copies of this model on {device}, with gradients and optimizer state "
                f"{copies * size / 2**30:.2g} GiB, and {free / 2**30:.2g} GiB are free: try fewer at once, for "
                'instance candidates=["layer-norm"]'
            )


def _free_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return math.inf
