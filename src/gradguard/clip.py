"""Gradient clipping: one interface for every method, in place, aware of AMP, of NaN and of sharded gradients.

A clipper's ``step()`` goes between ``backward`` and ``optimizer.step()``; ``attach(optimizer)`` lets it apply itself.

=================  ===============================================================================================
:class:`Adaptive`  The default: outliers of the run's own norms; no threshold to choose.
:class:`Norm`      All gradients together, at a fixed norm.
:class:`Value`     Every entry, at a fixed size.
:class:`AGC`       Each unit, at a share of its weight norm.
:class:`AutoClip`  All gradients together, at a percentile of the norms so far.
:class:`ZClip`     All gradients together, by distance from the moving average of the norm.
:class:`AdaGC`     Each tensor, at a multiple of the moving average of its own norm.
=================  ===============================================================================================

:func:`clip_norm_`, :func:`clip_value_` and :func:`adaptive_clip_` are the methods without memory as plain functions.

Example:
    >>> import torch
    >>> torch.manual_seed(0) and None
    >>> model = torch.nn.Linear(4, 1)
    >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    >>> clipper = Adaptive(model)
    >>> for _ in range(3):
    ...     optimizer.zero_grad()
    ...     model(torch.randn(8, 4)).square().mean().backward()
    ...     result = clipper.step()
    ...     optimizer.step()
    >>> result.engaged
    False
"""

from __future__ import annotations

from gradguard.remedies.clipping._base import Clipper
from gradguard.remedies.clipping._result import ClipResult
from gradguard.remedies.clipping.fixed import Norm, Value
from gradguard.remedies.clipping.functional import adaptive_clip_, clip_norm_, clip_value_
from gradguard.remedies.clipping.history import Adaptive, AutoClip, ZClip
from gradguard.remedies.clipping.pieces import AGC, AdaGC

__all__ = [
    "AGC",
    "AdaGC",
    "Adaptive",
    "AutoClip",
    "ClipResult",
    "Clipper",
    "Norm",
    "Value",
    "ZClip",
    "adaptive_clip_",
    "clip_norm_",
    "clip_value_",
]
