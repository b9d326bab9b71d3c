"""Derivatives of torch's elementwise activations, from the numbers a forward hook has at hand.

Closed forms, not autograd: a graph built inside the user's forward pass would be packed by a checkpoint's saved-tensor
hooks and break its recomputation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["ActivationInfo", "activation_info", "function_info"]


@dataclass(frozen=True, slots=True)
class ActivationInfo:
    """An elementwise activation.

    Attributes:
        bound: Largest absolute derivative over all inputs.
        derivative: From module, input and output to the derivative, elementwise.
        needs_input: Whether the input is needed; an in-place module has overwritten it.
        bounded: Whether the output is bounded, so that large inputs saturate it.
    """

    bound: float
    derivative: Callable[[Any, Tensor, Tensor], Tensor]
    needs_input: bool = False
    bounded: bool = False


def _gelu(module: nn.GELU, x: Tensor, _: Tensor) -> Tensor:
    if module.approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
        slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x**2)
        return 0.5 * (1 + inner.tanh()) + 0.5 * x * (1 - inner.tanh() ** 2) * slope
    density = torch.exp(-0.5 * x**2) / math.sqrt(2 * math.pi)
    return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density


def _silu(_: nn.SiLU, x: Tensor, __: Tensor) -> Tensor:
    s = x.sigmoid()
    return s * (1 + x * (1 - s))


def _mish(_: nn.Mish, x: Tensor, __: Tensor) -> Tensor:
    t = nn.functional.softplus(x).tanh()
    return t + x * x.sigmoid() * (1 - t**2)


def _elu(alpha: float, y: Tensor) -> Tensor:
    return torch.where(y > 0, 1.0, y + alpha)


_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
"""Source: Klambauer et al. (2017), "Self-Normalizing Neural Networks", NeurIPS, arXiv 1706.02515."""

_BY_TYPE: dict[type[nn.Module], ActivationInfo] = {
    nn.Sigmoid: ActivationInfo(0.25, lambda _, x, y: y * (1 - y), bounded=True),
    nn.Tanh: ActivationInfo(1.0, lambda _, x, y: 1 - y**2, bounded=True),
    nn.Softsign: ActivationInfo(1.0, lambda _, x, y: (1 - y.abs()) ** 2, bounded=True),
    nn.Hardsigmoid: ActivationInfo(1 / 6, lambda _, x, y: ((y > 0) & (y < 1)) / 6, bounded=True),
    nn.Hardtanh: ActivationInfo(1.0, lambda m, x, y: ((y > m.min_val) & (y < m.max_val)) * 1.0, bounded=True),
    nn.ReLU6: ActivationInfo(1.0, lambda m, x, y: ((y > 0) & (y < 6)) * 1.0),
    nn.ReLU: ActivationInfo(1.0, lambda _, x, y: (y > 0) * 1.0),
    nn.LeakyReLU: ActivationInfo(1.0, lambda m, x, y: torch.where(y > 0, 1.0, m.negative_slope)),
    nn.ELU: ActivationInfo(1.0, lambda m, x, y: _elu(m.alpha, y)),
    nn.SELU: ActivationInfo(
        _SELU_ALPHA * _SELU_SCALE, lambda _, x, y: torch.where(y > 0, _SELU_SCALE, y + _SELU_ALPHA * _SELU_SCALE)
    ),
    nn.Softplus: ActivationInfo(1.0, lambda m, x, y: 1 - torch.exp(-m.beta * y)),
    nn.GELU: ActivationInfo(1.128993, _gelu, needs_input=True),
    nn.SiLU: ActivationInfo(1.099839, _silu, needs_input=True),
    nn.Mish: ActivationInfo(1.088499, _mish, needs_input=True),
}
"""Bounds of GELU (of its tanh form, the larger by 1e-4), SiLU and Mish: ours, maximised numerically; tests compare
every row with autograd."""


def activation_info(module: nn.Module) -> ActivationInfo | None:
    """Return what is known of an activation module, ``None`` for other modules; subclasses count as their base."""
    return next((_BY_TYPE[base] for base in type(module).__mro__ if base in _BY_TYPE), None)


_BY_NODE = {"TanhBackward0": _BY_TYPE[nn.Tanh], "SigmoidBackward0": _BY_TYPE[nn.Sigmoid]}
"""Bounded activations by the name of their node in autograd's graph."""

_MOVES = frozenset(
    {
        "PermuteBackward0", "ReshapeAliasBackward0", "SqueezeBackward1", "TransposeBackward0", "TransposeBackward1",
        "UnsafeViewBackward0", "UnsqueezeBackward0", "ViewBackward0",
    }
)  # fmt: skip
"""Nodes of functions that give out the values they take, elsewhere."""

_FEW = 4
"""Such functions looked past at most."""


def function_info(tensor: Tensor) -> ActivationInfo | None:
    """Return what is known of the bounded activation that made a tensor, past reshaping; ``None`` for anything else."""
    node = tensor.grad_fn
    for _ in range(_FEW):
        if node is None or node.name() not in _MOVES or not node.next_functions:
            break
        node = node.next_functions[0][0]
    return None if node is None else _BY_NODE.get(node.name())
