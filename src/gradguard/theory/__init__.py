"""Mean-field theory of signal propagation: what wide random layers do to signals and gradients.

In a wide network with weights of variance ``sigma_w^2 / fan_in`` and biases of variance ``sigma_b^2``, pre-activations
are Gaussian. With z standard normal, their variance q and the squared norm of the loss gradient at them follow ::

    q(next layer)          = sigma_w^2 E[phi(sqrt(q) z)^2] + sigma_b^2          length_map
    |gradient|^2(previous) = sigma_w^2 E[phi'(sqrt(q) z)^2] |gradient|^2        chi

so gradients vanish or explode exponentially with depth unless chi = 1: a ReLU stack at PyTorch's default initialization
passes a factor 0.41 per layer. numpy only; activations are named as in ``torch.nn`` or given as modules.

========================  ====================================================================
:func:`chi`               Factor per layer on the gradient's squared L2 norm.
:func:`gain_per_layer`    Factor per layer on its L2 norm: the square root of chi.
:func:`critical_gain`     Weight gain at which chi = 1.
:func:`forward_gain`      Weight gain that keeps unit variance.
:func:`backward_gain`     Weight gain that keeps the gradient's norm at unit variance.
:func:`fixed_point`       Variance that deep layers approach.
:func:`depth_scale`       Layers over which a squared gradient norm changes by the factor e.
:func:`normalized_chi`    Chi with batch or layer norm.
:func:`activation`        A function with its derivative and bound, by name or module.
========================  ====================================================================

Source:
    Poole et al. (2016), "Exponential expressivity in deep neural networks through transient chaos", NeurIPS, arXiv
    1606.05340; Schoenholz et al. (2017), "Deep Information Propagation", ICLR, arXiv 1611.01232.

Example:
    >>> from gradguard import theory
    >>> round(theory.gain_per_layer("tanh", sigma_w=5 / 3), 2), round(theory.critical_gain("tanh"), 2)
    (1.1, 1.0)
"""

from gradguard.theory._activations import Activation
from gradguard.theory._expectations import backward_gain, forward_gain, mean, mean_square, mean_square_derivative
from gradguard.theory._lookup import ACTIVATIONS, ActivationLike, activation
from gradguard.theory._propagation import (
    PYTORCH_DEFAULT_SIGMA_W,
    chi,
    critical_gain,
    depth_scale,
    fixed_point,
    gain_per_layer,
    length_map,
    normalized_chi,
)

__all__ = [
    "ACTIVATIONS",
    "PYTORCH_DEFAULT_SIGMA_W",
    "Activation",
    "ActivationLike",
    "activation",
    "backward_gain",
    "chi",
    "critical_gain",
    "depth_scale",
    "fixed_point",
    "forward_gain",
    "gain_per_layer",
    "length_map",
    "mean",
    "mean_square",
    "mean_square_derivative",
    "normalized_chi",
]
