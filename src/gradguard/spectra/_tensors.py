"""Turning what users have (half precision, shards, huge or tiny entries) into what the numerics can take."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_rtol", "private_start", "scaled", "whole"]

_SEED = 20130617
"""Seed of starting vectors: the same weight gives the same estimate. Ours."""


def whole(weight: Tensor, *, name: str = "weight") -> Tensor:
    """Return a detached, dense, real floating-point tensor of at least float32.

    A DTensor is gathered first, which every rank that holds a shard has to take part in.

    Raises:
        TypeError: If it is no tensor or no real floating-point tensor.
        ValueError: If it has no storage or an entry is NaN or infinite.
    """
    if not isinstance(weight, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(weight).__name__}")
    if weight.is_complex() or not weight.is_floating_point():
        raise TypeError(f"{name} must be a real floating-point tensor, got {weight.dtype}")
    weight = weight.detach()
    if hasattr(weight, "full_tensor"):
        weight = cast("Tensor", weight.full_tensor())
    if weight.is_meta:
        raise ValueError(f"{name} is on the meta device and has no entries; materialise it first")
    if weight.device.type == "mps":  # it has no float64
        weight = weight.cpu()
    if weight.layout is not torch.strided:
        weight = weight.to_dense()
    if weight.dtype in (torch.float16, torch.bfloat16) or weight.dtype.itemsize < 4:
        weight = weight.float()
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"{name} of shape {tuple(weight.shape)} holds NaN or infinite entries; its spectrum is undefined"
        )
    return weight


def scaled(weight: Tensor) -> tuple[Tensor, float]:
    """Return the tensor over its largest absolute entry, and that entry; 0 for an empty or zero tensor.

    Squares of the scaled entries stay within the range of float32.
    """
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    if largest == 0.0:
        return weight, 0.0
    # in float64, since the reciprocal of a subnormal number overflows
    return weight.double().div(largest).to(weight.dtype), largest


def private_start(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a random vector of unit norm that leaves the user's generators alone."""
    generator = torch.Generator().manual_seed(_SEED)
    start = torch.randn(shape, generator=generator, dtype=torch.float64)
    start /= torch.linalg.vector_norm(start)
    return start.to(device=like.device, dtype=like.dtype)


def check_rtol(rtol: float) -> None:
    """Raise ``ValueError`` unless the relative error lies between 0 and 1."""
    if not 0.0 < rtol < 1.0:
        raise ValueError(f"rtol, a relative error, must lie between 0 and 1, got {rtol!r}")
