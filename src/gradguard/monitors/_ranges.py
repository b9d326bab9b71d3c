"""The ranges of many tensors: numbers at once on a CPU, waiting for one transfer elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from gradguard.monitors._reduce import dense

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Measured", "Ranges"]

_SMALL = 1 << 14
"""Entries up to which a range is as cheap as a sum: 4 against 2 microseconds on one CPU thread, 42 against 11 for 2^18
entries, 146 against 11 for as many of a transposed matrix (torch 2.13). Ours."""

_AT_ONCE = "cpu"
"""Type of the device whose numbers are there without waiting."""

_FLOATS = frozenset({torch.float32, torch.float64})
_HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(slots=True, eq=False)
class Measured:
    """What is known of one tensor at one moment, and where the tensor came from.

    Attributes:
        total: Sum of the entries, which is finite where all are (but for sums beyond the range of float32).
        low: Smallest entry; NaN where an entry is NaN or ``exact`` is False.
        high: Largest entry, likewise.
        exact: Whether the range was taken, and not only the sum.
        numel: Number of entries.
        dtype: Its type.
        source: Index of the operation that made it, -1 for what came from outside.
        kind: ``"op"``, ``"parameter"``, ``"buffer"``, ``"input"`` (an argument of the model), ``"data"`` (another
            tensor without a graph) or ``"unseen"`` (made by code that no mode sees, as a custom autograd function).
        name: Name of a parameter or buffer, or of the graph node that made an unseen tensor.
        partial: Whether it began as uninitialised memory, of which parts may not have been written yet.
    """

    total: float
    low: float
    high: float
    exact: bool
    numel: int
    dtype: torch.dtype
    source: int = -1
    kind: str = "data"
    name: str = ""
    partial: bool = False

    @property
    def finite(self) -> bool:
        """Whether every entry is."""
        return math.isfinite(self.low + self.high) if self.exact else math.isfinite(self.total)

    @property
    def nan(self) -> bool:
        """Whether an entry is NaN; a sum that is NaN may also come of infinities of both signs."""
        return math.isnan(self.low) if self.exact else math.isnan(self.total)

    @property
    def unsure(self) -> bool:
        """Whether it was called infinite for a sum that may only have left the range of float32."""
        return not self.exact and math.isinf(self.total)

    @property
    def masked(self) -> bool:
        """Whether it holds infinities below all else, as a mask does, and no others."""
        return self.low == -math.inf and self.high < math.inf if self.exact else self.total == -math.inf


class Ranges:
    """Measures tensors; :meth:`fetch` brings what waits on other devices to the host in one transfer each."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Measured, Tensor, Tensor | None]] = []

    def take(self, tensor: Tensor, *, exact: bool = False) -> Measured | None:
        """Measure a tensor as it is now; ``None`` where there is nothing to measure.

        Args:
            tensor: Any tensor. Of integers only small ones are measured, and only where the range is wanted.
            exact: Whether the range is wanted even of a large one.
        """
        dtype, numel = tensor.dtype, tensor.numel()
        if dtype in _FLOATS and type(tensor) in _PLAIN and tensor.layout is torch.strided:
            values: Tensor | None = tensor.detach()
        else:
            values = _other(tensor) if exact or tensor.is_floating_point() or tensor.is_complex() else None
        if values is None or numel == 0 or values.is_meta:
            return None
        exact = exact or numel <= _SMALL or values.dtype not in _FLOATS | _HALVES
        if exact:
            low, high = torch.aminmax(values)
        else:
            low, high = torch.sum(values, dtype=torch.float32 if dtype in _HALVES else None), None
        if low.device.type == _AT_ONCE:
            first = low.item()
            last = first if high is None else high.item()
            return Measured(first, first, last, exact, numel, dtype)
        measured = Measured(math.nan, math.nan, math.nan, exact, numel, dtype)
        self._waiting.append((measured, low, high))
        return measured

    def fetch(self) -> None:
        """Fill in what waits. Synchronises."""
        groups: dict[tuple[torch.device, torch.dtype], list[tuple[Measured, Tensor, Tensor | None]]] = {}
        for one in self._waiting:
            groups.setdefault((one[1].device, one[1].dtype), []).append(one)
        for group in groups.values():
            numbers = torch.stack([part for _, low, high in group for part in (low, low if high is None else high)])
            values = numbers.tolist()
            for (measured, _, _), low, high in zip(group, values[::2], values[1::2], strict=True):
                measured.total, measured.low, measured.high = low, low, high
        self._waiting = []


_PLAIN = (torch.Tensor, torch.nn.Parameter)

_MOST_INTEGERS = 1 << 16
"""Integer tensors above this size are not measured: a divisor of 0 is a small tensor. Ours."""


def _other(tensor: Tensor) -> Tensor | None:
    """Return the values of a tensor of an unusual kind; ``None`` where they cannot be read here."""
    if tensor.is_quantized or tensor.is_nested or tensor.is_meta:
        return None
    if tensor.is_floating_point() or tensor.is_complex():
        return dense(tensor.detach())
    if tensor.layout is not torch.strided or tensor.dtype is torch.bool or tensor.numel() > _MOST_INTEGERS:
        return None
    return tensor.detach()
