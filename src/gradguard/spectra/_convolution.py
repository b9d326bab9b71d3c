"""Singular values of convolutions as the linear maps that they are, not of their reshaped kernels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from gradguard.spectra._dense import sigma_max
from gradguard.spectra._estimates import SigmaMax
from gradguard.spectra._lanczos import largest_singular_value
from gradguard.spectra._tensors import check_rtol, private_start, scaled, whole

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Conv", "conv_power_step", "conv_sigma_max", "conv_singular_values", "kernel_bounds"]

Conv = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
)  # what isinstance and annotations take

_FORWARD: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}

_MAX_ITERATIONS = 240
"""Products with the convolution and its adjoint at most, ten restarts. Ours."""


def conv_sigma_max(
    module: nn.Module,
    input_size: int | Sequence[int],
    rtol: float = 1e-3,
    *,
    start: Tensor | None = None,
    max_iterations: int = _MAX_ITERATIONS,
) -> SigmaMax:
    """Return the largest singular value of a convolution on inputs of one size, the most by which it stretches one.

    The operator with its true stride, padding (zeros, circular, reflect, replicate), dilation and groups, without its
    bias, by restarted Lanczos on the convolution and its adjoint: at most the true value.

    Args:
        module: ``nn.Conv1d`` to ``nn.ConvTranspose3d``.
        input_size: Length of each spatial dimension of the input, ``[d]``, ``[h, w]`` or ``[d, h, w]``, without batch
            and channels; one number for all of them.
        rtol: Relative residual to reach, between 0 and 1.
        start: Tensor of shape ``[in_channels, *input_size]`` to start from, such as an earlier estimate's ``vector``.
        max_iterations: Products with the operator and its adjoint at most.

    Raises:
        TypeError: If the module is no convolution of torch's.
        ValueError: If the size does not fit the kernel, or a weight is not finite.

    Source:
        Ryu, Liu, Wang, Chen, Wang, Yin (2019), "Plug-and-Play Methods Provably Converge with Properly Trained
        Denoisers", ICML, arXiv 1905.05406, section 4: power iteration with the convolution and its transpose.

    Example:
        >>> mean = nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular", bias=False)
        >>> _ = nn.init.constant_(mean.weight, 1 / 9)
        >>> round(conv_sigma_max(mean, 8).value, 4)
        1.0
    """
    check_rtol(rtol)
    conv = _as_conv(module)
    sizes = _spatial(conv, input_size)
    weight, scale = scaled(whole(conv.weight))
    if scale == 0.0:
        return SigmaMax(value=0.0, residual=0.0, certified=True, method="exact", iterations=0)
    shape = (conv.in_channels, *sizes)
    if start is None:
        start = private_start(shape, weight)
    elif start.shape != shape:
        raise ValueError(f"start must have shape {shape}, got {tuple(start.shape)}")
    return largest_singular_value(
        _normal_map(conv, weight, shape),
        start.detach().to(weight),
        rtol=rtol,
        max_iterations=max_iterations,
        scale=scale,
    )


def conv_power_step(module: nn.Module, input_size: Sequence[int], start: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return an estimate of :func:`conv_sigma_max` from below by one power iteration, and the vector to go on from.

    The device is not waited for, and nothing is checked. The weight may hold NaN: so does the estimate, and the vector
    stays.

    Args:
        module: ``nn.Conv1d`` to ``nn.ConvTranspose3d``.
        input_size: Length of each spatial dimension of the input, without batch and channels.
        start: ``[in_channels, *input_size]``; ``None`` starts from a random vector of its own generator.
    """
    conv = _as_conv(module)
    weight = conv.weight.detach()
    if weight.dtype in (torch.float16, torch.bfloat16):
        weight = weight.float()
    shape = (conv.in_channels, *input_size)
    if start is None or start.shape != shape or start.dtype != weight.dtype or start.device != weight.device:
        start = private_start(shape, weight)
    with torch.no_grad():
        image = _normal_map(conv, weight, shape)(start)
        norm = torch.linalg.vector_norm(image)
        moved = image / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        return norm.sqrt(), torch.where((norm > 0.0) & norm.isfinite(), moved, start)


def conv_singular_values(module: nn.Module, input_size: int | Sequence[int]) -> Tensor:
    """Return every singular value of a convolution with circular padding and stride 1, largest first, in float64.

    Exact: Fourier transforms make such an operator block diagonal. 64 channels to 64, 3 x 3, on 32 x 32 take 0.3 s.

    Args:
        module: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` with ``padding_mode="circular"``, stride 1, and an output
            of the size of its input.
        input_size: As in :func:`conv_sigma_max`; at least the dilated kernel.

    Raises:
        TypeError: If the module is no convolution of torch's.
        ValueError: If it is not circular, strides, or changes the size.

    Source:
        Sedghi, Gupta, Long (2019), "The Singular Values of Convolutional Layers", ICLR, arXiv 1805.10408.
    """
    conv = _as_conv(module)
    sizes = _spatial(conv, input_size)
    dims = len(sizes)
    circular = conv.padding_mode == "circular" and not conv.transposed and set(conv.stride) == {1}
    if not circular or [sum(pair) for pair in _padding(conv)] != [
        dilation * (kernel - 1) for kernel, dilation in zip(conv.kernel_size, conv.dilation, strict=True)
    ]:
        raise ValueError(
            "singular values are exact only for circular padding to the same size with stride 1, got "
            f"{conv}; use conv_sigma_max for the largest one"
        )
    weight = whole(conv.weight).double().cpu()
    places = itertools.product(*(range(kernel) for kernel in conv.kernel_size))
    spread = weight.new_zeros(*weight.shape[:2], math.prod(sizes))
    spread.index_add_(2, torch.tensor([_flat(place, conv.dilation, sizes) for place in places]), weight.flatten(2))
    symbol = torch.fft.fftn(spread.unflatten(2, sizes), dim=tuple(range(2, 2 + dims)))
    grouped = symbol.unflatten(0, (conv.groups, -1)).flatten(3).permute(0, 3, 1, 2)
    values: Tensor = torch.linalg.svdvals(grouped)
    return values.flatten().sort(descending=True).values


