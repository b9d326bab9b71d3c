"""Reductions on the device, and the one transfer per observed step that brings their results to the host.

Nothing here synchronises except :meth:`Readback.fetch`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Handle", "Norm", "Readback", "dense", "queue_norm", "queue_norms", "subsample"]

_EXACT_ENTRIES = 1 << 16
"""Tensors up to this size are reduced in float64 (a copy of at most 512 KiB); larger ones in their own precision,
with a float64 subsample of at most this many entries to fall back on where squares leave the range of float32."""

_CHUNK_ENTRIES = 1 << 22
"""Half-precision tensors are widened in pieces of this size, so that a copy never exceeds 16 MiB."""

_RELIABLE_L2 = 1e-18
"""Below this a float32 L2 norm may have lost entries whose squares underflow (smallest subnormal 1e-45)."""

Handle = tuple[str, int]
"""Where a queued number will be found after the transfer: device and position."""


class Readback:
    """Numbers waiting on their devices to be fetched together, one transfer per device."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[Tensor]] = {}
        self._sizes: dict[str, int] = {}
        self._values: dict[str, list[float]] = {}

    def put(self, value: Tensor) -> Handle:
        """Queue a 0-d or 1-d tensor; the handle points at its first entry."""
        device = str(value.device)
        position = self._sizes.get(device, 0)
        self._pieces.setdefault(device, []).append(value.detach().reshape(-1))
        self._sizes[device] = position + value.numel()
        return device, position

    def fetch(self) -> None:
        """Bring everything queued so far to the host."""
        for device, pieces in self._pieces.items():
            self._values[device] = torch.cat(pieces).tolist()
        self._pieces = {}

    def value(self, handle: Handle, offset: int = 0) -> float:
        """Return a fetched number.

        Raises:
            KeyError: If :meth:`fetch` was not called yet.
        """
        device, position = handle
        return float(self._values[device][position + offset])


@dataclass(frozen=True, slots=True)
class Norm:
    """Handles of one tensor's L2 norm and extreme entries, and how to combine them."""

    l2: Handle
    low_high: Handle
    numel: int
    sample_l2: Handle | None = None
    sample_numel: int = 0
    low_high_offset: int = 1

    def resolve(self, readback: Readback) -> tuple[float, float]:
        """Return the L2 norm and the largest absolute entry; with a NaN or inf the entry is that, and the norm inf.

        A finite tensor whose squares leave the range of float32 gets its L2 norm from a float64 subsample, scaled by
        the square root of the sizes' ratio; it is then an estimate, never a false 0 or inf.
        """
        l2 = readback.value(self.l2)
        low, high = readback.value(self.low_high), readback.value(self.low_high, self.low_high_offset)
        largest = math.nan if math.isnan(low) or math.isnan(high) else max(abs(low), abs(high))
        if not math.isfinite(largest):
            return math.inf, largest
        if (l2 < _RELIABLE_L2 or not math.isfinite(l2)) and largest > 0.0:
            estimate = math.nan
            if self.sample_l2 is not None:
                estimate = readback.value(self.sample_l2) * math.sqrt(self.numel / self.sample_numel)
            exact = self.sample_l2 is None and math.isfinite(l2) and l2 > 0.0
            l2 = l2 if exact else max(estimate if math.isfinite(estimate) else 0.0, largest)
        return l2, largest


def dense(tensor: Tensor) -> Tensor | None:
    """Return a strided, real view (or the values) of a tensor whose norm is that of the original.

    Sparse gradients are coalesced first: uncoalesced values may hold a row twice. Complex tensors are viewed as pairs
    of reals. ``None`` where there is nothing to measure: meta tensors, integers, sharded tensors.
    """
    if tensor.is_meta or hasattr(tensor, "_local_tensor"):
        return None
    if tensor.layout is not torch.strided:
        if tensor.layout is not torch.sparse_coo:
            return None
        tensor = tensor.coalesce().values()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor if tensor.is_floating_point() else None


def subsample(tensor: Tensor, entries: int) -> Tensor | None:
    """Return at most about ``entries`` evenly spaced entries, flat; ``None`` if that needs a big copy."""
    if tensor.numel() <= entries:
        return tensor.reshape(-1)
    flat = _flat_view(tensor)
    return None if flat is None else flat[:: -(-tensor.numel() // entries)]


def _flat_view(tensor: Tensor) -> Tensor | None:
    if tensor.is_contiguous():
        return tensor.view(-1)
    for layout in (torch.channels_last, torch.channels_last_3d):
        if tensor.ndim == (4 if layout is torch.channels_last else 5) and tensor.is_contiguous(memory_format=layout):
            return torch.as_strided(tensor, (tensor.numel(),), (1,), tensor.storage_offset())
    return None


def queue_norm(readback: Readback, tensor: Tensor) -> Norm:
    """Queue the norm of one dense real tensor (see :func:`dense`)."""
    return queue_norms(readback, [tensor])[0]


def queue_norms(readback: Readback, tensors: Sequence[Tensor]) -> list[Norm]:
    """Queue the norms of many dense real tensors; on one device the L2 norms are one fused pass.

    Args:
        readback: Where the numbers wait.
        tensors: Dense real floating-point tensors.

    Returns:
        One :class:`Norm` per tensor, in order.
    """
    small = [t for t in tensors if 0 < t.numel() <= _EXACT_ENTRIES]
    exact = iter(_fused_l2(small, wide=True))
    norms = []
    for tensor in tensors:
        if tensor.numel() == 0:
            zero = readback.put(tensor.new_zeros(1, dtype=torch.float32))
            norms.append(Norm(l2=zero, low_high=zero, numel=0, low_high_offset=0))
        elif tensor.numel() <= _EXACT_ENTRIES:
            norms.append(_with_extremes(readback, tensor, next(exact)))
        else:
            norms.append(_large_norm(readback, tensor))
    return norms


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _fused_l2(tensors: Sequence[Tensor], *, wide: bool) -> list[Tensor]:
    if not tensors:
        return []
    if len({t.device for t in tensors}) > 1:
        return [torch.linalg.vector_norm(t, dtype=_wide(t) if wide else None) for t in tensors]
    return list(torch._foreach_norm(list(tensors), 2, dtype=_wide(tensors[0]) if wide else None))


def _with_extremes(readback: Readback, tensor: Tensor, l2: Tensor) -> Norm:
    low_high = readback.put(torch.stack(torch.aminmax(tensor)))
    return Norm(l2=readback.put(l2), low_high=low_high, numel=tensor.numel())


def _large_norm(readback: Readback, tensor: Tensor) -> Norm:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        flat = _flat_view(tensor)
        pieces = (flat if flat is not None else tensor.reshape(-1)).split(_CHUNK_ENTRIES)
        l2 = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float32) for p in pieces]))
    else:
        l2 = torch.linalg.vector_norm(tensor)
    norm = _with_extremes(readback, tensor, l2)
    sample = subsample(tensor, _EXACT_ENTRIES)
    if sample is None:
        return norm
    return Norm(
        l2=norm.l2,
        low_high=norm.low_high,
        numel=norm.numel,
        sample_l2=readback.put(torch.linalg.vector_norm(sample, dtype=_wide(sample))),
        sample_numel=sample.numel(),
    )
