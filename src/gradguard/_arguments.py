"""What watch() and check() are given, looked at before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from gradguard.errors import UnsupportedModelError
from gradguard.monitors.gradients import find_parameters

__all__ = ["check_model", "check_optimizers", "check_scaler", "has_lazy_parameters", "refuse_compiled"]


def check_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> tuple[Optimizer, ...]:
    """Return the torch optimizers given, out of their wrappers.

    Raises:
        TypeError: If one of them is no ``torch.optim.Optimizer``.
    """
    if optimizer is None:
        return ()
    given = tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)
    unwrapped = tuple(_unwrap(item) for item in given)
    for item in unwrapped:
        if not isinstance(item, Optimizer):
            raise TypeError(
                f"optimizer must be a torch.optim.Optimizer, a sequence of them or None, got {type(item).__name__}. "
                "For an optimizer of another kind pass none, and call guard.step() after each update"
            )
    return unwrapped


def check_scaler(scaler: Any) -> None:
    """Refuse what is no loss scaler; ``None`` stands for none.

    Raises:
        TypeError: If it has no ``is_enabled`` or no ``get_scale``.
    """
    if scaler is not None and not all(callable(getattr(scaler, name, None)) for name in ("is_enabled", "get_scale")):
        raise TypeError(
            f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}. Pass the scaler itself, not "
            "its scale"
        )


def _unwrap(optimizer: Any) -> Any:
    """Return the torch optimizer inside the wrappers of Accelerate, Fabric or Lightning."""
    for _ in range(4):
        inner = getattr(optimizer, "optimizer", None)
        if not isinstance(inner, Optimizer) or inner is optimizer:
            break
        optimizer = inner
    return optimizer


def has_lazy_parameters(model: nn.Module) -> bool:
    """Whether some parameters get their shape only in the first forward pass."""
    return any(isinstance(p, nn.UninitializedParameter) for p in model.parameters())


def check_model(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Refuse a model with nothing to train, and optimizers that train something else.

    Raises:
        TypeError: If the model is no module.
        UnsupportedModelError: If it has no trainable parameter, or an optimizer holds none of its parameters.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    parameters = [named.parameter for named in find_parameters(model)]
    if not has_lazy_parameters(model) and not any(p.requires_grad for p in parameters):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no trainable parameter ({len(parameters)} in all, none with requires_grad), "
            "so there are no gradients to watch. Pass the model that the optimizer updates, or unfreeze a layer first"
        )
    ids = {id(p) for p in model.parameters()}
    for optimizer in optimizers:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        if held and not any(id(p) in ids for p in held):
            raise UnsupportedModelError(
                f"the {type(optimizer).__name__} holds {len(held)} parameters, and none of them belongs to this "
                f"{type(model).__name__}. Pass the optimizer that updates this model: built from its parameters(), and "
                "after any replacement of layers"
            )


def refuse_compiled(model: nn.Module, advice: str) -> None:
    """Refuse what torch made of a model: what is changed in it, or in a copy of it, may not take effect.

    Args:
        model: The model as it was given.
        advice: What to do instead, for the message.

    Raises:
        UnsupportedModelError: If it is scripted, or what ``torch.compile`` returned.
    """
    if isinstance(model, torch.jit.ScriptModule) or hasattr(model, "_orig_mod"):
        kind = "scripted" if isinstance(model, torch.jit.ScriptModule) else "compiled"
        raise UnsupportedModelError(f"the model is {kind}: {advice}")
