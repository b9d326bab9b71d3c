"""The matrices that a module applies: gates and projections that are stacked in one parameter, apart."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["NamedMatrix", "named_matrices"]

_GATES: dict[str, tuple[str, ...]] = {
    "LSTM": ("input", "forget", "cell", "output"),
    "GRU": ("reset", "update", "candidate"),
}
"""Order of the gates in torch's stacked weights. Source: documentation of torch.nn.LSTM and torch.nn.GRU."""

_LARGEST_DERIVATIVE = {"cell": 1.0, "candidate": 1.0}
"""Of tanh; that of the sigmoid gates is 1/4. Source: elementary calculus."""

_FUSED = re.compile(r"qkv|in_proj$|query_key_value|c_attn$", re.IGNORECASE)
"""Names of linear layers that are query, key and value in one, where the output is three times the input."""

_PROJECTIONS = ("query", "key", "value")


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedMatrix:
    """One matrix of a module.

    Attributes:
        parameter: Name of the parameter in its module, for instance ``"weight_hh_l0"``.
        part: Which part of a stacked parameter, for instance ``"forget"`` or ``"query"``; empty for the whole.
        matrix: Detached, shape ``[rows, columns]``; a view of the parameter except where a projection is multiplied in.
        is_recurrent: Whether it maps a recurrent net's state to the next state, or to a gate.
        derivative_bound: Largest derivative of the nonlinearity behind it in a recurrent net, 1/4 for sigmoid gates and
            1 for tanh and ReLU; NaN for other modules.
    """

    parameter: str
    part: str = ""
    matrix: Tensor = field(repr=False, compare=False)
    is_recurrent: bool = False
    derivative_bound: float = float("nan")

    @property
    def name(self) -> str:
        """The parameter and the part, for instance ``"weight_hh_l0[forget]"``."""
        return f"{self.parameter}[{self.part}]" if self.part else self.parameter


def named_matrices(module: nn.Module, *, name: str = "") -> Iterator[NamedMatrix]:
    """Yield the matrices of one module, not of those inside it.

    Stacked gates of ``nn.LSTM`` and ``nn.GRU`` come one by one, with a projection (``proj_size``) multiplied in; so do
    query, key and value of ``nn.MultiheadAttention`` and of fused linear layers that are called so. Convolutions are
    not matrices and left out (see :func:`conv_sigma_max`), and so is what a parametrization computes: asking for it can
    change its state.

    Args:
        module: Any module.
        name: The module's name, by which fused projections are recognised.
    """
    if parametrize.is_parametrized(module):
        return
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        yield from _recurrent(module)
        return
    for key, parameter in module._parameters.items():
        if (
            parameter is None
            or parameter.ndim != 2
            or not parameter.is_floating_point()
            or isinstance(parameter, nn.UninitializedParameter)
        ):
            continue
        weight = parameter.detach()
        rows, columns = weight.shape
        fused = key == "in_proj_weight" or (isinstance(module, nn.Linear) and _FUSED.search(name.rpartition(".")[2]))
        if fused and rows == 3 * columns:
            for part, block in zip(_PROJECTIONS, weight.chunk(3), strict=True):
                yield NamedMatrix(parameter=key, part=part, matrix=block)
        else:
            yield NamedMatrix(parameter=key, matrix=weight)


def _recurrent(module: nn.RNNBase | nn.RNNCellBase) -> Iterator[NamedMatrix]:
    kind = next((kind for kind in _GATES if kind in type(module).__name__ or kind == getattr(module, "mode", "")), "")
    gates = _GATES.get(kind, ("",))
    for key, parameter in module._parameters.items():
        if parameter is None or parameter.ndim != 2 or key.startswith("weight_hr"):
            continue
        weight = parameter.detach()
        recurrent = key.startswith("weight_hh")
        projection = getattr(module, key.replace("weight_hh", "weight_hr"), None) if recurrent else None
        for gate, block in zip(gates, weight.chunk(len(gates)), strict=True):
            matrix = (
                block
                if not isinstance(projection, torch.Tensor) or projection is parameter
                else (block @ projection.detach())
            )
            yield NamedMatrix(
                parameter=key,
                part=gate,
                matrix=matrix,
                is_recurrent=recurrent,
                derivative_bound=_LARGEST_DERIVATIVE.get(gate, 0.25 if gate else 1.0),
            )
