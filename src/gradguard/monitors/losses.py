"""The loss of every step, kept without stopping the device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LossMonitor"]

_LEAP = 10.0
"""Times the usual loss, and the first, above which a step is looked at. Source: ours, the "far" of GG103."""

_SETTLED = 25
"""Losses before a leap means anything. Source: ours, ``spike_minimum`` of GG103."""

_MEMORY = 0.9
"""Weight of the past in the usual loss, a running geometric mean. Ours: a memory of ten steps."""

_NODES_LOOKED_AT = 16
"""Operations next to the loss among which a cross-entropy is looked for. Ours: a weighted sum of a few losses."""


class LossMonitor:
    """Losses by step and optimizer. On a CPU they are numbers at once; elsewhere they wait for the next observation.

    Attributes:
        cross_entropy: Whether the loss is a cross-entropy over classes; ``None`` until one with a graph was seen.
    """

    name = "losses"

    def __init__(self) -> None:
        """Start with no loss."""
        self._waiting: list[tuple[int, int, Tensor | float]] = []
        self.cross_entropy: bool | None = None
        self._seen = 0
        self._usual = 0.0
        self._first = -math.inf
        self._next_leap = 0

    def is_alarming(self, loss: float) -> bool:
        """Take a known loss; return whether the step is worth a look: not finite, or far out of line.

        After a leap the next one counts when twice as many losses have been seen, so that a loss that leaps all the
        time costs next to nothing.

        Args:
            loss: Loss of this step.
        """
        if not math.isfinite(loss):
            return True
        if loss <= 0.0:
            return False
        self._seen += 1
        level = math.log(loss)
        leapt = self._seen > _SETTLED and level > math.log(_LEAP) + max(self._usual, self._first)
        if self._first == -math.inf:
            self._first = self._usual = level
        self._usual += (1.0 - _MEMORY) * (min(level, self._usual + 1.0) - self._usual)
        if not leapt or self._seen < self._next_leap:
            return False
        self._next_leap = 2 * self._seen
        return True

    def learn(self, loss: Tensor) -> None:
        """Look once at how a loss was computed: whether it is a cross-entropy over classes."""
        if self.cross_entropy is None and loss.grad_fn is not None:
            self.cross_entropy = is_cross_entropy(loss)

    def note(self, loss: Tensor | float, *, step: int, optimizer: int) -> float:
        """Take a loss; return it where that costs nothing, else NaN.

        Args:
            loss: Scalar loss: a tensor with one entry, or a number. A copy is kept, never the graph.
            step: Optimizer step the loss belongs to, from 0.
            optimizer: Index of the optimizer.

        Raises:
            TypeError: If the loss is neither a tensor nor a number.
            ValueError: If the tensor has more than one entry.
        """
        if isinstance(loss, torch.Tensor):
            if loss.numel() != 1:
                raise ValueError(
                    f"loss must be a scalar, got a tensor of shape {tuple(loss.shape)}; "
                    "pass the reduced loss, for instance loss.mean()"
                )
            self.learn(loss)
            kept = loss.detach()
            value: Tensor | float = float(kept) if kept.device.type == "cpu" else kept.reshape(()).clone()
        else:
            value = _number(loss)
        self._waiting.append((step, optimizer, value))
        return value if isinstance(value, float) else math.nan

    def drain(self) -> Iterator[tuple[int, int, float]]:
        """Yield step, optimizer and loss of everything that waits, oldest first; transfers once per device."""
        waiting, self._waiting = self._waiting, []
        tensors = [(row, value) for row, (_, _, value) in enumerate(waiting) if isinstance(value, torch.Tensor)]
        numbers: dict[int, float] = {}
        for device in {value.device for _, value in tensors}:
            rows = [(row, value.float()) for row, value in tensors if value.device == device]
            fetched = torch.stack([value for _, value in rows]).tolist()
            numbers.update({row: number for (row, _), number in zip(rows, fetched, strict=True)})
        for row, (step, optimizer, value) in enumerate(waiting):
            yield step, optimizer, numbers[row] if isinstance(value, torch.Tensor) else value


def is_cross_entropy(loss: Tensor) -> bool:
    """Whether a negative log likelihood stands within a few operations of the loss (a mean, a weight, a sum)."""
    nodes = [loss.grad_fn]
    for _ in range(_NODES_LOOKED_AT):
        if not nodes:
            return False
        node = nodes.pop(0)
        if node is None:
            continue
        if node.name().startswith(("NllLoss", "CrossEntropy")):
            return True
        nodes.extend(following for following, _ in node.next_functions)
    return False


def _number(loss: object) -> float:
    if isinstance(loss, (int, float)) and not isinstance(loss, bool):
        return float(loss)
    raise TypeError(f"loss must be a scalar tensor or a number, got {type(loss).__name__}")