def kernel_bounds(module: nn.Module) -> tuple[float, float]:
    """Return a lower and an upper bound of the largest singular value from the kernel alone, for any large input.

    R, the norm of the kernel reshaped to ``[out, in * kernel]``, is what spectral normalization calls the norm of a
    convolution; the operator's lies between R and R times the root of the number of kernels that overlap in an input.
    The lower bound needs an input in which one whole kernel fits.

    Args:
        module: ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d``.

    Raises:
        TypeError: If it is something else, a transposed convolution included.

    Source:
        Singla, Feizi (2021), "Fantastic Four", ICLR, arXiv 1911.10258, theorem 1; Tsuzuku, Sato, Sugiyama (2018), arXiv
        1802.04034, corollary 1, for strides.
    """
    conv = _as_conv(module)
    if conv.transposed:
        raise TypeError(f"the module must be a convolution that is not transposed, got {type(module).__name__}")
    norms = [sigma_max(group.flatten(1)).value for group in whole(conv.weight).chunk(conv.groups)]
    overlaps = math.prod(
        math.ceil(kernel / stride) for kernel, stride in zip(conv.kernel_size, conv.stride, strict=True)
    )
    return max(norms), max(norms) * math.sqrt(overlaps)


def _flat(place: Sequence[int], dilation: Sequence[int], sizes: Sequence[int]) -> int:
    """Return where an entry of a kernel stands in a flattened image that is as periodic as the padding."""
    flat = 0
    for index, step, size in zip(place, dilation, sizes, strict=True):
        flat = flat * size + index * step % size
    return flat


def _normal_map(conv: Conv, weight: Tensor, shape: tuple[int, ...]) -> Callable[[Tensor], Tensor]:
    """Return x -> A^T A x. The convolution is linear, so its graph at zero gives the adjoint everywhere."""
    with torch.enable_grad():
        zero = weight.new_zeros(shape, requires_grad=True)
        image = _apply(conv, weight, zero)

    def normal(x: Tensor) -> Tensor:
        with torch.no_grad():
            stretched = _apply(conv, weight, x)
        return torch.autograd.grad(image, zero, stretched, retain_graph=True)[0]

    return normal


def _apply(conv: Conv, weight: Tensor, x: Tensor) -> Tensor:
    dims = len(conv.kernel_size)
    x = x.unsqueeze(0)
    if conv.transposed:
        return _TRANSPOSED[dims](
            x, weight, None, conv.stride, conv.padding, conv.output_padding, conv.groups, conv.dilation
        ).squeeze(0)
    if conv.padding_mode == "zeros" and conv.padding != "same":  # which warns for even kernels
        return _FORWARD[dims](x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups).squeeze(0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, [side for pair in reversed(_padding(conv)) for side in pair], mode=mode)
    return _FORWARD[dims](padded, weight, None, conv.stride, 0, conv.dilation, conv.groups).squeeze(0)


def _padding(conv: Conv) -> list[tuple[int, int]]:
    """Return what is added before and after, per spatial dimension."""
    if conv.padding == "valid":
        return [(0, 0)] * len(conv.kernel_size)
    if conv.padding == "same":
        totals = [dilation * (kernel - 1) for kernel, dilation in zip(conv.kernel_size, conv.dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(int(side), int(side)) for side in conv.padding]


def _as_conv(module: nn.Module) -> Conv:
    if not isinstance(module, Conv):
        raise TypeError(
            f"the module must be a convolution of torch.nn (Conv1d to ConvTranspose3d), got {type(module)!r}"
        )
    return module


def _spatial(conv: Conv, input_size: int | Sequence[int]) -> tuple[int, ...]:
    dims = len(conv.kernel_size)
    sizes = (input_size,) * dims if isinstance(input_size, int) else tuple(input_size)
    if len(sizes) != dims or min(sizes, default=0) < 1:
        raise ValueError(
            f"input_size of a convolution over {dims} dimensions must be one positive integer or {dims}, without batch "
            f"and channels, got {input_size!r}"
        )
    if not conv.transposed:
        for size, kernel, dilation, pad in zip(sizes, conv.kernel_size, conv.dilation, _padding(conv), strict=True):
            if size + sum(pad) < dilation * (kernel - 1) + 1:
                raise ValueError(f"input_size {sizes} is smaller than the kernel {conv.kernel_size} of {conv}")
    return sizes
