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
"""Where a queued number will be found after the transfer: queue and position."""


class Readback:
    """Numbers waiting on their devices to be fetched together, one transfer per device."""

    def __init__(self) -> None:
        self._scalars: dict[str, list[Tensor]] = {}
        self._vectors: dict[str, list[Tensor]] = {}
        self._sizes: dict[str, int] = {}
        self._values: dict[str, list[float]] = {}

    def put(self, value: Tensor) -> Handle:
        """Queue a tensor without dimensions, without a kernel."""
        queue = self._scalars.setdefault(f"{value.device} {value.dtype}", [])
        queue.append(value)
        return f"{value.device} {value.dtype}", len(queue) - 1

    def put_vector(self, value: Tensor) -> Handle:
        """Queue a 1-d tensor; the handle points at its first entry."""
        key = f"{value.device} {value.dtype} vectors"
        position = self._sizes.get(key, 0)
        self._vectors.setdefault(key, []).append(value)
        self._sizes[key] = position + value.numel()
        return key, position

    def fetch(self) -> None:
        """Bring everything queued so far to the host."""
        parts = {key: torch.stack(queue) for key, queue in self._scalars.items()}
        parts.update({key: torch.cat(queue) for key, queue in self._vectors.items()})
        devices: dict[torch.device, list[str]] = {}
        for key, part in parts.items():
            devices.setdefault(part.device, []).append(key)
        for keys in devices.values():
            fetched = torch.cat([parts[key] for key in keys]).tolist()
            for key in keys:
                size = parts[key].numel()
                self._values[key], fetched = fetched[:size], fetched[size:]
        self._scalars, self._vectors = {}, {}

    def value(self, handle: Handle, offset: int = 0) -> float:
        """Return a fetched number.

        Raises:
            KeyError: If :meth:`fetch` was not called yet.
        """
        key, position = handle
        return float(self._values[key][position + offset])

    def values(self, handle: Handle, count: int) -> list[float]:
        """Return ``count`` fetched numbers in a row.

        Raises:
            KeyError: If :meth:`fetch` was not called yet.
        """
        key, position = handle
        return self._values[key][position : position + count]


@dataclass(slots=True, eq=False)
class Norm:
    """Where one tensor's L2 norm and extreme entries wait, and how to combine them.

    Without extremes the L2 norm was taken in float64, whose range no square of a float32 leaves: it is then infinite or
    NaN only where an entry is.
    """

    numel: int
    l2: Handle | None = None
    extremes: tuple[Handle, Handle] | None = None
    sample_l2: Handle | None = None
    sample_numel: int = 0

    def resolve(self, readback: Readback) -> tuple[float, float]:
        """Return the L2 norm and the largest absolute entry; with a NaN or inf the entry is that, and the norm inf.

        Where no extremes were queued the L2 norm stands for the entry, as its upper bound. A finite tensor whose
        squares leave the range of float32 gets its L2 norm from a float64 subsample, scaled by the square root of the
        sizes' ratio; it is then an estimate, never a false 0 or inf.
        """
        if self.l2 is None:
            return 0.0, 0.0
        l2 = readback.value(self.l2)
        if self.extremes is None:
            return (l2 if math.isfinite(l2) else math.inf), l2
        low, high = (readback.value(handle) for handle in self.extremes)
        if math.isnan(low) or math.isnan(high):
            return math.inf, math.nan
        largest = max(abs(low), abs(high))
        if math.isinf(largest):
            return math.inf, largest
        if (l2 < _RELIABLE_L2 or not math.isfinite(l2)) and largest > 0.0 and self.sample_numel:
            estimate = 0.0
            if self.sample_l2 is not None:
                estimate = readback.value(self.sample_l2) * math.sqrt(self.numel / self.sample_numel)
            l2 = max(estimate, largest)
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


def queue_norm(readback: Readback, tensor: Tensor, *, extremes: bool = False) -> Norm:
    """Queue the norm of one dense real tensor (see :func:`dense`).

    Args:
        readback: Where the numbers wait.
        tensor: Dense real floating-point tensor.
        extremes: Whether the largest entry is wanted exactly, not only bounded by the norm.
    """
    numel = tensor.numel()
    if numel == 0:
        return Norm(0)
    if numel > _EXACT_ENTRIES:
        return _large_norm(readback, tensor)
    l2 = readback.put(torch.linalg.vector_norm(tensor, dtype=_wide(tensor)))
    return Norm(numel, l2, _put_extremes(readback, tensor) if extremes or tensor.device.type == "mps" else None)


def queue_norms(readback: Readback, tensors: Sequence[Tensor]) -> list[Norm]:
    """Queue the norms of many dense real tensors; the small ones of a device are one fused pass.

    Args:
        readback: Where the numbers wait.
        tensors: Dense real floating-point tensors.

    Returns:
        One :class:`Norm` per tensor, in order.
    """
    norms: list[Norm | None] = [None] * len(tensors)
    small: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        if 0 < tensor.numel() <= _EXACT_ENTRIES and tensor.device.type != "mps":
            small.setdefault(tensor.device, []).append(index)
        else:
            norms[index] = queue_norm(readback, tensor)
    for indices in small.values():
        fused = torch._foreach_norm([tensors[index] for index in indices], 2, dtype=torch.float64)
        for index, l2 in zip(indices, fused, strict=True):
            norms[index] = Norm(tensors[index].numel(), readback.put(l2))
    return [norm for norm in norms if norm is not None]


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float32 if tensor.device.type == "mps" else torch.float64


def _put_extremes(readback: Readback, tensor: Tensor) -> tuple[Handle, Handle]:
    low, high = torch.aminmax(tensor)
    return readback.put(low), readback.put(high)


def _large_norm(readback: Readback, tensor: Tensor) -> Norm:
    if tensor.dtype in (torch.float16, torch.bfloat16):
        flat = _flat_view(tensor)
        pieces = (flat if flat is not None else tensor.reshape(-1)).split(_CHUNK_ENTRIES)
        l2 = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(p, dtype=torch.float32) for p in pieces]))
    else:
        l2 = torch.linalg.vector_norm(tensor)
    sample = subsample(tensor, _EXACT_ENTRIES)
    return Norm(
        tensor.numel(),
        readback.put(l2),
        _put_extremes(readback, tensor),
        None if sample is None else readback.put(torch.linalg.vector_norm(sample, dtype=_wide(sample))),
        tensor.numel() if sample is None else sample.numel(),
    )
