"""Spectra of weights: how much a layer can stretch a vector, and how fast powers of a recurrent matrix grow.

Pure functions of tensors: nothing is trained, no random state of the user's is touched, gradients are not recorded.
Every estimate carries its relative residual and says whether that meets the error asked for.

==============================  ======================================================================================
:func:`sigma_max`               Largest singular value of a matrix: exact, or by restarted Lanczos, which bounds it from
                                below.
:func:`power_iteration`         The same by plain, warm-started power iteration without a host synchronisation.
:func:`gram_bound`              A certified upper bound of it.
:func:`conv_sigma_max`          Largest singular value of a convolution as an operator, with its stride, padding,
                                dilation and groups.
:func:`conv_singular_values`    All of them, exactly, for circular padding and stride 1.
:func:`kernel_bounds`           What the reshaped kernel says of the operator: bounds, not its norm.
:func:`spectral_radius`         Largest absolute eigenvalue of a square matrix, symmetric or not.
:func:`gelfand_bound`           An upper bound of it that tends to it.
:func:`stable_rank`             Squared Frobenius norm over squared largest singular value.
:func:`condition_number`        Largest over smallest singular value.
:func:`named_matrices`          The matrices in a module: per gate, per projection.
==============================  ======================================================================================

Example:
    >>> import torch
    >>> from gradguard import spectra
    >>> shear = torch.tensor([[0.5, 100.0], [0.0, 0.5]])
    >>> round(float(spectra.sigma_max(shear)), 4), round(float(spectra.spectral_radius(shear)), 4)
    (100.0025, 0.5)
"""

from gradguard.spectra._convolution import conv_sigma_max, conv_singular_values, kernel_bounds
from gradguard.spectra._dense import condition_number, gram_bound, power_iteration, sigma_max, stable_rank
from gradguard.spectra._estimates import SigmaMax, SpectralRadius
from gradguard.spectra._matrices import NamedMatrix, named_matrices
from gradguard.spectra._radius import gelfand_bound, spectral_radius

__all__ = [
    "NamedMatrix",
    "SigmaMax",
    "SpectralRadius",
    "condition_number",
    "conv_sigma_max",
    "conv_singular_values",
    "gelfand_bound",
    "gram_bound",
    "kernel_bounds",
    "named_matrices",
    "power_iteration",
    "sigma_max",
    "spectral_radius",
    "stable_rank",
]
