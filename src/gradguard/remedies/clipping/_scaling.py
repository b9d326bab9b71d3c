"""The scale of a loss scaler that is still in the gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["check_scaler", "scale_in_gradients"]


def check_scaler(scaler: Any) -> None:
    """Refuse what is no loss scaler.

    Raises:
        TypeError: If it lacks the methods of ``torch.amp.GradScaler``.
    """
    if scaler is not None and not (hasattr(scaler, "get_scale") and hasattr(scaler, "is_enabled")):
        raise TypeError(f"scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}")


def scale_in_gradients(scaler: Any, optimizer: Optimizer | None) -> Tensor | None:
    """Return the factor that the gradients still carry, ``None`` where they are true to size. Never unscales.

    A scaler divides an optimizer's gradients once, in ``unscale_`` or, failing that, in ``step``; a fused optimizer
    divides them itself, later still. The scaler's record of that is private (checked with torch 2.13).

    Args:
        scaler: A loss scaler or ``None``.
        optimizer: Whose gradients these are; where it is not known, any optimizer's that this scaler has unscaled.
    """
    if scaler is None or not scaler.is_enabled():
        return None
    states = getattr(scaler, "_per_optimizer_states", {})
    mine = list(states.values()) if optimizer is None else [states.get(id(optimizer), {})]
    if any(getattr(state.get("stage"), "name", "") == "UNSCALED" for state in mine):
        return None
    scale = getattr(scaler, "_scale", None)
    return scale.detach() if isinstance(scale, torch.Tensor) else torch.tensor(float(scaler.get_scale()))
