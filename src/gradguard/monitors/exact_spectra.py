"""Spectra of all weights at one moment, exact or certified: for a report in depth, not for every step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from gradguard.findings import MatrixSpectrum
from gradguard.monitors.spectral import followed_modules, is_followed, row_name
from gradguard.spectra import NamedMatrix, conv_sigma_max, named_matrices, sigma_max, spectral_radius
from gradguard.spectra._convolution import Conv
from gradguard.spectra._dense import largest_and_condition
from gradguard.spectra._tensors import whole

if TYPE_CHECKING:
    from torch import nn

__all__ = ["exact_spectra"]

_EXACT_SIDE = 1024
"""Smaller side up to which every singular value is computed: 0.11 s on two CPU cores. Above, the largest is found to a
residual of ``_RTOL``, and the condition number is not. Ours."""

_RTOL = 1e-3


def exact_spectra(model: nn.Module, input_sizes: Mapping[str, tuple[int, ...]]) -> Iterator[MatrixSpectrum]:
    """Yield the spectrum of every matrix and convolution whose weight is finite, in registration order.

    Args:
        model: The model; nothing of it is changed.
        input_sizes: Spatial size of the input of each convolution, by name; others are left out.
    """
    for layer, module in followed_modules(model):
        if isinstance(module, Conv):
            if layer in input_sizes and torch.isfinite(module.weight).all():
                yield _of_conv(layer, module, input_sizes[layer])
            continue
        for found in named_matrices(module, name=layer):
            if is_followed(found) and torch.isfinite(found.matrix).all():
                yield _of_matrix(layer, found)


def _of_conv(layer: str, module: Conv, size: tuple[int, ...]) -> MatrixSpectrum:
    found = conv_sigma_max(module, size, _RTOL)
    return MatrixSpectrum(
        name=row_name(layer, "weight"),
        layer=layer,
        shape=tuple(module.weight.shape),
        input_size=size,
        sigma_max=found.value,
        certified=found.certified,
    )


def _of_matrix(layer: str, found: NamedMatrix) -> MatrixSpectrum:
    matrix = whole(found.matrix)
    condition = math.nan
    if min(matrix.shape) <= _EXACT_SIDE:
        largest, condition = largest_and_condition(matrix)
        certified = True
    else:
        estimate = sigma_max(matrix, _RTOL, exact=False)
        largest, certified = estimate.value, estimate.certified
    radius = math.nan
    if found.is_recurrent and matrix.shape[0] == matrix.shape[1]:
        eigenvalue = spectral_radius(matrix, _RTOL)
        radius, certified = eigenvalue.value, certified and eigenvalue.certified
    frobenius = float(torch.linalg.vector_norm(matrix, dtype=torch.float64))
    return MatrixSpectrum(
        name=row_name(layer, found.name),
        layer=layer,
        shape=tuple(matrix.shape),
        sigma_max=largest,
        certified=certified,
        stable_rank=(frobenius / largest) ** 2 if largest > 0.0 else math.nan,
        condition=condition,
        spectral_radius=radius,
        derivative_bound=found.derivative_bound if found.is_recurrent else math.nan,
    )
