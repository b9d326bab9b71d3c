"""Clipping as plain functions, for loops that keep no clipper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gradguard.remedies.clipping._gradients import Parameters
from gradguard.remedies.clipping._result import ClipResult
from gradguard.remedies.clipping.fixed import Norm, Value
from gradguard.remedies.clipping.pieces import AGC

__all__ = ["adaptive_clip_", "clip_norm_", "clip_value_"]


def clip_norm_(
    parameters: Parameters, max_norm: float, *, norm_type: float = 2.0, scaler: Any = None, non_finite: str = "skip"
) -> ClipResult:
    """Scale all gradients together so that their norm is at most ``max_norm``; see :class:`Norm`.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([3.0, 4.0])
        >>> clip_norm_([weight], max_norm=1.0).norm_before
        5.0
    """
    return Norm(parameters, max_norm, norm_type=norm_type, scaler=scaler, non_finite=non_finite).step()


def clip_value_(
    parameters: Parameters, clip_value: float, *, scaler: Any = None, non_finite: str = "skip"
) -> ClipResult:
    """Cut every entry to the range from ``-clip_value`` to ``clip_value``; see :class:`Value`."""
    return Value(parameters, clip_value, scaler=scaler, non_finite=non_finite).step()


def adaptive_clip_(
    parameters: Parameters,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    *,
    exclude: Iterable[str] = (),
    parity: str | None = None,
    scaler: Any = None,
    non_finite: str = "skip",
) -> ClipResult:
    """Bound each unit's gradient norm by a share of its weight norm; see :class:`AGC`.

    A function remembers nothing: a parameter is left alone for being all zero only as long as it is. :class:`AGC` does
    so for the whole run.
    """
    clipper = AGC(parameters, clip_factor, eps, exclude=exclude, parity=parity, scaler=scaler, non_finite=non_finite)
    return clipper.step()
