"""Every elementwise activation of torch.nn, as modules and as the theory knows them."""

from __future__ import annotations

from torch import nn

from gradguard import theory
from gradguard.theory import ACTIVATIONS, Activation

NAMES = [name for name in ACTIVATIONS if name != "threshold"]
"""Activations that need no parameter."""

MODULES = [
    nn.Identity(),
    nn.Sigmoid(),
    nn.Tanh(),
    nn.ReLU(),
    nn.LeakyReLU(),
    nn.LeakyReLU(0.3),
    nn.PReLU(),
    nn.PReLU(init=-0.4),
    nn.RReLU().eval(),
    nn.RReLU(0.2, 0.6).eval(),
    nn.ELU(),
    nn.ELU(alpha=2.0),
    nn.CELU(),
    nn.CELU(alpha=0.5),
    nn.SELU(),
    nn.GELU(),
    nn.GELU(approximate="tanh"),
    nn.SiLU(),
    nn.Mish(),
    nn.Softplus(),
    nn.Softplus(beta=3.0, threshold=5.0),
    nn.Softsign(),
    nn.Hardtanh(),
    nn.Hardtanh(-0.5, 2.0),
    nn.ReLU6(),
    nn.Hardsigmoid(),
    nn.Hardswish(),
    nn.LogSigmoid(),
    nn.Tanhshrink(),
    nn.Softshrink(),
    nn.Softshrink(1.5),
    nn.Hardshrink(),
    nn.Hardshrink(1.5),
    nn.Threshold(0.1, 20.0),
]
EVERY = [theory.activation(module) for module in MODULES]
"""Every activation of torch.nn, most of them with two sets of parameters."""


def label(value: object) -> str | None:
    """Name a module or an activation with its parameters in a test's id."""
    if isinstance(value, Activation):
        return " ".join([value.name, *(f"{key}={number}" for key, number in value.parameters.items())])
    return repr(value) if isinstance(value, nn.Module) else None
