"""The arithmetic of the methods, on measured gradients, in place, on the device."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from gradguard.remedies.clipping._base import Clipped, Measured
from gradguard.remedies.clipping._norms import combine, over_ranks, scale_, total_norm

if TYPE_CHECKING:
    from torch import Tensor


__all__ = ["norm_after", "scale_tensors_", "to_norm_", "to_value_", "true_size"]

_TINY = 1e-6
"""Added to a norm before dividing by it. Source: torch.nn.utils.clip_grad_norm_."""

_ROUNDING = 1.0 + 1e-6
"""Times the threshold a norm still counts as at it: what was clipped a moment ago lies there, give or take the rounding
of its entries, and must not be scaled again. Ours."""


def to_norm_(measured: Measured, max_norm: float) -> Clipped:
    """Scale all gradients by ``max_norm / (norm + 1e-6)`` where their norm is above ``max_norm``.

    Gradients at the threshold (to a millionth) or below keep every bit, so that clipping twice is clipping once.

    Source: Pascanu, Mikolov, Bengio (2013), "On the difficulty of training recurrent neural networks", ICML,
    arXiv 1211.5063, algorithm 1. Above the threshold bit for bit that of ``torch.nn.utils.clip_grad_norm_``.
    """
    norm = measured.total
    if not isinstance(norm, torch.Tensor):
        if not norm > max_norm * _ROUNDING:
            return Clipped(norm, max_norm, engaged=False)
        single = measured.scale is None and measured.norms.total.dtype is torch.float32
        factor = _single_factor(norm, max_norm) if single else max_norm / (norm + _TINY)
        scale_(measured.gradients, factor)
        return Clipped(min(norm * factor, max_norm), max_norm, engaged=True)
    engaged = (norm > max_norm * _ROUNDING) & measured.finite
    factors = torch.where(engaged, max_norm / (norm + _TINY), 1.0)
    scale_(measured.gradients, factors)
    left = norm * factors
    return Clipped(torch.where(engaged, left.clamp(max=max_norm), left), max_norm, engaged)


def to_value_(measured: Measured, clip_value: float) -> Clipped:
    """Cut every entry to the range from ``-clip_value`` to ``clip_value``; this turns the gradient.

    Source: as ``torch.nn.utils.clip_grad_value_``. Of complex gradients the real and the imaginary part are cut.
    """
    limit = measured.scaled(clip_value)
    if isinstance(measured.finite, torch.Tensor):
        # What a loss scaler is to find must not be cut to a finite size.
        limit = torch.where(measured.finite, torch.as_tensor(limit, device=measured.finite.device), torch.inf)
    home = measured.norms.each.device
    peaks = over_ranks([_peak(g.values) for g in measured.gradients], [g.shards for g in measured.gradients], np.inf)
    engaged = torch.stack([peak.to(home, torch.float32) for peak in peaks]).max() > limit
    for gradient in measured.gradients:
        if isinstance(limit, torch.Tensor):
            bound = limit.to(gradient.values.device)
            gradient.values.clamp_(-bound, bound)
        else:
            gradient.values.clamp_(-limit, limit)
    return Clipped(norm_after(measured), clip_value, engaged)


def scale_tensors_(measured: Measured, factors: Tensor) -> Clipped:
    """Scale each gradient by a factor of its own, shape ``[gradients]``."""
    for gradient, factor in zip(measured.gradients, factors.unbind(), strict=True):
        wide = gradient.values.dtype is torch.float64
        gradient.values.mul_(factor.to(gradient.values.device, torch.float64 if wide else torch.float32))
    norm = combine(measured.norms.each * factors)
    return Clipped(true_size(measured, norm), float("nan"), (factors < 1.0).any())


def true_size(measured: Measured, norms: Tensor) -> Tensor:
    """Take the scale of a loss scaler out of norms on the device."""
    return norms if measured.scale is None else norms / measured.scale.to(norms.device)


def norm_after(measured: Measured) -> Tensor:
    """Return the norm of the gradients as they stand now, true to size, on the device."""
    wide = measured.norms.total.dtype is torch.float64
    return true_size(measured, total_norm(measured.gradients, wide=wide))


def _single_factor(norm: float, max_norm: float) -> float:
    """Return the factor in float32, each operation rounded as torch rounds it."""
    return float(np.float32(max_norm) * (np.float32(1.0) / (np.float32(norm) + np.float32(_TINY))))


def _peak(values: Tensor) -> Tensor:
    if values.numel() == 0:
        return values.new_zeros(())
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)
