"""The scale of a loss scaler at every backward pass, kept without stopping the device: each fall is a skipped step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradguard.monitors.losses import LossMonitor

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

__all__ = ["ScaledLossMonitor", "current_scale", "is_scaled"]


class ScaledLossMonitor(LossMonitor):
    """Losses, and with each of them the scale of a loss scaler: one small copy per backward pass.

    A scaler lowers its scale after each step that it skips, and only then. With gradient accumulation the scale stays
    the same within a step, so nothing is counted twice.

    Attributes:
        skipped: Steps skipped since the first clean one.
        in_a_row: Steps skipped since the last clean one.
        scale: Scale when last looked at, NaN before.
    """

    def __init__(self, scaler: Any) -> None:
        """Keep an eye on a scaler.

        Args:
            scaler: A ``torch.amp.GradScaler`` or what quacks like one.
        """
        super().__init__()
        self._scaler = scaler
        self._scales: list[tuple[int, Tensor]] = []
        self._step = -1
        self.skipped = 0
        self.in_a_row = 0
        self.scale = float("nan")

    def note(self, loss: Tensor | float, *, step: int, optimizer: int) -> float:
        """Take a loss, and the present scale; see :meth:`LossMonitor.note`."""
        scale = getattr(self._scaler, "_scale", None)
        if isinstance(scale, torch.Tensor) and self._scaler.is_enabled():
            self._scales.append((step, scale.detach().reshape(()).clone()))
        return super().note(loss, step=step, optimizer=optimizer)

    def drain_scales(self) -> None:
        """Count the steps skipped since the last call; transfers once per device."""
        waiting, self._scales = self._scales, []
        if not waiting:
            return
        for step, scale in zip((step for step, _ in waiting), _numbers([s for _, s in waiting]), strict=True):
            if step > self._step:
                self.in_a_row = 0
            if scale < self.scale:
                self.in_a_row += 1
                self.skipped += step > 0
            self._step, self.scale = step, scale


def _numbers(scales: list[Tensor]) -> list[float]:
    return [float(value) for value in torch.stack([scale.to(scales[0].device) for scale in scales]).float().tolist()]


def is_scaled(optimizer: Optimizer, scaler: Any) -> bool:
    """Whether a loss scaler's factor is still in the gradients; it keeps that in a private state (torch 2.13).

    Args:
        optimizer: The optimizer that holds the parameters.
        scaler: The loop's scaler, ``None`` for none.
    """
    if isinstance(getattr(optimizer, "grad_scale", None), torch.Tensor):
        return True
    if scaler is None or not scaler.is_enabled():
        return False
    states = getattr(scaler, "_per_optimizer_states", {})
    stage = states[id(optimizer)].get("stage") if id(optimizer) in states else None
    return getattr(stage, "name", "READY") == "READY"


def current_scale(optimizers: Sequence[Optimizer], scaler: Any) -> Tensor | None:
    """Return the factor of a loss scaler, on its device; ``None`` without one.

    Args:
        optimizers: Fused ones are handed the scale.
        scaler: The loop's scaler, ``None`` for none.
    """
    scale = next((found for opt in optimizers if (found := getattr(opt, "grad_scale", None)) is not None), None)
    if scale is None and scaler is not None and scaler.is_enabled():
        scale = getattr(scaler, "_scale", None)
    return scale.detach().reshape(()) if isinstance(scale, torch.Tensor) else None
