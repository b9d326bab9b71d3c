"""Clipping by the ratio of gradient to weight, unit by unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gradguard.remedies.clipping._base import Clipped, Measured
from gradguard.remedies.clipping._gradients import Gradient, Shards, local
from gradguard.remedies.clipping._methods import norm_after
from gradguard.remedies.clipping._norms import over_ranks

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["all_zero", "clip_units_"]

_TINY = 1e-6
"""Least gradient norm to divide by. Source: timm, as below."""


def clip_units_(
    measured: Measured,
    chosen: Sequence[Gradient],
    *,
    clip_factor: float,
    eps: float,
    exempt: Mapping[str, Tensor],
    timm: bool,
) -> Clipped:
    """Scale each unit whose gradient norm is above ``clip_factor * max(weight norm, eps)`` down to that.

    A unit is a row of a weight (the weights of one output), all of a vector, or a scalar.

    Args:
        measured: All gradients with their norms.
        chosen: Those of them to clip.
        clip_factor: Largest ratio of gradient norm to weight norm.
        eps: Least weight norm to count with.
        exempt: By name, whether to leave a parameter alone, 0-dim and on the device; one not named is clipped.
        timm: Take norms in the gradient's own kind of numbers, as timm does.

    Source: Brock, De, Smith, Simonyan (2021), "High-Performance Large-Scale Image Recognition Without Normalization",
    ICML, arXiv 2102.06171, section 4, equation 3; units and the 1e-6 are those of timm's ``adaptive_clip_grad``.
    """
    wide = measured.norms.total.dtype is torch.float64
    slopes = _unit_norms([g.values for g in chosen], chosen, kind=None if timm else _kind(wide=wide))
    weights = _unit_norms([_weight(g) for g in chosen], chosen, kind=None if timm else _kind(wide=False))
    over: list[Tensor] = []
    for gradient, slope, weight in zip(chosen, slopes, weights, strict=True):
        norm = slope if measured.scale is None else slope / measured.scale.to(slope.device)
        limit = weight.clamp(min=eps).mul(clip_factor)
        if gradient.name in exempt:
            limit = torch.where(exempt[gradient.name].to(limit.device), math.inf, limit)
        if isinstance(measured.finite, torch.Tensor):
            limit = torch.where(measured.finite.to(limit.device), limit, math.inf)
        factor = torch.where(norm < limit, torch.ones_like(limit), limit / norm.clamp(min=_TINY))
        factor = torch.where(torch.isinf(limit), torch.ones_like(factor), factor)
        gradient.values.mul_(factor.to(gradient.values.dtype) if timm else factor)
        over.append((norm > limit).any().float() if norm.numel() else norm.new_zeros((), dtype=torch.float32))
    engaged = False if not over else _any(over_ranks(over, [g.shards for g in chosen], math.inf))
    return Clipped(norm_after(measured), math.nan, engaged)


def all_zero(gradients: Sequence[Gradient]) -> list[Tensor]:
    """Return for each parameter whether every entry of it is zero, over all ranks, 0-dim, on the device."""
    weights = [_local(gradient.parameter) for gradient in gradients]
    peaks = [w.new_zeros(()) if w.numel() == 0 else torch.linalg.vector_norm(w, math.inf) for w in weights]
    return [peak == 0 for peak in over_ranks(peaks, [g.shards for g in gradients], math.inf)]


def _unit_norms(tensors: list[Tensor], gradients: Sequence[Gradient], *, kind: torch.dtype | None) -> list[Tensor]:
    """Return for each tensor the norms of its units, in a shape that broadcasts over it."""
    norms: list[Tensor] = []
    layouts: list[Shards | None] = []
    for values, gradient in zip(tensors, gradients, strict=True):
        wide = None if kind is None or values.dtype is torch.float64 or values.device.type == "mps" else kind
        if gradient.parameter.ndim <= 1:
            norms.append(torch.linalg.vector_norm(values, dtype=wide))
            layouts.append(gradient.shards)
            continue
        norm = torch.linalg.vector_norm(values, dim=tuple(range(1, values.ndim)), keepdim=True, dtype=wide)
        norms.append(norm if gradient.shards is None else _over_split_rows(norm, gradient.shards))
        layouts.append(None)
    return over_ranks(norms, layouts)


def _over_split_rows(norms: Tensor, shards: Shards) -> Tensor:
    """Combine row norms over the ranks that hold parts of the rows; whole rows stay where they are."""
    from torch.distributed.tensor import DTensor, Partial, Replicate

    split = [not p.is_replicate() and p.dim != 0 for p in shards.placements]
    if not any(split):
        return norms
    before = [Partial() if cut else p for cut, p in zip(split, shards.placements, strict=True)]
    after = [Replicate() if cut else p for cut, p in zip(split, shards.placements, strict=True)]
    squares: Any = DTensor.from_local(norms.double().square(), shards.mesh, before, run_check=False)
    local: Tensor = squares.redistribute(placements=after).to_local()
    return local.sqrt()


def _weight(gradient: Gradient) -> Tensor:
    weight = _local(gradient.parameter)
    return weight if gradient.rows is None or weight.ndim <= 1 else weight.index_select(0, gradient.rows)


def _local(parameter: Tensor) -> Tensor:
    values = local(parameter)
    return torch.view_as_real(values) if values.is_complex() else values


def _kind(*, wide: bool) -> torch.dtype:
    return torch.float64 if wide else torch.float32


def _any(flags: list[Tensor]) -> Tensor:
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()
