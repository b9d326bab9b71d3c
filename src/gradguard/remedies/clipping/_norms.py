"""Norms that neither overflow nor underflow, over devices, kinds of numbers and ranks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from gradguard.remedies.clipping._gradients import Gradient, Shards

__all__ = ["Norms", "combine", "measure", "over_ranks", "scale_", "total_norm", "wide_norm"]

_NARROW = (1e-15, 1e18)
"""Range of norms in which squares are safe in float32 (1e-45 to 3e38), with room for small parts of the total."""

_HALVES = (torch.float16, torch.bfloat16)

_SPLIT_BELOW = 1e-30
"""Factor below which a multiplication is done in two halves: in float32 it would lose digits below 1e-38."""


@dataclass(frozen=True, slots=True, eq=False)
class Norms:
    """Norms of the gradients of one step.

    Attributes:
        each: One norm per gradient, over all ranks, on one device, shape ``[gradients]``.
        total: The norm over all of them, 0-dim.
        host: ``total`` on the host, where it was asked for.
    """

    each: Tensor
    total: Tensor
    host: float | None


def measure(gradients: Sequence[Gradient], *, norm_type: float = 2.0, on_host: bool) -> Norms:
    """Measure every gradient and all of them together; nothing is changed.

    On the host, float32 comes first, bit for bit as in ``torch.nn.utils.clip_grad_norm_``; a total whose squares may
    have left the range of float32 is measured again in float64 (pytorch#46849). Without the host, float64 at once. Both
    ways a norm is infinite or NaN only where a gradient is. Sharded tensors are summed over their ranks in float64, in
    one collective per layout, so that every rank gets the same number.

    Args:
        gradients: At least one.
        norm_type: 2, or infinity for the largest entry.
        on_host: Whether to copy the total to the host: one synchronisation, two in the rare second pass.
    """
    each = _each(gradients, norm_type, wide=not on_host)
    total = combine(each, norm_type)
    if not on_host:
        return Norms(each, total, None)
    host = float(total)
    if norm_type == 2.0 and not _NARROW[0] < host < _NARROW[1]:
        each = _each(gradients, norm_type, wide=True)
        total = combine(each, norm_type)
        host = float(total)
    return Norms(each, total, host)


def total_norm(gradients: Sequence[Gradient], norm_type: float = 2.0, *, wide: bool) -> Tensor:
    """Return the norm of all gradients on the device, 0-dim, in float64 where ``wide``."""
    return combine(_each(gradients, norm_type, wide=wide), norm_type)


def combine(norms: Tensor, norm_type: float = 2.0) -> Tensor:
    """Return the norm of a vector of norms, scaled where it is float64 and might leave its range."""
    if norms.dtype is not torch.float64 or norm_type != 2.0:
        total: Tensor = torch.linalg.vector_norm(norms, norm_type)
        return total
    return wide_norm(norms)


def wide_norm(values: Tensor) -> Tensor:
    """Return an L2 norm that does not leave the range: in float64, or divided by the largest entry where that is used.

    NaN and infinity in ``values`` show in the norm.
    """
    if values.numel() == 0:
        return values.new_zeros((), dtype=_wide_type(values))
    if values.dtype is not torch.float64 and values.device.type != "mps":
        norm: Tensor = torch.linalg.vector_norm(values, dtype=torch.float64)
        return norm
    values = values if values.dtype is torch.float64 else values.float()
    largest = torch.linalg.vector_norm(values, math.inf)
    unit = torch.where(torch.isfinite(largest) & (largest > 0), largest, torch.ones_like(largest))
    rest: Tensor = torch.linalg.vector_norm(values / unit)
    return rest * unit


def over_ranks(norms: list[Tensor], layouts: Sequence[Shards | None], norm_type: float = 2.0) -> list[Tensor]:
    """Combine the norms of local parts over ranks: one collective per layout, in the order of the parameters.

    Args:
        norms: 0-dim norms of what lies on this rank; not changed.
        layouts: How each tensor is spread; ``None`` for an ordinary one, whose norm stays.
        norm_type: 2 or infinity.
    """
    norms = list(norms)
    groups: dict[tuple[object, tuple[object, ...]], list[int]] = {}
    for index, layout in enumerate(layouts):
        if layout is not None and not layout.whole:
            groups.setdefault((layout.mesh, layout.placements), []).append(index)
    for indices in groups.values():
        layout = layouts[indices[0]]
        if layout is not None:
            summed = _collective(torch.stack([norms[index] for index in indices]), layout, norm_type)
            for position, index in enumerate(indices):
                norms[index] = summed[position]
    return norms


def scale_(gradients: Sequence[Gradient], factor: Tensor | float) -> None:
    """Multiply every gradient in place by one factor, in one pass per device and kind of number."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault((gradient.values.device, gradient.values.dtype), []).append(gradient.values)
    for (device, dtype), values in groups.items():
        if isinstance(factor, torch.Tensor):
            torch._foreach_mul_(values, factor.to(device, torch.float64 if dtype is torch.float64 else torch.float32))
        elif 0.0 < factor < _SPLIT_BELOW:
            torch._foreach_mul_(values, math.sqrt(factor))
            torch._foreach_mul_(values, math.sqrt(factor))
        else:
            torch._foreach_mul_(values, factor)


def _each(gradients: Sequence[Gradient], norm_type: float, *, wide: bool) -> Tensor:
    norms: list[Tensor | None] = [None] * len(gradients)
    fused: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, gradient in enumerate(gradients):
        values = gradient.values
        if norm_type == 2.0 and (wide or gradient.shards is not None):
            norms[index] = wide_norm(values)
        elif values.numel() == 0:
            norms[index] = values.new_zeros((), dtype=torch.float32)
        else:
            fused.setdefault((values.device, values.dtype), []).append(index)
    for (_, dtype), indices in fused.items():
        kind = torch.float32 if dtype in _HALVES else None
        found = torch._foreach_norm([gradients[index].values for index in indices], norm_type, dtype=kind)
        for index, norm in zip(indices, found, strict=True):
            norms[index] = norm
    whole = over_ranks([norm for norm in norms if norm is not None], [g.shards for g in gradients], norm_type)
    dtype = torch.float64 if any(norm.dtype is torch.float64 for norm in whole) else torch.float32
    home = whole[0].device
    return torch.stack([norm.to(home, dtype) for norm in whole])


def _collective(norms: Tensor, layout: Shards, norm_type: float) -> Tensor:
    from torch.distributed.tensor import DTensor, Partial, Replicate

    largest = math.isinf(norm_type)
    # A maximum over ranks may lose a NaN, a sum does not.
    parts = torch.where(norms.isnan(), math.inf, norms) if largest else norms.square()
    placements = [Replicate() if p.is_replicate() else Partial("max" if largest else "sum") for p in layout.placements]
    whole = DTensor.from_local(parts, layout.mesh, placements, run_check=False).full_tensor()
    return whole if largest else whole.sqrt()


def _wide_type(values: Tensor) -> torch.dtype:
    return torch.float32 if values.device.type == "mps" else torch.float64
