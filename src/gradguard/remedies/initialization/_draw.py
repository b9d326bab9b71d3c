"""Random weights: drawn on the CPU in float32 or float64, so that a seed gives the same ones on every device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["delta_orthogonal", "fans", "normal", "orthogonal", "orthogonal_layer"]


def fans(module: nn.Module, shape: torch.Size) -> tuple[float, float]:
    """Return how many inputs one output sums over, and how many outputs one input reaches, stride 1 assumed.

    Groups count, unlike in ``torch.nn.init``; for a transposed convolution, inputs and outputs change places and the
    stride thins out what one output sums over.
    """
    taps = math.prod(shape[2:])
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False):
        stride = math.prod(module.stride)  # type: ignore[arg-type]  # a tuple of integers on convolutions
        return shape[0] / groups * taps / stride, float(shape[1] * taps)
    return float(shape[1] * taps), shape[0] / groups * taps


def normal(shape: torch.Size, dtype: torch.dtype, std: float, generator: torch.Generator | None) -> Tensor:
    """Return Gaussian weights of a standard deviation."""
    return torch.randn(shape, dtype=_working(dtype), generator=generator) * std


def orthogonal(shape: torch.Size, dtype: torch.dtype, generator: torch.Generator | None) -> Tensor:
    """Return a tensor whose flattening to ``[shape[0], rest]`` has orthonormal rows or columns, whichever are fewer.

    Source:
        Saxe, McClelland, Ganguli (2014), "Exact solutions to the nonlinear dynamics of learning in deep linear neural
        networks", ICLR, arXiv 1312.6120. Signs by Mezzadri (2007), "How to generate random matrices from the classical
        compact groups", Notices of the AMS 54, so that the distribution is uniform.
    """
    rows, columns = shape[0], math.prod(shape[1:])
    drawn = torch.randn((max(rows, columns), min(rows, columns)), dtype=_working(dtype), generator=generator)
    q, r = torch.linalg.qr(drawn)
    uniform: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    return (uniform if rows >= columns else uniform.T).reshape(shape)


def orthogonal_layer(
    module: nn.Module, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """Return an orthogonal weight for a layer, each group of a convolution by itself."""
    groups = int(getattr(module, "groups", 1))
    block = torch.Size((shape[0] // groups, *shape[1:]))
    return torch.cat([orthogonal(block, dtype, generator) for _ in range(groups)])


def delta_orthogonal(
    module: nn.Module, shape: torch.Size, dtype: torch.dtype, generator: torch.Generator | None
) -> Tensor:
    """Return a convolution kernel that is orthogonal in its centre tap and zero elsewhere, per group.

    With at least as many outputs as inputs it keeps the norm of every input exactly, at stride 1; with fewer it is a
    projection.

    Source:
        Xiao et al. (2018), "Dynamical Isometry and a Mean Field Theory of CNNs", ICML, arXiv 1806.05393, algorithm 1.
    """
    kernel = torch.zeros(shape, dtype=_working(dtype))
    groups = int(getattr(module, "groups", 1))
    rows = shape[0] // groups
    centre = kernel
    for size in shape[2:]:
        centre = centre.select(2, (size - 1) // 2)  # a view: the axes behind it move up
    for group in range(groups):
        centre[group * rows : (group + 1) * rows] = orthogonal(torch.Size((rows, shape[1])), dtype, generator)
    return kernel


def _working(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
